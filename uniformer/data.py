"""Lists of videos, and the clips that training and testing draw from them.

Randomness hangs on (seed, epoch, index) alone, never on the number of workers or on what was read
before, so a resumed run sees the clips an uninterrupted one would have seen.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from uniformer.configs import InputConfig
from uniformer.decoder import Decoder
from uniformer.lists import Sample
from uniformer.sampling import sample_test, sample_train
from uniformer.transforms import AugmentConfig, make_views, train_clip
from uniformer.video import VideoDecodeError

__all__ = ["Batch", "Shuffled", "TestClips", "TrainClips", "collate", "make_loader", "worker_count"]

MAX_REPLACED = 50  # unreadable videos in a row: then it is the disk, not the files


@dataclass
class Batch:
    """Clips on their way to the network.

    Attributes:
        views: (B, V, 3, T, H, W), fp32: V views of each video, one in training.
        labels: (B,), int64.
        indices: (B,), int64: which samples of the list.
        readable: (B,), bool: False where a test video could not be read; its views are 0.
        failures: path and reason of every video that could not be read.
        notes: path and note of every video that was read otherwise than asked for.
    """

    views: Tensor
    labels: Tensor
    indices: Tensor
    readable: Tensor
    failures: list[tuple[str, str]]
    notes: list[tuple[str, str]]

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """The same batch, its tensors on `device`."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; DataLoader calls it."""
        return self._map(Tensor.pin_memory)

    def _map(self, fn: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            views=fn(self.views),
            labels=fn(self.labels),
            indices=fn(self.indices),
            readable=fn(self.readable),
        )


class TrainClips(Dataset):
    """Random clips; a video that cannot be read is replaced by another, and reported.

    Args:
        samples: the videos.
        input: how clips are made.
        augment: what chance does to them.
        decoder: reads the videos.

    Raises:
        ValueError: there are no samples.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        input: InputConfig,
        augment: AugmentConfig,
        decoder: Decoder,
    ) -> None:
        self.samples = _some(samples)
        self.input, self.augment, self.decoder = input, augment, decoder

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        """key (index, seed), as `Shuffled` gives them -> a batch of one."""
        index, seed = key
        rng = np.random.default_rng(seed)
        failures: list[tuple[str, str]] = []
        while True:
            sample = self.samples[index]
            try:
                frames, info = self.decoder.clip(
                    sample.path,
                    lambda n: sample_train(n, self.input.frames, _stride(self.input), rng),
                )
            except VideoDecodeError as error:
                failures.append((sample.path, str(error)))
                if len(failures) == MAX_REPLACED:
                    raise VideoDecodeError(
                        f"{MAX_REPLACED} videos in a row could not be read, the first: "
                        f"{failures[0][1]}. Are they there? Paths of a list start at --root; "
                        f"uniformer scan looks at all of them"
                    ) from error
                index = int(rng.integers(len(self.samples)))
                continue
            seed = int(rng.integers(2**63))
            clip = train_clip(torch.from_numpy(frames), self.input, self.augment, seed)
            return _batch_of_one(clip, sample.label, index, sample.path, info.note, failures)


class TestClips(Dataset):
    """All views of each video; one that cannot be read is marked, not replaced.

    Args:
        samples: the videos.
        input: how clips are made.
        decoder: reads the videos.
        clips: temporal clips a video.
        crops: spatial crops a clip, 1 or 3.
        shuffle_frames: put the frames of each clip in random order, to see what time is worth.

    Raises:
        ValueError: there are no samples, or no such views.
    """

    __test__ = False  # no test, whatever pytest makes of the name

    def __init__(
        self,
        samples: Sequence[Sample],
        input: InputConfig,
        decoder: Decoder,
        clips: int = 1,
        crops: int = 1,
        shuffle_frames: bool = False,
    ) -> None:
        if clips < 1 or crops not in (1, 3):
            raise ValueError(f"clips must be 1 or more and crops 1 or 3, got {clips} and {crops}")
        self.samples = _some(samples)
        self.input, self.decoder = input, decoder
        self.clips, self.crops, self.shuffle_frames = clips, crops, shuffle_frames

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Batch:
        """index -> a batch of one."""
        sample, size = self.samples[index], self.input.size
        try:
            frames, info = self.decoder.clip(sample.path, self.frames_of)
        except VideoDecodeError as error:
            views = torch.zeros(self.clips * self.crops, 3, self.input.frames, size, size)
            failure = [(sample.path, str(error))]
            return _batch_of_one(views, sample.label, index, sample.path, None, failure, False)
        views = make_views(torch.from_numpy(frames), self.input, self.clips, self.crops)
        if self.shuffle_frames:
            order = np.random.default_rng(index).permutation(self.input.frames)
            views = views[:, :, torch.from_numpy(order)]
        return _batch_of_one(views, sample.label, index, sample.path, info.note, [])

    def frames_of(self, video_frames: int) -> list[int]:
        """Indices of the frames of all clips, clip after clip."""
        T, stride = self.input.frames, _stride(self.input)
        clips = [sample_test(video_frames, T, stride, self.clips, i) for i in range(self.clips)]
        return list(chain.from_iterable(clips))


class Shuffled(Sampler[tuple[int, int]]):
    """Every index once an epoch, each with a seed for what chance does to it.

    Whoever iterates sets `epoch`. There is no `set_epoch`: accelerate would call it with a count of
    its own, which starts at 0 again in a resumed run.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order, seeds = rng.permutation(self.length), rng.integers(2**63, size=self.length)
        return zip(order.tolist(), seeds.tolist(), strict=True)


def make_loader(
    dataset: TrainClips | TestClips, batch_size: int, workers: int, seed: int | None = None
) -> DataLoader:
    """Batches of `dataset`: shuffled, and whole ones only, if there is a seed.

    Args:
        dataset: the clips.
        batch_size: videos a batch.
        workers: processes that read ahead; 0 reads in this one.
        seed: of the shuffling and of all chance in the clips, for training.
    """
    train = seed is not None
    return DataLoader(
        dataset,
        batch_size,
        sampler=Shuffled(len(dataset), seed) if seed is not None else None,
        num_workers=workers,
        collate_fn=collate,
        drop_last=train and len(dataset) >= batch_size,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=train and workers > 0,
        generator=torch.Generator(),  # its iterators must not draw from the global one
    )


def worker_count(asked: int | None) -> int:
    """Reading processes: as asked, else one a core that this process may use, 8 at most."""
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 8)


def collate(items: Sequence[Batch]) -> Batch:
    """Batches of one -> a batch."""
    return Batch(
        torch.cat([b.views for b in items]),
        torch.cat([b.labels for b in items]),
        torch.cat([b.indices for b in items]),
        torch.cat([b.readable for b in items]),
        [failure for b in items for failure in b.failures],
        [note for b in items for note in b.notes],
    )


def _batch_of_one(
    views: Tensor,
    label: int,
    index: int,
    path: str,
    note: str | None,
    failures: list[tuple[str, str]],
    readable: bool = True,
) -> Batch:
    notes = [(path, note)] if note else []
    return Batch(
        views.unsqueeze(0),
        torch.tensor([label]),
        torch.tensor([index]),
        torch.tensor([readable]),
        failures,
        notes,
    )


def _stride(cfg: InputConfig) -> int | None:
    return cfg.stride if cfg.sampling == "dense" else None


def _some(samples: Sequence[Sample]) -> Sequence[Sample]:
    if not samples:
        raise ValueError("there are no videos in the list")
    return samples

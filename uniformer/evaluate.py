"""Testing with several views of each video, logits summed (paper, section 4)."""

import json
import logging
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_accuracy
from tqdm import tqdm

from uniformer.configs import InputConfig
from uniformer.data import Batch, TestClips, make_loader, worker_count
from uniformer.decoder import Decoder
from uniformer.factory import open_model
from uniformer.lists import VideoList, read_labels, read_videos
from uniformer.pretrained import ZOO
from uniformer.video import VideoDecodeError

__all__ = ["Evaluation", "FileReport", "TestConfig", "evaluate", "make_accelerator", "test"]

log = logging.getLogger(__name__)


@dataclass
class Evaluation:
    """The outcome of a test. Accuracies are in percent, over the videos that could be read.

    Where none could, they are not a number.

    Attributes:
        top1: share of videos whose class has the largest logit.
        top5: share whose class is among the five largest (or as many as there are classes).
        mean_class: top-1 of each class, averaged over the classes present.
        videos: how many could be read.
        unreadable: path and reason of each that could not; they count in no accuracy.
        logits: (videos, classes), summed over views.
        labels: (videos,).
        indices: (videos,), which samples of the list.
    """

    top1: float
    top5: float
    mean_class: float
    videos: int
    unreadable: dict[str, str]
    logits: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    indices: Tensor = field(repr=False)


class FileReport:
    """Names each unreadable file once, and each reason for reading otherwise once.

    Args:
        failures: name unreadable files at all; not where the result lists them.
    """

    def __init__(self, failures: bool = True) -> None:
        self.failures, self.said = failures, set[str]()

    def add(self, batch: Batch) -> None:
        """Log what is new in a batch."""
        for path, reason in batch.failures if self.failures else ():
            if path not in self.said:
                self.said.add(path)
                log.warning("unreadable video: %s", reason)
        for path, note in batch.notes:
            if note not in self.said:
                self.said.add(note)
                log.info("%s, and perhaps others: %s", path, note)


def make_accelerator(**settings: Any) -> Accelerator:
    """An Accelerator with `settings`, whatever this process used before: bf16, then fp32, say."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    # Without `cpu`, processes on a machine without a GPU would not join one another.
    return Accelerator(cpu=not torch.accelerator.is_available(), **settings)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    accelerator: Accelerator,
    title: str = "test",
    report: FileReport | None = None,
) -> Evaluation:
    """Classify every video of a loader of `TestClips`.

    Args:
        model: as `accelerator.prepare` returned it; left in the mode it was in.
        loader: likewise.
        accelerator: where it runs.
        title: of the progress bar.
        report: where unreadable files are named.

    Returns:
        The outcome, the same in every process.

    Raises:
        ValueError: a label is beyond the model's classes.
    """
    was_training = model.training
    model.eval()
    report = report or FileReport()
    rows: dict[int, tuple[int, Tensor]] = {}  # by index: uneven shards repeat videos
    unreadable: dict[str, str] = {}
    quiet = None if accelerator.is_main_process else True
    for batch in tqdm(loader, desc=title, unit="batch", leave=False, disable=quiet):
        batch = batch.to(accelerator.device)
        report.add(batch)
        unreadable |= dict(batch.failures)
        # As many views at a time as there are videos: memory does not grow with clips and crops.
        views = batch.views.flatten(0, 1).split(len(batch.labels))
        with accelerator.autocast():
            logits = torch.cat([model(v).double() for v in views])
        logits = logits.unflatten(0, batch.views.shape[:2]).sum(1).cpu()
        for i, label, ok, row in zip(
            batch.indices.tolist(), batch.labels.tolist(), batch.readable.tolist(), logits,
            strict=True,
        ):  # fmt: skip
            if ok:
                rows[i] = (label, row)
    model.train(was_training)
    if accelerator.num_processes > 1:
        rows = dict(gather_object(list(rows.items())))
        unreadable = dict(gather_object(list(unreadable.items())))
    return _score(rows, unreadable)


def _score(rows: dict[int, tuple[int, Tensor]], unreadable: dict[str, str]) -> Evaluation:
    if not rows:
        nothing = torch.zeros(0)
        return Evaluation(math.nan, math.nan, math.nan, 0, unreadable, nothing, nothing, nothing)
    indices = sorted(rows)
    labels = torch.tensor([rows[i][0] for i in indices])
    logits = torch.stack([rows[i][1] for i in indices])
    classes = logits.shape[1]
    if int(labels.max()) >= classes:
        raise ValueError(
            f"label {int(labels.max())} in the data, but the model has {classes} classes only"
        )

    def accuracy(top: int, average: Literal["micro", "none"]) -> Tensor:
        return 100 * multiclass_accuracy(logits, labels, classes, average, min(top, classes))

    return Evaluation(
        top1=float(accuracy(1, "micro")),
        top5=float(accuracy(5, "micro")),
        mean_class=float(accuracy(1, "none")[labels.unique()].mean()),
        videos=len(indices),
        unreadable=unreadable,
        logits=logits,
        labels=labels,
        indices=torch.tensor(indices),
    )


# --- The command ----------------------------------------------------------------------


@dataclass
class TestConfig:
    """Settings of `uniformer test`.

    Attributes:
        checkpoint: a file of ours, a released one by name ("uniformer_small.k400_16x8"), or any
            other file of weights together with `model`.
        data: videos: a folder with a folder for each class (itself, or under test/ or val/), or
            a list; see `uniformer train`.
        split: which part of a folder: test, val (of class folders alone, the held-out fifth) or
            train.
        root: where the paths of a list start.
        labels: file of class names, if the checkpoint has none.
        model: preset that a file of bare weights belongs to.
        clips: temporal clips a video, 1 or more; as published for a released checkpoint, else 1.
        crops: spatial crops a clip, 1 or 3; likewise.
        shuffle_frames: put each clip's frames in random order, to see what time is worth.
        batch_size: videos at a time, in each process.
        mixed_precision: "no", "fp16" or "bf16".
        workers: processes that read videos; one a core, 8 at most, unless given.
        decoder: "decord", "torchcodec" or "pyav".
        timeout: seconds that reading one video may take.
        out: JSON file for the result.
    """

    __test__ = False  # no test, whatever pytest makes of the name

    checkpoint: str
    data: str
    split: Literal["train", "val", "test"] = "test"
    root: str | None = None
    labels: str | None = None
    model: str | None = None
    clips: int | None = None
    crops: Literal[1, 3] | None = None
    shuffle_frames: bool = False
    batch_size: int = 4
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    workers: int | None = None
    decoder: str = "decord"
    timeout: float = 60.0
    out: str | None = None


def test(cfg: TestConfig) -> Evaluation:
    """Test a checkpoint on a list of videos, print the result, and perhaps save it.

    Raises:
        ValueError: the checkpoint, the list or a setting is unusable; the text says how.
        VideoDecodeError: no video could be read.
    """
    model = open_model(cfg.checkpoint, cfg.model)
    if cfg.labels:
        model.classes = read_labels(cfg.labels)
    input = model.input or InputConfig()
    released = ZOO.get(cfg.checkpoint)
    views = (released.clips, released.crops) if released else (1, 1)
    clips = views[0] if cfg.clips is None else cfg.clips
    crops = views[1] if cfg.crops is None else cfg.crops
    videos = read_videos(cfg.data, cfg.split, cfg.root, model.classes)

    accelerator = make_accelerator(mixed_precision=cfg.mixed_precision)
    dataset = TestClips(
        videos.samples, input, Decoder(cfg.decoder, cfg.timeout), clips, crops, cfg.shuffle_frames
    )
    loader = make_loader(dataset, cfg.batch_size, worker_count(cfg.workers))
    model, loader = accelerator.prepare(model, loader)
    result = evaluate(model, loader, accelerator, report=FileReport(failures=False))
    if not result.videos:
        first = next(iter(result.unreadable.values()))
        raise VideoDecodeError(
            f"none of the {len(result.unreadable)} videos could be read, the first: {first}"
        )
    if accelerator.is_main_process:
        shuffled = ", frames in random order" if cfg.shuffle_frames else ""
        split = f", split {cfg.split}" if Path(cfg.data).is_dir() else ""
        print(f"{cfg.checkpoint} on {cfg.data}{split}, {clips} clips x {crops} crops{shuffled}")
        print(summary(result))
        if cfg.out:
            save(result, videos, cfg, cfg.out)
    return result


def summary(result: Evaluation) -> str:
    """The outcome in a few lines."""
    top5 = f"top-5 {result.top5:.2f}%   " if result.logits.shape[1] > 5 else ""
    lines = [
        f"top-1 {result.top1:.2f}%   {top5}mean of classes {result.mean_class:.2f}%   "
        f"({result.videos} videos)"
    ]
    if result.unreadable:
        lines.append(f"{len(result.unreadable)} videos could not be read and count in no accuracy:")
        lines += [f"  {reason}" for reason in result.unreadable.values()]
    return "\n".join(lines)


def save(result: Evaluation, videos: VideoList, cfg: TestConfig, path: str | os.PathLike) -> None:
    """Write the outcome as JSON: settings, accuracies, unreadable files, and each prediction."""
    best = result.logits.argmax(1).tolist()
    rows = zip(result.indices.tolist(), result.labels.tolist(), best, strict=True)
    content = {
        "settings": asdict(cfg),
        "top1": result.top1,
        "top5": result.top5,
        "mean_class": result.mean_class,
        "videos": result.videos,
        "unreadable": result.unreadable,
        "predictions": [
            {"path": videos.samples[i].path, "label": label, "predicted": predicted}
            for i, label, predicted in rows
        ],
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content, indent=1))

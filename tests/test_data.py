"""Batches: reproducible, and untroubled by files that cannot be read."""

import pytest
import torch

from tests.videos import write
from uniformer import InputConfig
from uniformer.data import Shuffled, TestClips, TrainClips, make_loader, worker_count
from uniformer.decoder import Decoder
from uniformer.lists import Sample, read_videos
from uniformer.transforms import AugmentConfig
from uniformer.video import VideoDecodeError

INPUT = InputConfig(frames=4, stride=2, size=32)


@pytest.fixture(scope="module")
def decoder():
    with Decoder(timeout=30) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def samples(digits):
    return read_videos(digits, "train").samples


@pytest.fixture
def damaged(samples, tmp_path):
    """The first three of a list cannot be read."""
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    return [
        Sample(str(bad), 0),
        Sample(str(tmp_path / "gone.mp4"), 0),
        Sample(str(bad), 0),
        *samples,
    ]


def train_batches(samples, decoder, workers=0, seed=3, epoch=0):
    clips = TrainClips(samples, INPUT, AugmentConfig(), decoder)
    loader = make_loader(clips, 4, workers, seed)
    loader.sampler.epoch = epoch
    return list(loader)


def test_batches_hang_on_seed_and_epoch_alone(samples, decoder):
    here = train_batches(samples, decoder)
    apart = train_batches(samples, decoder, workers=2)
    for a, b in zip(here, apart, strict=True):
        assert torch.equal(a.views, b.views)
        assert torch.equal(a.labels, b.labels)
    later = train_batches(samples, decoder, epoch=1)
    assert not torch.equal(here[0].indices, later[0].indices)
    again = train_batches(samples, decoder, epoch=1)
    assert torch.equal(again[0].views, later[0].views)


def test_training_batches_are_whole_and_cover_the_list(samples, decoder):
    batches = train_batches(samples, decoder)
    assert [b.views.shape for b in batches] == [(4, 1, 3, 4, 32, 32)] * (len(samples) // 4)
    indices = torch.cat([b.indices for b in batches]).tolist()
    assert len(set(indices)) == len(indices)
    assert all(
        samples[i].label == n for b in batches for i, n in zip(b.indices, b.labels, strict=True)
    )


def test_a_list_smaller_than_a_batch_still_trains(samples, decoder):
    (batch,) = train_batches(samples[:3], decoder)
    assert len(batch.labels) == 3


def test_iterating_does_not_touch_the_global_generator(samples, decoder):
    before = torch.get_rng_state()
    train_batches(samples[:4], decoder, workers=1)
    assert torch.equal(before, torch.get_rng_state())


def test_unreadable_training_videos_are_replaced_and_reported(damaged, decoder):
    clips = TrainClips(damaged, INPUT, AugmentConfig(), decoder)
    batch = clips[(1, 7)]
    assert batch.failures[0][0].endswith("gone.mp4")
    assert "no such file" in batch.failures[0][1]
    assert int(batch.indices) >= 3  # the label is the replacement's
    assert int(batch.labels) == damaged[int(batch.indices)].label
    assert batch.views.abs().sum() > 0
    assert torch.equal(batch.views, clips[(1, 7)].views)


def test_a_list_of_nothing_readable_ends_the_run(damaged, decoder):
    clips = TrainClips(damaged[:3], INPUT, AugmentConfig(), decoder)
    with pytest.raises(VideoDecodeError, match="50 videos in a row could not be read"):
        clips[(0, 0)]


def test_unreadable_test_videos_are_marked_not_replaced(damaged, decoder):
    clips = TestClips(damaged[:5], INPUT, decoder, clips=2, crops=3)
    (batch,) = make_loader(clips, 5, 0)
    assert batch.views.shape == (5, 6, 3, 4, 32, 32)
    assert batch.readable.tolist() == [False, False, False, True, True]
    assert len(batch.failures) == 3
    assert batch.views[:3].abs().sum() == 0
    assert batch.indices.tolist() == [0, 1, 2, 3, 4]


def test_shuffled_frames_are_the_same_frames(samples, decoder):
    straight = TestClips(samples, INPUT, decoder)[5].views[0, 0]
    shuffled = TestClips(samples, INPUT, decoder, shuffle_frames=True)[5].views[0, 0]
    assert not torch.equal(straight, shuffled)
    sums = [sorted(v.sum((0, 2, 3)).tolist()) for v in (straight, shuffled)]
    assert sums[0] == sums[1]


def test_uniform_sampling_reads_the_whole_video(samples, decoder):
    uniform = InputConfig(frames=4, size=32, sampling="uniform")
    assert TestClips(samples, uniform, decoder).frames_of(20) == [2, 7, 12, 16]
    assert TestClips(samples, INPUT, decoder, clips=2).frames_of(20) == [0, 2, 4, 7, 12, 14, 16, 19]


# A single frame, fewer frames than the clip, upright, and sizes that are odd.
@pytest.mark.parametrize("changes", [
    {"frames": 1}, {"frames": 3}, {"height": 96, "width": 40},
    {"height": 65, "width": 97, "pix_fmt": "yuv444p"},
], ids=str)  # fmt: skip
def test_awkward_videos_make_clips(tmp_path, decoder, changes):
    sample = Sample(str(write(tmp_path / "v.mp4", **changes)), 0)
    assert TestClips([sample], INPUT, decoder, 2, 3)[0].views.shape == (1, 6, 3, 4, 32, 32)
    clips = TrainClips([sample], INPUT, AugmentConfig(), decoder)
    assert clips[(0, 1)].views.shape == (1, 1, 3, 4, 32, 32)


def test_notes_travel_with_the_batch(tmp_path, decoder):
    path = write(tmp_path / "v.avi", "mpeg4", options={"b": "2M"})
    batch = TestClips([Sample(str(path), 0)], INPUT, decoder)[0]
    assert batch.notes == [
        (str(path), "seeking in avi is not exact: decoded by PyAV from the first frame")
    ]


def test_shuffled_draws_every_index_once():
    sampler = Shuffled(10, seed=0)
    first = list(sampler)
    assert sorted(i for i, _ in first) == list(range(10))
    assert len({seed for _, seed in first}) == 10
    assert list(sampler) == first


def test_empty_lists_are_refused(decoder):
    with pytest.raises(ValueError, match="no videos in the list"):
        TrainClips([], INPUT, AugmentConfig(), decoder)


def test_workers_are_as_asked_or_one_a_core():
    assert worker_count(0) == 0
    assert 1 <= worker_count(None) <= 8

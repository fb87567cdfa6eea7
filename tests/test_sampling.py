import numpy as np
import pytest

from tests.reference_values import golden
from uniformer.sampling import sample_test, sample_train


@pytest.mark.parametrize("kind", ["dense", "uniform"])
def test_test_clips_are_the_official_ones(kind):
    for case in golden("sampling")[kind]:
        stride = case["stride"] if kind == "dense" else None
        got = sample_test(
            case["video_frames"], case["num_frames"], stride, case["clips"], case["clip"]
        )
        assert got == case["index"], case


# Longer and shorter than the window, exactly as long, and a single frame.
@pytest.mark.parametrize("video_frames", [1, 5, 64, 300])
@pytest.mark.parametrize("stride", [4, None])
def test_train_clips_stay_in_the_video_and_in_order(video_frames, stride):
    rng = np.random.default_rng(0)
    for _ in range(200):
        indices = sample_train(video_frames, 16, stride, rng)
        assert len(indices) == 16
        assert indices == sorted(indices)
        assert indices[0] >= 0
        assert indices[-1] < video_frames


def test_dense_train_clips_start_anywhere():
    rng = np.random.default_rng(0)
    starts = [sample_train(300, 16, 4, rng)[0] for _ in range(4000)]
    assert min(starts) == 0
    assert max(starts) == 235  # 300 - 64, floored from a continuous start
    assert abs(np.mean(starts) - 117.5) < 5


def test_uniform_train_clips_cover_every_segment_whole():
    """With 33 frames and 16 segments of 2, a segment's frames are its two edges and its middle."""
    rng = np.random.default_rng(0)
    picked = np.array([sample_train(33, 16, None, rng) for _ in range(500)])
    for segment in range(16):
        assert set(picked[:, segment]) == {2 * segment, 2 * segment + 1, 2 * segment + 2}


def test_training_differs_by_seed_alone():
    first, again, other = (sample_train(300, 8, 8, np.random.default_rng(s)) for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(("args", "complaint"), [
    ((0, 16, 4, 1, 0), "frames to sample"), ((10, 16, 4, 2, 2), "clip must be"),
])  # fmt: skip
def test_impossible_clips_are_refused(args, complaint):
    with pytest.raises(ValueError, match=complaint):
        sample_test(*args)

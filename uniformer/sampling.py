"""Which frames of a video make a clip, with the arithmetic of the official code.

Dense (Kinetics): a window of frames * stride consecutive video frames, sampled evenly. Uniform
(Something-Something): the whole video in equal segments, a frame from each. A video shorter than
the window repeats its last frame; indices count from 0.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch

__all__ = ["sample_test", "sample_train"]


def sample_test(
    video_frames: int, frames: int, stride: int | None, clips: int, clip: int
) -> list[int]:
    """Frames of one of several clips spread over the video, always the same.

    Args:
        video_frames: how many the video has.
        frames: T, how many to pick.
        stride: for dense sampling; None for uniform.
        clips: how many clips the video is tested with.
        clip: which of them, from 0.

    Returns:
        `frames` indices, not decreasing.

    Raises:
        ValueError: the video is empty, or there is no such clip.
    """
    _check(video_frames, frames)
    if not 0 <= clip < clips:
        raise ValueError(f"clip must be from 0 to {clips - 1}, got {clip}")
    if stride is None:
        share = (clip + 1) / (clips + 1)  # of a segment; its middle when there is one clip
        return _segments(video_frames, frames, lambda low, high, size: low + int(size * share))
    room = max(video_frames - frames * stride, 0)
    start = room // 2 if clips == 1 else clip * (room // (clips - 1))
    return _window(video_frames, frames, stride, start)


def sample_train(
    video_frames: int, frames: int, stride: int | None, rng: np.random.Generator
) -> list[int]:
    """Frames of a clip at random: a window anywhere, or a random frame of each segment.

    Args:
        video_frames: how many the video has.
        frames: T, how many to pick.
        stride: for dense sampling; None for uniform.
        rng: where chance comes from.

    Returns:
        `frames` indices, not decreasing.

    Raises:
        ValueError: the video is empty.
    """
    _check(video_frames, frames)
    if stride is None:
        return _segments(
            video_frames, frames, lambda low, high, _: int(rng.integers(low, high + 1))
        )
    room = max(video_frames - frames * stride, 0)
    return _window(video_frames, frames, stride, rng.uniform(0, room))


def _check(video_frames: int, frames: int) -> None:
    if video_frames < 1 or frames < 1:
        raise ValueError(f"there must be frames to sample, got {frames} of {video_frames}")


def _window(video_frames: int, frames: int, stride: int, start: float) -> list[int]:
    # torch's own fp32 linspace: another one rounds some whole numbers down to the frame before.
    steps = torch.linspace(start, start + frames * stride - 1, frames)
    return steps.clamp(0, video_frames - 1).long().tolist()


def _segments(video_frames: int, frames: int, pick: Callable[[int, int, float], int]) -> list[int]:
    size = (video_frames - 1) / frames
    edges = [round(size * i) for i in range(frames + 1)]
    return [pick(low, high, size) for low, high in pairwise(edges)]

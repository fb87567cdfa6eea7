"""From decoded frames to the clips a network takes: crop, scale, normalise."""

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniformer.configs import InputConfig

__all__ = ["AugmentConfig", "make_views", "train_clip"]


@dataclass(frozen=True)
class AugmentConfig:
    """What chance does to a training clip; all frames of a clip get the same.

    Attributes:
        scale: smallest and largest share of the frame's area that a crop takes.
        ratio: smallest and largest width over height of a crop.
        flip: probability of mirroring left and right; 0 where direction matters.
        color_jitter: strength of random brightness, contrast and saturation; 0 for none.

    Raises:
        ValueError: a value is out of its range.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", tuple(self.scale))  # lists come from YAML
        object.__setattr__(self, "ratio", tuple(self.ratio))
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be 0 < smallest <= largest <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be 0 < smallest <= largest, got {self.ratio}")
        if not 0 <= self.flip <= 1 or self.color_jitter < 0:
            raise ValueError(
                f"flip must be in 0..1 and color_jitter at least 0, got {self.flip} and "
                f"{self.color_jitter}"
            )


def train_clip(frames: Tensor, cfg: InputConfig, augment: AugmentConfig, seed: int) -> Tensor:
    """Cut a random crop, the same from every frame, and perhaps mirror it.

    Args:
        frames: (T, H, W, 3), uint8 RGB.
        cfg: size and normalisation.
        augment: how much chance there is.
        seed: decides all of it.

    Returns:
        (1, 3, T, size, size), fp32, normalised: one view.
    """
    video = _augmentation(cfg.size, augment)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = video(_scaled(frames, cfg.size).unsqueeze(0))
    return _normalised(clip.transpose(1, 2), cfg)


@cache
def _augmentation(size: int, augment: AugmentConfig) -> nn.Module:
    """(B, T, 3, H, W) in 0..1 -> (B, T, 3, size, size); building it takes as long as using it."""
    import kornia.augmentation as K

    steps = [K.RandomResizedCrop((size, size), augment.scale, augment.ratio, align_corners=False)]
    if augment.flip:
        steps.append(K.RandomHorizontalFlip(augment.flip))
    if augment.color_jitter:
        jitter = augment.color_jitter
        steps.append(K.ColorJitter(jitter, jitter, jitter))
    return K.VideoSequential(*steps, data_format="BTCHW", same_on_frame=True)


def make_views(frames: Tensor, cfg: InputConfig, clips: int, crops: int) -> Tensor:
    """Scale the short side to `size` and cut square crops along the long side.

    Args:
        frames: (clips * T, H, W, 3), uint8 RGB, clip after clip.
        cfg: size and normalisation.
        clips: how many clips the frames are.
        crops: 1 for the middle, 3 for both ends and the middle.

    Returns:
        (clips * crops, 3, T, size, size), fp32, normalised; the crops of a clip side by side.

    Raises:
        ValueError: `crops` is neither 1 nor 3.
    """
    if crops not in (1, 3):
        raise ValueError(f"crops must be 1 or 3, got {crops}")
    x = _scaled(frames, cfg.size)
    H, W = x.shape[2:]
    short = min(H, W)
    height = cfg.size if short == H else math.floor(H / W * cfg.size)
    width = cfg.size if short == W else math.floor(W / H * cfg.size)
    x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False)
    room = max(height, width) - cfg.size
    starts = [math.ceil(room / 2)] if crops == 1 else [0, math.ceil(room / 2), room]
    axis = 2 if height > width else 3
    views = torch.stack([x.narrow(axis, start, cfg.size) for start in starts], dim=1)
    views = views.unflatten(0, (clips, -1)).permute(0, 2, 3, 1, 4, 5).flatten(0, 1)
    return _normalised(views, cfg)


def _scaled(frames: Tensor, size: int) -> Tensor:
    """(T, H, W, 3) uint8 -> (T, 3, h, w) fp32 in 0..1.

    Frames larger than the official data sets' are reduced to their scale, 320 pixels along the
    short side for crops of 224; they were so on disk. In float a 1080p clip alone takes a second.
    """
    x = frames.permute(0, 3, 1, 2)
    H, W = x.shape[2:]
    factor = size * 320 / 224 / min(H, W)
    if factor < 1:
        shape = (round(H * factor), round(W * factor))
        x = F.interpolate(x, shape, mode="bilinear", antialias=True)
    return x.float().div_(255)


def _normalised(views: Tensor, cfg: InputConfig) -> Tensor:
    """(V, 3, T, H, W) in 0..1 RGB -> what the network takes."""
    shape = (1, 3, 1, 1, 1)
    views = (views - torch.tensor(cfg.mean).view(shape)) / torch.tensor(cfg.std).view(shape)
    return views.flip(1) if cfg.bgr else views.contiguous()

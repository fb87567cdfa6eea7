"""What a UniFormer is made of, the named presets, and what clips its weights expect."""

import math
from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["PRESETS", "InputConfig", "UniFormerConfig"]

Four = tuple[int, int, int, int]


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _finite(value: object) -> bool:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and math.isfinite(value)  # type: ignore[arg-type]


def _tuple(cfg: object, name: str, length: int) -> tuple:
    """Make the field a tuple, for lists come from JSON and YAML."""
    value = getattr(cfg, name)
    if not isinstance(value, list | tuple) or len(value) != length:
        raise ValueError(f"{name} must be {length} numbers, got {value!r}")
    object.__setattr__(cfg, name, tuple(value))
    return tuple(value)


@dataclass(frozen=True)
class UniFormerConfig:
    """The network, and the questions the paper asks of it as switches.

    Attributes:
        depths: blocks a stage.
        dims: channels a stage.
        head_dim: channels an attention head; the shapes of the weights do not show it.
        mlp_ratio: hidden width of the FFN over its width.
        stages: what aggregates relations in each stage: L local, G global.
        tube_size: edge of the local neighbourhood in tokens: 3, 5, 7 or 9.
        dpe: dynamic position embedding, on or off.
        split: divided temporal, then spatial attention in the global stages.
        std: overlapping, temporally mixing downsampling between the stages.
        num_classes: 0 for no classifier.
        in_channels: of the clip.
        qkv_bias: bias on q, k and v.
        qk_scale: factor on the attention scores, head_dim**-0.5 unless given.
        drop_rate: dropout after the stem, in the FFN and after attention's projection.
        attn_drop_rate: dropout on the attention affinities.
        drop_path_rate: of the last block; it grows linearly from 0 at the first.

    Raises:
        ValueError: a value is out of its range; the text names it.
    """

    depths: Four = (3, 4, 8, 3)
    dims: Four = (64, 128, 320, 512)
    head_dim: int = 64
    mlp_ratio: float = 4.0
    stages: str = "LLGG"
    tube_size: int = 5
    dpe: bool = True
    split: bool = False
    std: bool = False
    num_classes: int = 400
    in_channels: int = 3
    qkv_bias: bool = True
    qk_scale: float | None = None
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.1

    def __post_init__(self) -> None:
        for name in ("depths", "dims"):
            value = _tuple(self, name, 4)
            if any(not _whole(v, 1) for v in value):
                raise ValueError(f"{name} must be four integers of 1 or more, got {value!r}")
        for name, least in (("head_dim", 1), ("in_channels", 1), ("num_classes", 0)):
            if not _whole(getattr(self, name), least):
                raise ValueError(
                    f"{name} must be an integer of {least} or more, got {getattr(self, name)!r}"
                )
        for name in ("dpe", "split", "std", "qkv_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("mlp_ratio", "qk_scale"):
            value = getattr(self, name)
            if not (_finite(value) and value > 0) and not (name == "qk_scale" and value is None):
                raise ValueError(f"{name} must be a number above 0, got {value!r}")
        if not isinstance(self.stages, str) or len(self.stages) != 4 or set(self.stages) - {*"LG"}:
            raise ValueError(
                f"stages must be four letters, each L (local) or G (global), as in 'LLGG', "
                f"got {self.stages!r}"
            )
        for stage, kind, dim in zip((1, 2, 3, 4), self.stages, self.dims, strict=True):
            if kind == "G" and dim % self.head_dim:
                raise ValueError(
                    f"stage {stage} is global, so its {dim} channels must be a multiple of "
                    f"head_dim, got head_dim={self.head_dim}"
                )
        if not _whole(self.tube_size, 3) or self.tube_size not in (3, 5, 7, 9):
            raise ValueError(f"tube_size must be 3, 5, 7 or 9, got {self.tube_size!r}")
        if self.split and "G" not in self.stages:
            raise ValueError(f"split=True needs a global stage, got stages={self.stages!r}")
        for name in ("drop_rate", "attn_drop_rate", "drop_path_rate"):
            value = getattr(self, name)
            if not (_finite(value) and 0 <= value < 1):
                raise ValueError(f"{name} must be in [0, 1), got {value!r}")


_SMALL = UniFormerConfig()

PRESETS = {
    "uniformer_small": _SMALL,
    "uniformer_base": replace(_SMALL, depths=(5, 8, 20, 7), drop_path_rate=0.3),
    # Narrow and shallow, for demos and tests on a CPU; no weights of it were ever released.
    "uniformer_nano": replace(_SMALL, depths=(1, 2, 3, 1), dims=(32, 64, 96, 128), head_dim=32),
}


@dataclass(frozen=True)
class InputConfig:
    """The clips that weights were trained on; it travels with them in our checkpoints.

    Attributes:
        frames: T, frames a clip.
        stride: video frames from one frame of the clip to the next; dense sampling only.
        sampling: "dense", consecutive frames `stride` apart (Kinetics), or "uniform", one frame
            from each of T equal segments of the video (Something-Something).
        size: H and W of the crop, in pixels.
        mean: of the pixels scaled to 0..1, in the order red, green, blue.
        std: likewise.
        bgr: channels go in as blue, green, red (the official Something-Something weights).

    Raises:
        ValueError: a value is out of its range.
    """

    frames: int = 16
    stride: int = 4
    sampling: Literal["dense", "uniform"] = "dense"
    size: int = 224
    mean: tuple[float, float, float] = (0.45, 0.45, 0.45)
    std: tuple[float, float, float] = (0.225, 0.225, 0.225)
    bgr: bool = False

    def __post_init__(self) -> None:
        mean, std = _tuple(self, "mean", 3), _tuple(self, "std", 3)
        if not _whole(self.frames, 1) or not _whole(self.stride, 1):
            raise ValueError(
                f"frames and stride must be integers of 1 or more, got {self.frames!r} and "
                f"{self.stride!r}"
            )
        if self.sampling not in ("dense", "uniform"):
            raise ValueError(f"sampling must be 'dense' or 'uniform', got {self.sampling!r}")
        if not _whole(self.size, 32):
            raise ValueError(f"size must be at least 32 pixels, got {self.size!r}")
        if not all(map(_finite, mean + std)) or min(std) <= 0:
            raise ValueError(
                f"mean and std must be three numbers each, std above 0, got {mean}, {std}"
            )
        if not isinstance(self.bgr, bool):
            raise ValueError(f"bgr must be True or False, got {self.bgr!r}")

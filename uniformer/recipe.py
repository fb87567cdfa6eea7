"""What a training starts from: its settings, its videos, and its network."""

import hashlib
import json
import logging
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from uniformer.checkpoint import read_checkpoint
from uniformer.configs import InputConfig
from uniformer.factory import create_model
from uniformer.lists import VideoList, read_labels, read_videos
from uniformer.model import UniFormer
from uniformer.scan import drop_unreadable
from uniformer.transforms import AugmentConfig

__all__ = [
    "FREE", "TrainConfig", "fingerprint", "make_model", "precision", "read_data", "settings_of",
]  # fmt: skip

log = logging.getLogger(__name__)


@dataclass
class TrainConfig:
    """Settings of `uniformer train`.

    Attributes:
        data: training videos: a folder with a folder of videos for each class (itself, or under
            train/ and val/), or a list: .csv or .txt of "path,label", Something-Something's
            "folder frames label", or its V2 .json with labels.json beside it.
        val: validation videos, likewise, if they are not part of the folder `data`.
        root: where the paths of lists start.
        labels: file of class names, for lists that hold numbers only.
        out: folder for checkpoints, metrics and settings.
        model: preset, see `uniformer.list_models()`, or released weights by name, as in
            "uniformer_small.k400_16x8"; unless given, the network that the file `pretrained`
            names, else uniformer_small.
        overrides: other fields of `UniFormerConfig`, as in {"stages": "LGGG"}.
        pretrained: file or tag to start from.
        fresh_head: draw a new classifier instead of loading that of `pretrained`.
        input: how clips are made; travels with the weights.
        augment: what chance does to training clips.
        epochs: passes over the training videos.
        batch_size: videos at a time, in each process.
        accumulate: batches a step of the optimizer.
        lr: peak learning rate; the paper's rule, 1e-4 for every 32 videos a step, unless given.
        weight_decay: except of norms and biases.
        warmup: share of the training in which the learning rate rises.
        clip_grad: largest norm of the gradient.
        label_smoothing: share of the target spread over all classes.
        mixed_precision: "no", "fp16" or "bf16"; "auto" is bf16 on a GPU that has it, else no.
        grad_checkpointing: blocks to recompute in the backward pass, of each of the four stages.
        sync_batchnorm: BatchNorm statistics over all processes; the paper's are of each.
        workers: processes that read videos; one a core, 8 at most, unless given.
        decoder: "decord", "torchcodec" or "pyav".
        timeout: seconds that reading one video may take.
        checkpoint_every: steps between checkpoints within an epoch; 0 for one an epoch.
        keep: checkpoints to keep.
        seed: of everything random.
        manifest: of `uniformer scan`; videos it could not read are left out.
        trackers: of accelerate, as in ["tensorboard", "wandb"].

    Raises:
        ValueError: a value is out of its range.
    """

    data: str
    val: str | None = None
    root: str | None = None
    labels: str | None = None
    out: str = "runs/train"
    model: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    pretrained: str | None = None
    fresh_head: bool = False
    input: InputConfig = field(default_factory=InputConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    epochs: int = 30
    batch_size: int = 8
    accumulate: int = 1
    lr: float | None = None
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip_grad: float = 20.0
    label_smoothing: float = 0.1
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    grad_checkpointing: tuple[int, int, int, int] = (0, 0, 0, 0)
    sync_batchnorm: bool = False
    workers: int | None = None
    decoder: str = "decord"
    timeout: float = 60.0
    checkpoint_every: int = 0
    keep: int = 2
    seed: int = 0
    manifest: str | None = None
    trackers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("lr", "clip_grad"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        for name in ("weight_decay", "checkpoint_every"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in 0..1, got {self.label_smoothing}")
        if fixed := {"num_classes", "in_channels"} & set(self.overrides):
            raise ValueError(f"overrides cannot hold {', '.join(fixed)}: the videos decide that")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be a share from 0 to below 1, got {self.warmup}")


# What may differ when a run goes on, without leading to other numbers.
FREE = ("out", "workers", "timeout", "keep", "trackers", "checkpoint_every")


def read_data(cfg: TrainConfig) -> tuple[VideoList, VideoList]:
    """The videos to train on, and those to validate on.

    Raises:
        ValueError: there are none, or they do not go together.
    """
    names = read_labels(cfg.labels) if cfg.labels else None
    videos = read_videos(cfg.data, "train", cfg.root, names)
    if cfg.val is None and not Path(cfg.data).is_dir():
        raise ValueError(f"{cfg.data} is a list of training videos: give the other one with --val")
    val = read_videos(cfg.val or cfg.data, "val", cfg.root, videos.classes)
    if videos.num_classes < 2:
        raise ValueError(f"{cfg.data} holds one class only: there must be two to tell apart")
    if not videos.samples or not val.samples:
        raise ValueError(
            f"{len(videos.samples)} videos to train on and {len(val.samples)} to validate on: of "
            f"each there must be some. A class of one video is never held out; give --val"
        )
    if val.num_classes > videos.num_classes:
        raise ValueError(
            f"validation has {val.num_classes} classes, training only {videos.num_classes}"
        )
    if cfg.val is None and videos.held_out:
        count = len(val.samples)
        log.info(
            "%s has no val folder: %d of its %d videos, a fifth of each class, are held out to "
            "validate", cfg.data, count, count + len(videos.samples),
        )  # fmt: skip
    if cfg.manifest:
        videos, left_out = drop_unreadable(videos, cfg.manifest)
        if not videos.samples:
            raise ValueError(f"{cfg.manifest}: not one of the training videos could be read")
        if left_out:
            log.info("%s: %d training videos are left out as unreadable", cfg.manifest, left_out)
    sided = [c for c in videos.classes or () if re.search(r"left|right", c, re.IGNORECASE)]
    if sided and cfg.augment.flip:
        log.warning(
            "clips are mirrored by chance, which may turn %r into another class: give "
            "--augment.flip 0 where sides matter", sided[0],
        )  # fmt: skip
    return videos, val


def precision(asked: str) -> str:
    """What "auto" means on this machine."""
    if asked != "auto":
        return asked
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


def make_model(cfg: TrainConfig, videos: VideoList) -> UniFormer:
    """The network to train, perhaps with weights; it knows its clips and classes.

    Raises:
        ValueError: no such network, or (CheckpointError) the weights do not fit it.
    """
    name, overrides = cfg.model or "uniformer_small", cfg.overrides
    if cfg.model is None and cfg.pretrained and Path(cfg.pretrained).is_file():
        trained = read_checkpoint(cfg.pretrained).model
        if trained is not None:
            overrides = {k: v for k, v in asdict(trained).items() if k != "num_classes"} | overrides
    pretrained = cfg.pretrained or "." in name  # a name with a tag names weights
    model = create_model(
        name, videos.num_classes, pretrained=pretrained, fresh_head=cfg.fresh_head, **overrides
    )
    _compare_input(cfg, model.input)
    model.input, model.classes = cfg.input, videos.classes
    if any(cfg.grad_checkpointing):
        model.set_grad_checkpointing(cfg.grad_checkpointing)
    if cfg.sync_batchnorm:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def _compare_input(cfg: TrainConfig, trained: InputConfig | None) -> None:
    """Weights fed with other colours than they know learn, but start from little."""
    for name in ("bgr", "mean", "std", "sampling", "frames", "stride", "size"):
        if trained and getattr(trained, name) != (now := getattr(cfg.input, name)):
            log.log(
                logging.WARNING if name in ("bgr", "mean", "std") else logging.INFO,
                "%s was trained with %s=%s, this run has %s: perhaps give --input.%s too",
                cfg.pretrained or cfg.model, name, getattr(trained, name), now, name,
            )  # fmt: skip


def settings_of(cfg: TrainConfig, lr: float) -> dict[str, Any]:
    """The settings as JSON has them, which `--config` reads."""
    return json.loads(json.dumps(asdict(cfg) | {"lr": lr}))


def fingerprint(processes: int, *lists: VideoList) -> dict[str, Any]:
    """What else decides the numbers of a run."""
    videos = hashlib.sha256(repr([v.samples for v in lists]).encode()).hexdigest()[:16]
    return {"processes": processes, "videos": videos}

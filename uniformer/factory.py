"""Models by name, with or without weights."""

import fnmatch
import os
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

from uniformer.checkpoint import Checkpoint, CheckpointError, load_weights, read_checkpoint
from uniformer.configs import PRESETS, UniFormerConfig
from uniformer.model import UniFormer
from uniformer.pretrained import ZOO, fetch, find_weights

__all__ = ["create_model", "list_models", "load_model", "open_model"]

# Settings that the shapes of the weights do not show, or that change what they compute.
ARCHITECTURE = (
    "depths", "dims", "head_dim", "mlp_ratio", "stages", "tube_size", "dpe", "split", "std",
    "in_channels", "qkv_bias", "qk_scale",
)  # fmt: skip


def list_models(pattern: str = "*") -> list[str]:
    """Names of the presets, for `create_model`.

    Args:
        pattern: shell wildcards, as in "*small*".
    """
    return fnmatch.filter(PRESETS, pattern)


def configure(preset: str, overrides: Mapping[str, Any]) -> UniFormerConfig:
    """A preset, perhaps changed.

    Raises:
        ValueError: no such preset or setting, or a setting out of its range.
    """
    if preset not in PRESETS:
        raise ValueError(f"no model is named {preset!r}; there are {', '.join(PRESETS)}")
    settings = {f.name for f in fields(UniFormerConfig)}
    if unknown := set(overrides) - settings:
        raise ValueError(
            f"no such setting: {', '.join(sorted(unknown))}; there are "
            f"{', '.join(sorted(settings))}"
        )
    return replace(PRESETS[preset], **overrides)


def create_model(
    name: str,
    num_classes: int | None = None,
    drop_path_rate: float | None = None,
    pretrained: bool | str | os.PathLike = False,
    *,
    fresh_head: bool = False,
    inflate: Literal["average", "center"] = "average",
    **overrides: Any,
) -> UniFormer:
    """Build a preset, perhaps changed, perhaps with weights.

    Args:
        name: one of `list_models()`, or with a tag, as in "uniformer_small.k400_16x4", which
            `pretrained=True` then means.
        num_classes: 400, or those of the weights, unless given; 0 for no classifier.
        drop_path_rate: the paper's for the preset unless given.
        pretrained: a checkpoint: the path of a file (video or image, official or our own), or a
            tag of `list_pretrained()`.
        fresh_head: draw a new classifier instead of loading the checkpoint's, to fine-tune.
        inflate: how kernels of image weights become 3-D.
        overrides: any other field of `UniFormerConfig`, as in `stages="LGGG"`.

    Returns:
        The model, in training mode as PyTorch's modules are.

    Raises:
        ValueError: no such preset or setting, or a setting out of its range.
        CheckpointError: the weights cannot be had, or do not fit; it says why.
    """
    preset, _, tag = name.partition(".")
    if name in ZOO:
        find_weights(preset, tag)  # says which of the released models are not built
    configure(preset, overrides)
    if tag and pretrained is not True:
        raise ValueError(
            f"{name!r} names weights: pass pretrained=True with it, or just {preset!r}"
        )
    if pretrained is True and not tag:
        raise ValueError(
            "pretrained=True needs a tag in the name, as in 'uniformer_small.k400_16x8'; or pass "
            "the tag or the path of a file as pretrained"
        )
    if drop_path_rate is not None:
        overrides["drop_path_rate"] = drop_path_rate

    checkpoint = None
    if pretrained:
        checkpoint = find_checkpoint(preset, tag if pretrained is True else pretrained)
        if num_classes is None and not fresh_head:
            num_classes = _num_classes(checkpoint)
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    cfg = configure(preset, overrides)
    if checkpoint is None:
        return UniFormer(cfg)
    if checkpoint.model is not None:
        _check_architecture(cfg, checkpoint.model, str(pretrained))
    return _fill(UniFormer(cfg), checkpoint, str(pretrained), fresh_head, inflate)


def load_model(path: str | os.PathLike) -> UniFormer:
    """Rebuild a model from one of our own checkpoints, which says what it is.

    Args:
        path: a .safetensors file of `save_checkpoint`.

    Returns:
        The model, in training mode as PyTorch's modules are; `input` and `classes` are set.

    Raises:
        CheckpointError: the file does not say which network its weights belong to, or is damaged.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.model is None:
        raise CheckpointError(
            f"{path} holds weights only: name the network they belong to (--model), as in "
            f"create_model('uniformer_small', pretrained={str(path)!r})"
        )
    return _fill(UniFormer(checkpoint.model), checkpoint, str(path))


def open_model(source: str, name: str | None = None) -> UniFormer:
    """A trained model from whatever a user may have of it.

    Args:
        source: a file of ours, the name of a released checkpoint, or any other file of weights.
        name: the preset that the weights belong to, for the last.

    Returns:
        The model, with its weights.

    Raises:
        ValueError: it is none of these, or (CheckpointError) is unusable.
    """
    if not Path(source).is_file() and source in ZOO:
        return create_model(source, pretrained=True)
    if name is not None:
        return create_model(name, pretrained=source)
    if not Path(source).is_file():
        raise CheckpointError(
            f"{source!r} is neither a file nor the name of a released checkpoint, of which there "
            f"are {', '.join(list(ZOO)[:3])} and {len(ZOO) - 3} more: uniformer info --zoo"
        )
    return load_model(source)


def _fill(
    model: UniFormer,
    checkpoint: Checkpoint,
    source: str,
    fresh_head: bool = False,
    inflate: Literal["average", "center"] = "average",
) -> UniFormer:
    load_weights(model, checkpoint.weights, fresh_head=fresh_head, inflate=inflate, source=source)
    model.input = checkpoint.input
    model.classes = None if fresh_head else checkpoint.classes
    return model


def find_checkpoint(preset: str, source: str | os.PathLike) -> Checkpoint:
    """Read a file, or a released checkpoint by its tag, with what the zoo knows of the latter."""
    if Path(source).is_file() or Path(source).suffix in (".pth", ".pyth", ".pt", ".safetensors"):
        return read_checkpoint(source)
    weights = find_weights(preset, str(source))
    checkpoint = read_checkpoint(fetch(weights))
    checkpoint.model = replace(
        PRESETS[weights.model], head_dim=weights.head_dim, num_classes=weights.num_classes
    )
    checkpoint.input, checkpoint.classes = weights.input, weights.classes
    return checkpoint


def _num_classes(checkpoint: Checkpoint) -> int | None:
    head = checkpoint.weights.get("head.weight")
    return head.shape[0] if head is not None and head.ndim == 2 else None


def _check_architecture(cfg: UniFormerConfig, trained: UniFormerConfig, source: str) -> None:
    """Equal shapes are not enough: another head_dim fits them, and computes something else."""
    asked, has = asdict(cfg), asdict(trained)
    differ = [f"{k}={has[k]!r}, not {asked[k]!r}" for k in ARCHITECTURE if asked[k] != has[k]]
    if differ:
        raise CheckpointError(f"{source} was trained with {'; '.join(differ)}: ask for the same")

"""Weights on disk: the official containers as they are, and our own, which explain themselves.

The official files are pickles: a flat state_dict, or one under 'model', 'model_state' or
'state_dict', perhaps with every key prefixed 'module.'. They are read without running any code of
theirs. Ours are safetensors whose header holds the network, the clips it expects and the names of
the classes, so that a file alone is enough to predict.
"""

import argparse
import json
import os
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from uniformer.configs import InputConfig, UniFormerConfig
from uniformer.model import UniFormer

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "inflate_weight",
    "load_weights",
    "read_checkpoint",
    "save_checkpoint",
]

CONTAINERS = ("model", "model_state", "state_dict")
PREFIXES = ("module.", "_orig_mod.")  # left behind by DistributedDataParallel and torch.compile
HEADER = "uniformer"
ZIP_OR_PICKLE = (b"PK", b"\x80\x02")  # how torch.save starts a file, now and before 1.6
SHOWN = 8  # keys of each kind that an error prints; its attributes hold them all


class CheckpointError(ValueError):
    """A file is no checkpoint, or does not fit the model.

    Attributes:
        missing: keys of the model that the checkpoint lacks.
        unexpected: keys of the checkpoint that the model lacks.
        mismatched: keys whose shapes differ, with both shapes.
    """

    def __init__(
        self,
        message: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        mismatched: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.missing, self.unexpected = list(missing), list(unexpected)
        self.mismatched = list(mismatched)


@dataclass
class Checkpoint:
    """What a file holds. An official file holds the weights only.

    Attributes:
        weights: the state_dict.
        model: the network they belong to.
        input: the clips they expect.
        classes: names, in the order of the logits.
    """

    weights: dict[str, Tensor] = field(repr=False)
    model: UniFormerConfig | None = None
    input: InputConfig | None = None
    classes: list[str] | None = None


# --- Reading --------------------------------------------------------------------------


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint, on the CPU; the file's contents are never executed.

    Args:
        path: safetensors, or a pickle of `torch.save` (.pth, .pyth, .pt), told apart by content.

    Returns:
        The weights, and what the file says of them.

    Raises:
        CheckpointError: no such file, damaged, no state_dict in it, or code in it.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path}")
    try:
        if _is_safetensors(path):
            return _read_safetensors(path)
        # The official files hold training arguments. An open file, for torch goes by its name.
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        pattern = r"unsupported (?:global|class):? (?:GLOBAL )?(\S+)"
        wants = re.search(pattern, str(error), re.IGNORECASE)
        if wants is None:
            raise CheckpointError(f"{path} is not a checkpoint, or is damaged") from error
        raise CheckpointError(
            f"{path} was refused: loading it would run code, which a file of weights need not do "
            f"({wants[1]}). If you trust its origin, load it yourself with torch.load and "
            f"save its state_dict() alone"
        ) from error
    except (
        SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError,
        AttributeError,
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"{path} is not a checkpoint, or is damaged ({_first_line(error)})"
        ) from error
    return Checkpoint(_unwrap(content, path))


def _is_safetensors(path: Path) -> bool:
    """A length, and the JSON object that is so long."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" or (path.suffix == ".safetensors" and start[:2] not in ZIP_OR_PICKLE)


def _read_safetensors(path: Path) -> Checkpoint:
    with safe_open(path, framework="pt") as file:
        header = (file.metadata() or {}).get(HEADER)
    weights = _unwrap(load_file(path), path)
    if header is None:
        return Checkpoint(weights)
    about = json.loads(header)
    model = UniFormerConfig(**_known(UniFormerConfig, about["model"], path))
    input, classes = about.get("input"), about.get("classes")
    if classes is not None and (
        not isinstance(classes, list)
        or len(classes) != model.num_classes
        or not all(isinstance(c, str) for c in classes)
    ):
        raise CheckpointError(
            f"{path} is damaged: it must name {model.num_classes} classes, it has {classes!r:.100}"
        )
    return Checkpoint(
        weights, model, InputConfig(**_known(InputConfig, input, path)) if input else None, classes
    )


def _known(cls: type, values: dict, path: Path) -> dict:
    unknown = set(values) - {f.name for f in fields(cls)}
    if unknown:
        raise CheckpointError(
            f"{path} was written by a newer version of uniformer: this one does not know its "
            f"settings {', '.join(sorted(unknown))}. Upgrade uniformer to read it"
        )
    return values


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    """The state_dict in `content`, without wrapper and prefixes."""
    if isinstance(content, Mapping):
        content = next(
            (content[k] for k in CONTAINERS if isinstance(content.get(k), Mapping)), content
        )
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        found = (
            f"the keys {list(content)[:SHOWN]}" if isinstance(content, Mapping) else type(content)
        )
        raise CheckpointError(
            f"{path} holds no state_dict: it must be one, or hold one under "
            f"{', '.join(CONTAINERS)}; found {found}"
        )
    weights = {str(k): v for k, v in content.items()}
    while prefix := _common_prefix(weights):
        weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    return weights


def _common_prefix(keys: Iterable[str]) -> str | None:
    """One of PREFIXES that all keys have."""
    return next((p for p in PREFIXES if keys and all(k.startswith(p) for k in keys)), None)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


# --- Loading into a model -------------------------------------------------------------


def inflate_weight(
    weight: Tensor, time: int, how: Literal["average", "center"] = "average"
) -> Tensor:
    """Turn a 2-D kernel into a 3-D one that answers a still clip as the 2-D one does its image.

    Args:
        weight: (O, I, kh, kw).
        time: kt.
        how: "average", every frame gets 1/kt of the weight, as the official code does; "center",
            the middle frame gets all of it.

    Returns:
        (O, I, kt, kh, kw).

    Raises:
        ValueError: `how` is neither.
    """
    if how == "average":
        return weight.unsqueeze(2).expand(-1, -1, time, -1, -1) / time
    if how == "center":
        inflated = weight.new_zeros(*weight.shape[:2], time, *weight.shape[2:])
        inflated[:, :, time // 2] = weight
        return inflated
    raise ValueError(f"inflate must be 'average' or 'center', got {how!r}")


def load_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    fresh_head: bool = False,
    inflate: Literal["average", "center"] = "average",
    source: str = "the checkpoint",
) -> None:
    """Copy `weights` into `model`; every key must fit, or nothing is changed.

    Args:
        model: a UniFormer.
        weights: a state_dict; 2-D convolutions (image weights) are inflated to 3-D.
        fresh_head: leave the classifier as it was drawn, whatever `weights` hold of it. A model
            without a classifier (num_classes=0) never takes one.
        inflate: see `inflate_weight`.
        source: what to call `weights` in an error.

    Raises:
        CheckpointError: keys are missing, unexpected or of another shape; it lists them.
    """
    for key, value in weights.items():
        if not _is_dense(value):
            raise CheckpointError(f"{source} must hold dense real tensors; {key} is none")
    target = model.state_dict()
    headless = not any(k.startswith("head.") for k in target)
    ready = {}
    for key, value in weights.items():
        if key.startswith("head.") and (fresh_head or headless):
            continue
        if key in target and value.ndim == 4 and target[key].ndim == 5:
            value = inflate_weight(value, target[key].shape[2], inflate)
        ready[key] = value
    if fresh_head:
        ready |= {k: v for k, v in target.items() if k.startswith("head.")}

    missing = [k for k in target if k not in ready]
    unexpected = [k for k in ready if k not in target]
    mismatched = [
        f"{k} {tuple(v.shape)} instead of {tuple(target[k].shape)}"
        for k, v in ready.items()
        if k in target and v.shape != target[k].shape
    ]
    if missing or unexpected or mismatched:
        raise CheckpointError(
            _misfit(source, missing, unexpected, mismatched), missing, unexpected, mismatched
        )
    model.load_state_dict(ready)


def _is_dense(value: object) -> bool:
    dense = isinstance(value, Tensor) and value.layout == torch.strided
    return dense and not value.is_meta and not value.is_complex()  # type: ignore[attr-defined]


def _misfit(source: str, missing: list[str], unexpected: list[str], mismatched: list[str]) -> str:
    lines = [f"{source} does not fit the model, which was left as it was:"]
    for what, keys in (
        ("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched),
    ):  # fmt: skip
        if keys:
            more = f", and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            lines.append(f"  {len(keys)} {what}: {', '.join(keys[:SHOWN])}{more}")
    keys = missing + unexpected + [k.split()[0] for k in mismatched]
    if all(k.startswith("head.") for k in keys):
        lines.append(
            "  Only the classifier differs: pass fresh_head=True (--fresh_head) for a new one, to "
            "fine-tune, or the num_classes of the checkpoint."
        )
    elif any(k.startswith("backbone.") for k in unexpected):
        lines.append(
            "  Keys under 'backbone.' are mmaction2's port, whose classes are in another order: "
            "use the official file."
        )
    return "\n".join(lines)


# --- Writing --------------------------------------------------------------------------


def save_checkpoint(
    path: str | os.PathLike, model: UniFormer, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write a checkpoint that explains itself, whole or not at all.

    Args:
        path: ends in .safetensors.
        model: its network, the clips it expects and its classes go into the file's header.
        weights: its state_dict, unless `model.state_dict()` is it (as when it is sharded).

    Raises:
        ValueError: the path ends otherwise.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"the path must end in .safetensors, got {path}")
    about = {
        "model": asdict(model.cfg),
        "input": asdict(model.input) if model.input else None,
        "classes": model.classes,
    }
    weights = model.state_dict() if weights is None else weights
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(
            {k: v.detach().contiguous().cpu() for k, v in weights.items()},
            partial,
            {HEADER: json.dumps(about)},  # one key: the order of several is not the same each time
        )
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)  # safetensors writes for the owner alone
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

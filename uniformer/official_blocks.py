"""Blocks of UniFormers written as the official code writes them, run by this library's own.

Such networks are found in the official repository, in mmaction2 and in many a copy of either. Their
blocks take and give (B, C, T, H, W), and hold layers under the names that this library took over
with the official state_dicts. So a block can be given our classes where it stands: its parameters,
buffers and hooks stay, and so do all references to it.
"""

from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from uniformer.depthwise import DepthwiseConv3d, why_not
from uniformer.global_block import GlobalBlock, SplitBlock
from uniformer.layers import (
    DPE,
    FFN,
    DepthwiseConv,
    DropPath,
    GlobalMHRA,
    Pointwise,
    why_not_around,
)
from uniformer.local_block import LocalBlock

__all__ = [
    "GlobalBlockNCTHW", "Kind", "LocalBlockNCTHW", "SplitBlockNCTHW", "convert", "kind_of",
    "misfits",
]  # fmt: skip


class _NCTHW(nn.Module):
    """A block between neighbours that take and give (B, C, T, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, T, H, W) -> the same shape, in channels_last_3d memory.

        Raises:
            ValueError: x has not five axes.
        """
        if x.ndim != 5:
            raise ValueError(f"x must be (B, C, T, H, W), got shape {tuple(x.shape)}")
        return super().forward(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class LocalBlockNCTHW(_NCTHW, LocalBlock):
    """An official CBlock on this library's kernels, made of one by `kernelize`."""


class GlobalBlockNCTHW(_NCTHW, GlobalBlock):
    """An official SABlock on this library's kernels, made of one by `kernelize`."""


class SplitBlockNCTHW(_NCTHW, SplitBlock):
    """An official SplitSABlock on this library's kernels, made of one by `kernelize`."""


Kind = type[LocalBlockNCTHW] | type[GlobalBlockNCTHW] | type[SplitBlockNCTHW]

_NORMS: dict[Kind, tuple[str, ...]] = {
    LocalBlockNCTHW: ("norm1", "norm2"),
    GlobalBlockNCTHW: ("norm1", "norm2"),
    SplitBlockNCTHW: ("norm1", "norm2", "t_norm"),
}
_AGGREGATORS: dict[Kind, tuple[str, ...]] = {
    LocalBlockNCTHW: ("conv1", "attn", "conv2"),
    GlobalBlockNCTHW: ("attn",),
    SplitBlockNCTHW: ("attn", "t_attn"),
}
_CONV = (nn.Conv3d, DepthwiseConv3d)
_LINEAR = (nn.Linear,)
_DROPOUT = (nn.Dropout,)
_MACHINERY = {name for name, value in vars(nn.Module).items() if isinstance(value, FunctionType)}
_MACHINERY -= {"__init__", "__repr__", "extra_repr", "forward"}


def kind_of(module: nn.Module) -> Kind | None:
    """What a module would become by the names of what it holds, or None; ours are none."""
    names = {name for name, _ in module.named_children()}
    if isinstance(module, LocalBlock | GlobalBlock) or not _children(GlobalBlockNCTHW) <= names:
        return None
    if names & {"conv1", "conv2"}:
        return LocalBlockNCTHW
    return SplitBlockNCTHW if names & {"t_norm", "t_attn"} else GlobalBlockNCTHW


def convert(block: Any, kind: Kind) -> None:
    """Make a block without misfits one of ours, in place.

    Its stochastic depth becomes our `DropPath`, with its rate in `drop_path.rate`, and the dropout
    of affinities a number, `attn.attn_drop`. `mlp.act` stays, and is not called.
    """
    drop_path = DropPath(getattr(block.drop_path, "drop_prob", 0.0))
    block.drop_path = drop_path.train(block.drop_path.training)
    block.pos_embed.__class__ = DPE
    block.mlp.__class__ = FFN
    if kind is LocalBlockNCTHW:
        block.attn.__class__ = DepthwiseConv
        for conv in (block.conv1, block.conv2, block.mlp.fc1, block.mlp.fc2):
            conv.__class__ = Pointwise
    else:
        for name in _AGGREGATORS[kind]:
            attn = getattr(block, name)
            rate = attn.attn_drop.p
            del attn.attn_drop
            attn.attn_drop = rate
            attn.__class__ = GlobalMHRA
    block.__class__ = kind


# --- What it must hold ----------------------------------------------------------------


def misfits(block: Any, kind: Kind) -> Iterator[str]:
    """What sets a block apart from the official one; each presumes that nothing before it does."""
    yield from _as_it_was_made(block)
    yield from _holds_only(block, "it", kind, _children(kind))
    local = kind is LocalBlockNCTHW
    norm = (nn.BatchNorm3d, nn.SyncBatchNorm) if local else (nn.LayerNorm,)
    types: dict[str, tuple[type, ...]] = {
        "pos_embed": _CONV, **dict.fromkeys(_NORMS[kind], norm),
        "drop_path": (type(block.drop_path),), "mlp": (type(block.mlp),),
    }  # fmt: skip
    for name in _AGGREGATORS[kind]:
        types[name] = _CONV if local else (type(getattr(block, name)),)
    yield from _known(block, "", types)
    yield from _drop_path(block.drop_path)

    dim = block.pos_embed.in_channels
    yield from _depthwise("pos_embed", block.pos_embed, dim)
    for name in _NORMS[kind]:
        yield from _norm(name, getattr(block, name), dim)
    if local:
        yield from _mixing("conv1", block.conv1, dim, dim)
        yield from _depthwise("attn", block.attn, dim)
        yield from _mixing("conv2", block.conv2, dim, dim)
    else:
        for name in _AGGREGATORS[kind]:
            yield from _attention(name, getattr(block, name), dim)
    yield from _mlp(block.mlp, dim, _CONV if local else _LINEAR)


def _children(kind: Kind) -> set[str]:
    return {"pos_embed", *_NORMS[kind], *_AGGREGATORS[kind], "drop_path", "mlp"}


def _as_it_was_made(block: nn.Module) -> Iterator[str]:
    if "forward" in vars(block):
        yield "its forward has been replaced"
    for module in block.modules():
        if is_parametrized(module):
            yield "it is parametrized: kernelize first, then parametrize"
        if module._compiled_call_impl is not None:
            yield "it is compiled: kernelize first, then compile"
    for name, parameter in block.named_parameters():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            yield f"{name} is a {type(parameter).__name__} of {parameter.dtype}"


def _holds_only(part: nn.Module, name: str, future: type, children: set[str]) -> Iterator[str]:
    tensors = {**part._parameters, **part._buffers}
    held = {n for n, t in tensors.items() if t is not None}
    held |= {n for n, _ in part.named_children()} - children
    if held:
        yield f"{name} has {_listed(held)}, unlike the official block"
    if lacking := children - {n for n, _ in part.named_children()}:
        yield f"{name} has no {_listed(lacking)}, unlike the official block"
    if overridden := {n for n in _MACHINERY if getattr(type(part), n) is not getattr(nn.Module, n)}:
        yield f"{name} has a {_listed(overridden)} of its own"
    methods = set(dir(future)) - set(dir(nn.Module))
    if hiding := vars(part).keys() & methods:
        yield f"{name} has an attribute {_listed(hiding)}, a method of {future.__name__}"


def _listed(names: set[str]) -> str:
    return " and ".join(sorted(names))


def _known(part: nn.Module, prefix: str, types: dict[str, tuple[type, ...]]) -> Iterator[str]:
    if why := why_not_around(part, **types):
        yield prefix + why


def _drop_path(drop_path: nn.Module) -> Iterator[str]:
    if type(drop_path) is nn.Identity:
        return
    rate = getattr(drop_path, "drop_prob", None)
    if not isinstance(rate, float | int) or not 0 <= rate < 1:
        yield f"drop_path is a {type(drop_path).__name__} with drop_prob {rate}: not from 0 to 1"
    if list(drop_path.children()) or drop_path.state_dict():
        yield f"drop_path is {drop_path}, which holds more than a rate"


def _depthwise(name: str, conv: nn.Conv3d, dim: int) -> Iterator[str]:
    if why := why_not(conv):
        yield f"{name} has {why}"
    if conv.in_channels != dim:
        yield f"{name} has {conv.in_channels} channels, and pos_embed {dim}"


def _mixing(name: str, layer: Any, dim: int, out_dim: int) -> Iterator[str]:
    """A 1x1x1 convolution or a Linear."""
    if isinstance(layer, nn.Linear):
        fits = (layer.in_features, layer.out_features) == (dim, out_dim)
    else:
        form = (layer.kernel_size, layer.stride, layer.padding, layer.groups)
        fits = form == ((1, 1, 1), (1, 1, 1), (0, 0, 0), 1)
        fits = fits and (layer.in_channels, layer.out_channels) == (dim, out_dim)
    if not fits:
        yield f"{name} is {layer}: it does not take {dim} channels of a token and give {out_dim}"


def _norm(name: str, norm: Any, dim: int) -> Iterator[str]:
    shape = (norm.num_features,) if hasattr(norm, "num_features") else norm.normalized_shape
    if shape != (dim,) or norm.weight is None or norm.bias is None:
        yield f"{name} is {norm}: it does not scale and shift {dim} channels"


def _attention(name: str, attn: Any, dim: int) -> Iterator[str]:
    yield from _holds_only(attn, name, GlobalMHRA, {"qkv", "attn_drop", "proj", "proj_drop"})
    drops = {"attn_drop": _DROPOUT, "proj_drop": _DROPOUT}
    yield from _known(attn, f"{name}.", {"qkv": _LINEAR, "proj": _LINEAR, **drops})
    yield from _mixing(f"{name}.qkv", attn.qkv, dim, 3 * dim)
    yield from _mixing(f"{name}.proj", attn.proj, dim, dim)
    heads, scale = getattr(attn, "num_heads", None), getattr(attn, "scale", None)
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        yield f"{name}.num_heads is {heads}: {dim} channels are not a multiple of it"
    if not isinstance(scale, float | int):
        yield f"{name}.scale is a {type(scale).__name__}: not a number"
    if attn.attn_drop.p == 1:
        yield f"{name}.attn_drop drops all"


def _mlp(mlp: Any, dim: int, types: tuple[type, ...]) -> Iterator[str]:
    yield from _holds_only(mlp, "mlp", FFN, {"fc1", "act", "fc2", "drop"})
    layers = {"fc1": types, "fc2": types}
    yield from _known(mlp, "mlp.", {**layers, "act": (nn.GELU,), "drop": _DROPOUT})
    hidden = mlp.fc1.weight.shape[0]
    yield from _mixing("mlp.fc1", mlp.fc1, dim, hidden)
    yield from _mixing("mlp.fc2", mlp.fc2, hidden, dim)
    if mlp.act.approximate != "none":
        yield f"mlp.act is {mlp.act}: not the exact GELU"

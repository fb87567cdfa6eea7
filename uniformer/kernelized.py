"""`kernelize`: this library's kernels for any network, in place.

Depthwise convolutions are replaced in all networks: X3D, CSN, MViT's pooling, your own. Where the
network is a UniFormer written as the official code writes it, whole blocks are, which share their
passes over memory.
"""

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from uniformer.depthwise import DepthwiseConv3d, why_not
from uniformer.layers import DepthwiseConv, DropPath
from uniformer.official_blocks import Kind, convert, kind_of, misfits
from uniformer_kernels import backend

__all__ = ["KernelizeReport", "kernelize"]


@dataclass
class KernelizeReport:
    """What `kernelize` did.

    Attributes:
        blocks: names of the UniFormer blocks that now run on the kernels, as wholes.
        convolutions: names of the convolutions outside of those that now do.
        left: why each of the other such blocks and grouped convolutions does not.
    """

    blocks: list[str] = field(default_factory=list)
    convolutions: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"replaced {len(self.blocks)} UniFormer blocks and {len(self.convolutions)} "
            f"depthwise convolutions"
        ]
        lines += [f"  left {name}: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def kernelize(model: nn.Module) -> KernelizeReport:
    """Let the UniFormer blocks and depthwise `nn.Conv3d` of a model run on this library's kernels.

    Blocks are known by what they hold, whatever their classes are called: CBlock, SABlock and
    SplitSABlock of the official code and of mmaction2, with any eps, tube size, number of heads
    and dropout. One is replaced only if it also computes what ours does, which is tried on a copy
    with random numbers; in the others, convolutions alone are.

    All happens in place. Parameters and buffers stay the same objects under the same names, so
    that optimizers and state_dicts keep working, and so do hooks on whole blocks; a block with
    hooks further in is left. Parts of a replaced block take channels-last tensors, (B, T, H, W, C):
    a model that calls them on its own is not to be kernelized. The block's class is ours then:
    `isinstance` and methods of its own are gone, and the rate of its stochastic depth is
    `drop_path.rate`. torch.jit.trace and torch.export take what comes out, torch.jit.script does
    not; gradients of gradients are to be taken under `uniformer_kernels.backend("reference")`.

    Blocks give channels_last_3d memory, which the next one takes as it is. Convolutions alone keep
    the caller's: `model.to(memory_format=torch.channels_last_3d)` and a clip likewise spare each
    of them two copies.

    Args:
        model: any module, of any dtype, on any device; it may be a block or a convolution itself.

    Returns:
        What was replaced, and why each other such block and grouped convolution was not.
    """
    report = KernelizeReport()
    uses = Counter(id(m) for parent in model.modules() for m in parent._modules.values())
    for name, module in list(model.named_modules()):
        if kind := kind_of(module):
            name = name or "the model itself"
            if why := _why_not_block(module, kind, uses):
                report.left[name] = why
            else:
                convert(module, kind)
                report.blocks.append(name)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv3d) or module.groups == 1:
            continue
        name = name or "the model itself"
        if is_parametrized(module) and type_before_parametrizations(module) is nn.Conv3d:
            report.left[name] = "it is parametrized: kernelize first, then parametrize"
        elif type(module) is not nn.Conv3d:
            if not isinstance(module, DepthwiseConv3d | DepthwiseConv):
                report.left[name] = f"it is a {type(module).__name__}, with a forward of its own"
        elif why := why_not(module):
            report.left[name] = why
        else:
            module.__class__ = DepthwiseConv3d
            report.convolutions.append(name)
    return report


def _why_not_block(block: nn.Module, kind: Kind, uses: Counter[int]) -> str | None:
    """Why a block is not to be converted, or None."""
    if why := next(misfits(block, kind), None):
        return why
    for name, part in block.named_modules():
        if name and uses[id(part)] > 1 and list(part.parameters()):
            return f"{name} is part of another module, too"
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), backend("reference"):
            return _on_trial(block, kind)
    except Exception as error:  # whatever a forward that nobody knows may raise
        first, _, _ = str(error).partition("\n")
        return f"a trial of its forward ended in {type(error).__name__}: {first}"


# --- Whether it computes what ours does -----------------------------------------------

# B, T, H, W: few tokens, and yet clips, frames, rows and columns are more than one.
TRIAL = (2, 2, 2, 3)
EXACT = 1e-9  # of the largest value, in fp64; forwards that differ do so by far more


class _MarkedDropPath(DropPath):
    """Scales every sample by a number of its own, so that what is a sample shows."""

    def draw(self, x: Tensor) -> Tensor:
        return torch.linspace(0.5, 2, len(x), dtype=x.dtype, device=x.device)


class _MarkedDropout(nn.Dropout):
    """Doubles, so that where dropout is shows."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * input


class _SeenDropout(nn.Dropout):
    """Sees whether what it is to drop are affinities, whose rows sum to 1."""

    seen = False

    def forward(self, input: Tensor) -> Tensor:
        ones = torch.ones(input.shape[:-1], dtype=input.dtype)
        self.seen = input.ndim == 4 and torch.allclose(input.sum(-1), ones)
        return input


def _on_trial(block: nn.Module, kind: Kind) -> str | None:
    """In which way a copy, in fp64 on the CPU, differs from itself once converted, or None."""
    torch.default_generator.manual_seed(0)
    theirs: Any = _copied(block)
    if why := _why_not_drop_path(theirs.drop_path):
        return why
    part: Any
    for name, part in theirs.named_modules():
        made_as: type = type(part)
        if made_as is nn.SyncBatchNorm:
            part.__class__ = nn.BatchNorm3d  # alone, not with those of other processes
        if made_as is nn.Dropout and part.p > 0:
            part.p = 0.0
            # That of affinities is a number in ours.
            part.__class__ = _SeenDropout if name.endswith("attn_drop") else _MarkedDropout
    ours = copy.deepcopy(theirs)
    convert(ours, kind)
    if ours.drop_path.rate > 0:
        theirs.drop_path = ours.drop_path = _MarkedDropPath()
    if list(theirs.state_dict()) != list(ours.state_dict()):
        return "its state_dict has keys of its own"
    if any(isinstance(part, _SeenDropout) for part in ours.modules()):
        return "dropout of affinities is elsewhere in it"
    clips, *grid = TRIAL
    x = _rand(clips, theirs.pos_embed.in_channels, *grid)
    for mode in ("eval", "training"):
        theirs.train(mode == "training")
        ours.train(mode == "training")
        want, got = theirs.forward(x.clone()), ours.forward(x.clone())
        if not isinstance(want, Tensor) or want.shape != x.shape:
            return f"its forward does not give a tensor of its input's shape, {tuple(x.shape)}"
        for a, b in zip([want, *theirs.buffers()], [got, *ours.buffers()], strict=True):
            if not (a - b).abs().max() <= EXACT * a.abs().max():
                return f"its forward gives other numbers than ours in {mode} mode"
    if any(isinstance(part, _SeenDropout) and not part.seen for part in theirs.modules()):
        return "it drops something else than affinities in attn_drop, or nothing"
    return None


def _copied(block: nn.Module) -> nn.Module:
    """A copy with random numbers, so that zeros hide nothing, and without hooks."""
    tensors = [*block.parameters(), *block.buffers()]
    memo: dict[int, Any] = {id(t): _random_like(t) for t in tensors}
    memo |= {id(hooks): OrderedDict() for hooks in _hooks(block)}
    return copy.deepcopy(block, memo)


def _hooks(block: nn.Module) -> Iterator[OrderedDict]:
    return (
        v for n, v in vars(block).items() if n.endswith("_hooks") and isinstance(v, OrderedDict)
    )


def _random_like(t: Tensor) -> Tensor:
    if not t.is_floating_point():
        return torch.zeros(t.shape, dtype=t.dtype, device="cpu")
    new = _rand(*t.shape)
    if t.ndim < 2:  # which may be a variance
        new += 0.5
    else:
        new = (new - 0.5) * (12 / t[0].numel()) ** 0.5
    return nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new


def _rand(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, device="cpu")  # whatever the default device


def _why_not_drop_path(drop_path: Any) -> str | None:
    """In which way what is found under this name is no stochastic depth, or None."""
    rate, rows = getattr(drop_path, "drop_prob", 0.0), 1024
    x = _rand(rows, 2, 3) + 1
    y = drop_path.train().forward(x.clone())
    kept = (y[:, :1, :1] != 0).double()
    spread = 6 * (rate * (1 - rate) / rows) ** 0.5
    if not torch.allclose(y, x * kept / (1 - rate)) or abs(1 - rate - kept.mean()) > spread:
        return f"drop_path does not drop whole samples at its rate, {rate}, and scale up the others"
    if not torch.equal(drop_path.eval().forward(x.clone()), x):
        return "drop_path is not the identity in eval mode"
    return None

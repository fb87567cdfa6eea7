"""The layers around the two operators, as FFN, patch embedding, and norms beside their neighbours.

Ours is what the network runs now; rivals are plain PyTorch in NCTHW and, on a GPU, torch.compile of
ours. Parameters are fp32 under autocast where the dtype has 16 bits, as in training.

Cost, with A elements of the input of C channels, s bytes each: an FFN of 4C hidden channels reads
and writes 2A forward and 3A backward if its hidden layer stays on chip, for 16 A C and 32 A C
operations. BatchNorm with batch statistics reads x once for them and once to apply them. The DPE
stores its sum and the norm of that, for 54 operations an element and some 8 of the norm. A patch
embedding reads its input and writes its output.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Case, Problem, Provider, truth_dtype
from benchmarks.machine import DTYPES, OURS
from benchmarks.shapes import Stage, stages
from uniformer.layers import DPE, FFN, PatchEmbed, Pointwise
from uniformer_kernels import Norm, channel_stats, dwconv3d_norm, pointwise


class Run(NamedTuple):
    """A module, how it is called, and the layout that the call takes and gives."""

    module: nn.Module
    forward: Callable[[Any, Tensor], Tensor]
    layout: torch.memory_format | None = None


def cases(batches: Sequence[int], dtypes: Sequence[str], tiny: bool = False) -> Iterator[Case]:
    for stage, batch, dtype in product(stages(tiny), batches, dtypes):
        yield from _cases(stage, batch, dtype)


def _cases(stage: Stage, batch: int, dtype: str) -> Iterator[Case]:
    size, C = DTYPES[dtype].itemsize, stage.C
    A = batch * stage.tokens * C
    cost = {
        "FFN": ((2 * A * size, 3 * A * size), (16 * A * C, 32 * A * C)),
        "DPE + LayerNorm": ((3 * A * size, 6 * A * size), (62 * A, 124 * A)),
        "BatchNorm + pointwise": ((3 * A * size, 4 * A * size), (2 * A * C, 4 * A * C)),
    }
    dim_in = {1: 3}.get(stage.number, C // 2)
    taps = 2 * 16 if stage.number == 1 else 4
    inputs = batch * stage.tokens * taps * dim_in
    embed = 2 * batch * stage.tokens * C * dim_in * taps
    cost["patch embedding"] = (
        ((inputs + A) * size, (2 * inputs + A) * size),
        (embed, 2 * embed),
    )
    local = stage.kind == "L"
    for op, (moved, flops) in cost.items():
        if op == ("DPE + LayerNorm" if local else "BatchNorm + pointwise"):
            continue
        yield Case(
            op, str(stage), stage.number, batch, dtype, partial(problem, op, stage, batch),
            bytes=moved, flops=flops, autocast=True,
            # Gradients before a LayerNorm all but cancel: in 16 bits every provider is 0.1 off.
            slack=6 if op == "patch embedding" and dtype != "fp32" else 1,
        )  # fmt: skip


def problem(op: str, stage: Stage, batch: int, device: str) -> Problem:
    torch.manual_seed(0)
    C = stage.C
    shape: tuple[int, ...] = (batch, stage.T, stage.H, stage.W, C)
    ours, plain = call, None
    module: nn.Module
    if op == "FFN":
        module = FFN(C, 4 * C, conv=stage.kind == "L")
        plain = _ffn_of_convolutions if stage.kind == "L" else None
    elif op == "DPE + LayerNorm":
        module = nn.Sequential(DPE(C), nn.LayerNorm(C, eps=1e-6))
        ours, plain = _dpe_norm, _convolution_norm
    elif op == "BatchNorm + pointwise":
        module = nn.Sequential(nn.BatchNorm3d(C), Pointwise(C, C))
        ours, plain = _batch_norm_pointwise, _batch_norm_convolution
    else:
        stem = stage.number == 1
        kernel, dim_in = ((2, 4, 4) if stem else (1, 2, 2)), (3 if stem else C // 2)
        shape = (batch, *(n * k for n, k in zip(shape[1:4], kernel, strict=True)), dim_in)
        module, plain = PatchEmbed(dim_in, C, kernel, kernel), _embedding
    rivals = {}
    if plain is not None:
        rivals["PyTorch NCTHW"] = Run(module, plain, torch.contiguous_format)
        rivals["PyTorch channels_last_3d"] = Run(module, plain, torch.channels_last_3d)
    return of_modules(Run(module, ours), rivals, torch.randn(shape, device=device))


def of_modules(ours: Run, rivals: Mapping[str, Run], x: Tensor) -> Problem:
    """A problem whose providers run modules, each a copy of its own."""
    device = x.device.type

    def provider(run: Run, dtype: torch.dtype = torch.float32, compiled: bool = False) -> Provider:
        module = copy.deepcopy(run.module).to(device, dtype)
        call: Any = partial(run.forward, module)
        call = torch.compile(call) if compiled else call
        return Provider(lambda x, *_: call(x), list(module.parameters()), run.layout)

    providers = {OURS: provider(ours)} | {name: provider(run) for name, run in rivals.items()}
    if device == "cuda":
        # Compiled, a backward pass otherwise reuses what the forward kept, and runs but once.
        functorch_config.donated_buffer = False
        for name, run in {OURS: ours, **rivals}.items():
            providers[f"torch.compile of {name}"] = provider(run, compiled=True)
    wide = truth_dtype(device)
    return Problem(x, providers, provider(ours, wide), wide)


def call(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def _convolution(module: Any, x: Tensor) -> Tensor:
    return F.conv3d(x, module.weight, module.bias)


def _ffn_of_convolutions(module: Any, x: Tensor) -> Tensor:
    return _convolution(module.fc2, F.gelu(_convolution(module.fc1, x)))


def _dpe_norm(module: Any, x: Tensor) -> Tensor:
    """The norm alone: a block's residual takes the sum."""
    dpe, norm = module
    return dwconv3d_norm(
        x, dpe.weight, dpe.bias, norm.weight, norm.bias, eps=norm.eps, residual=True
    )[1]


def _convolution_norm(module: Any, x: Tensor) -> Tensor:
    """As tokens, which it takes and gives in the rivals' own layout."""
    dpe, norm = module
    x = x + F.conv3d(x, dpe.weight, dpe.bias, padding=1, groups=x.shape[1])
    return norm(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


def _batch_norm_pointwise(module: Any, x: Tensor) -> Tensor:
    """As in a local block, but for the statistics, which there come with x."""
    norm, conv = module
    known = Norm(channel_stats(x), norm.weight, norm.bias)
    return pointwise(x, conv.weight, conv.bias, norm=known)


def _batch_norm_convolution(module: Any, x: Tensor) -> Tensor:
    norm, pointwise = module
    return _convolution(pointwise, norm(x))


def _embedding(module: Any, x: Tensor) -> Tensor:
    """As in networks that keep (B, C, T, H, W): normalised as tokens, and turned back."""
    x = module.proj(x)
    tokens = module.norm(x.flatten(2).transpose(1, 2))
    return tokens.transpose(1, 2).reshape(x.shape)


def test_layers(microbenchmark):
    microbenchmark()

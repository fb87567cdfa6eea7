"""Depthwise 3-D convolution: the DPE of all four stages, the token affinity of the local ones.

The DPE is timed as the network has it, with its residual: x + dwconv(x).

Cost, in elements of the activation A and taps k^3: forward reads x and writes y, 2A, and takes
2 k^3 A operations; backward reads dy and x and writes dx, 3A, for twice as many. Weights are small.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, Problem, Provider, truth_dtype
from benchmarks.machine import DTYPES, OURS
from benchmarks.shapes import Stage, stages
from uniformer_kernels import backend, dwconv3d

NCTHW, CHANNELS_LAST = torch.contiguous_format, torch.channels_last_3d


def cases(batches: Sequence[int], dtypes: Sequence[str], tiny: bool = False) -> Iterator[Case]:
    """5x5x5 first: the network spends most there."""
    for k, some in ((5, stages(tiny)[:2]), (3, stages(tiny))):
        for stage, batch, dtype in product(some, batches, dtypes):
            elements = batch * stage.tokens * stage.C
            moved = elements * DTYPES[dtype].itemsize
            yield Case(
                "dwconv3d", f"{k}x{k}x{k} {stage}", stage.number, batch, dtype,
                partial(problem, stage, batch, dtype, k),
                bytes=(2 * moved, 3 * moved),
                flops=(2 * k**3 * elements, 4 * k**3 * elements),
                unit="fma",
            )  # fmt: skip


def problem(stage: Stage, batch: int, dtype: str, k: int, device: str) -> Problem:
    torch.manual_seed(0)
    shape = (batch, stage.T, stage.H, stage.W, stage.C)
    x = torch.randn(shape, device=device).to(DTYPES[dtype])
    weight = (torch.randn(stage.C, 1, k, k, k, device=device) / k**1.5).to(DTYPES[dtype])
    bias = torch.randn(stage.C, device=device).to(DTYPES[dtype])
    residual = k == 3

    def pytorch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.conv3d(x, weight, bias, padding=k // 2, groups=x.shape[1])
        return x + y if residual else y

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return dwconv3d(x, weight, bias, residual=residual)

    def in_cuda(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with backend("cuda"):
            return ours(x, weight, bias)

    parameters = [weight, bias]
    providers = {
        OURS: Provider(ours, parameters),
        "PyTorch NCTHW": Provider(pytorch, parameters, NCTHW),
        "PyTorch channels_last_3d": Provider(pytorch, parameters, CHANNELS_LAST),
    }
    if device == "cuda":
        providers["uniformer in CUDA C++"] = Provider(in_cuda, parameters)
    wide = truth_dtype(device)
    truth = Provider(pytorch, [p.detach().to(wide) for p in parameters], CHANNELS_LAST)
    return Problem(x, providers, truth, wide)


def test_dwconv3d(microbenchmark):
    microbenchmark()

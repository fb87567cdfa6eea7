"""Attention over all tokens of the clip, from a packed qkv, beside every backend of SDPA.

Cost, with A = B N h d elements: forward reads qkv and writes out, 4A; backward reads qkv, out and
dout and writes dqkv, 8A. Operations: 2 products of 2 N^2 d a head forward, 5 of them backward.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Case, Problem, Provider, truth_dtype
from benchmarks.machine import DTYPES, OURS
from benchmarks.shapes import Stage, stages
from uniformer_kernels import attention
from uniformer_kernels.attention import attention_ref

SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}


def cases(batches: Sequence[int], dtypes: Sequence[str], tiny: bool = False) -> Iterator[Case]:
    for stage, batch, dtype in product(stages(tiny)[2:], batches, dtypes):
        elements = batch * stage.tokens * stage.C
        moved = elements * DTYPES[dtype].itemsize
        gemm = 2 * elements * stage.tokens
        yield Case(
            "attention", f"N={stage.tokens} h={stage.heads} d={stage.C // stage.heads}",
            stage.number, batch, dtype, partial(problem, stage, batch, dtype),
            bytes=(4 * moved, 8 * moved), flops=(2 * gemm, 5 * gemm),
        )  # fmt: skip


def problem(stage: Stage, batch: int, dtype: str, device: str) -> Problem:
    torch.manual_seed(0)
    h = stage.heads
    qkv = torch.randn(batch, stage.tokens, 3 * stage.C, device=device).to(DTYPES[dtype])

    def sdpa(qkv: Tensor, kernel: SDPBackend) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, h, -1)).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    providers = {
        OURS: Provider(lambda qkv: attention(qkv, h)),
        "naive": Provider(lambda qkv: attention_ref(qkv, h)),
    }
    for name, kernel in SDPA.items():
        if device == "cuda" or kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            providers[name] = Provider(partial(sdpa, kernel=kernel))
    truth = Provider(lambda qkv: attention_ref(qkv, h))
    return Problem(qkv, providers, truth, truth_dtype(device))


def test_attention(microbenchmark):
    microbenchmark()

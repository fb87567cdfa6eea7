"""Attention over all tokens of the clip, from a packed qkv, beside every backend of SDPA.

Cost, with A = B N h d elements: forward reads qkv and writes out, 4A; backward reads qkv, out and
dout and writes dqkv, 8A. Operations: 2 products of 2 N^2 d a head forward, 5 of them backward.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Case, Problem, Provider
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


def cases(
    device: str, batches: Sequence[int], dtypes: Sequence[str], tiny: bool = False
) -> Iterator[Case]:
    for stage in stages(tiny)[2:]:
        for batch in batches:
            for dtype in dtypes:
                elements = batch * stage.tokens * stage.C
                moved = elements * DTYPES[dtype].itemsize
                product = 2 * elements * stage.tokens
                yield Case(
                    "attention", f"N={stage.tokens} h={stage.heads} d={stage.C // stage.heads}",
                    stage.number, batch, dtype, partial(problem, stage, batch, dtype),
                    bytes=(4 * moved, 8 * moved), flops=(2 * product, 5 * product),
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
    wide = torch.float64 if device == "cpu" else torch.float32
    return Problem(qkv, providers, Provider(lambda qkv: attention_ref(qkv, h)), wide)


def test_attention(microbenchmark):
    microbenchmark()

"""Whole blocks: DPE, MHRA and FFN with their norms and residuals.

Rivals are the blocks as plain PyTorch has them, `plain.py`, in both layouts, with naive attention
and with SDPA, and on a GPU torch.compile of them and of ours. Parameters are fp32 under autocast.

Cost in passes over the activation A, the fewest that the fused network could do with: a local
block 11A forward (DPE 2, pw1 2, dw5 2, pw2 3, FFN 2) and 22A backward; a global block 14A forward
(DPE + LayerNorm 3, qkv 4, attention 4, proj 3) plus 12A of its FFN, and twice that backward.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product

import torch
from torch import nn

from benchmarks.bench_layers import Run, call, of_modules
from benchmarks.harness import Case, Problem
from benchmarks.machine import DTYPES
from benchmarks.plain import PlainGlobalBlock, PlainLocalBlock
from benchmarks.shapes import PASSES, Stage, stages
from uniformer.configs import UniFormerConfig
from uniformer.model import GlobalBlock, LocalBlock


def cases(batches: Sequence[int], dtypes: Sequence[str], tiny: bool = False) -> Iterator[Case]:
    for stage, batch, dtype in product(stages(tiny), batches, dtypes):
        A, C, N = batch * stage.tokens * stage.C, stage.C, stage.tokens
        size, local = DTYPES[dtype].itemsize, stage.kind == "L"
        passes = PASSES[stage.kind]
        # DPE, two pointwise and the affinity, or qkv, proj and the two products; the FFN.
        mixing = 2 * C + 125 if local else 4 * C + 2 * N
        flops = 2 * A * (27 + mixing + 8 * C)
        yield Case(
            "local block" if local else "global block", str(stage), stage.number, batch,
            dtype, partial(problem, stage, batch),
            bytes=(passes * A * size, 2 * passes * A * size), flops=(flops, 2 * flops),
            autocast=True,
        )  # fmt: skip


def problem(stage: Stage, batch: int, device: str) -> Problem:
    torch.manual_seed(0)
    local = stage.kind == "L"
    cfg = UniFormerConfig(head_dim=stage.C // stage.heads, drop_path_rate=0.0)
    ours = (LocalBlock if local else GlobalBlock)(cfg, stage.C, 0.0)
    x = torch.randn(batch, stage.T, stage.H, stage.W, stage.C, device=device)

    def plain(sdpa: bool) -> nn.Module:
        if local:
            block: nn.Module = PlainLocalBlock(cfg, stage.C, 0.0)
        else:
            block = PlainGlobalBlock(cfg, stage.C, 0.0, sdpa)
        block.load_state_dict(ours.state_dict())
        return block

    rivals = {
        "PyTorch NCTHW": Run(plain(False), call, torch.contiguous_format),
        "PyTorch channels_last_3d": Run(plain(True), call, torch.channels_last_3d),
    }
    return of_modules(Run(ours, call), rivals, x)


def test_blocks(microbenchmark):
    microbenchmark()

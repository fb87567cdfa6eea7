"""Time our attention beside PyTorch's fused one on this GPU and put the faster on file.

    python -m benchmarks.tune_attention                        # into tuned.json of the library
    python -m benchmarks.tune_attention --dry-run --into a.json  # tiny, on any machine

For each dtype, number of tokens and channels of a head, forward alone and a whole step, forward and
backward. Ours is compared with PyTorch's before it is timed. PyTorch's is what
`F.scaled_dot_product_attention` picks itself: flash, cuDNN or memory-efficient attention.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import tune
from benchmarks.machine import said
from uniformer_kernels import _runtime, attention, backend
from uniformer_kernels.attention import _sdpa, _split

__all__ = ["main"]

TOKENS = (8, 196, 392, 784, 1568, 3136)  # of UniFormer's stages from 8 to 32 frames, and of time
HEADS = {28: 8, 32: 8, 64: 5}  # channels of a head: how many
ROWS = 2**16  # tokens of a batch: enough to fill the GPU
TOLERANCE = 3e-2  # of the largest, in 16 bits


class Case(NamedTuple):
    """A row of the file."""

    direction: str
    dtype: str
    tokens: int
    channels: int

    @property
    def key(self) -> str:
        """Its name there."""
        return " ".join(map(str, self))


def list_cases(dry_run: bool) -> list[Case]:
    """bf16 and heads of 64 first."""
    if dry_run:
        return [Case(direction, "fp16", 8, 28) for direction in ("fwd", "step")]
    dtypes, widths = ("bf16", "fp16"), sorted(HEADS, reverse=True)
    return [
        Case(direction, dtype, tokens, channels)
        for dtype, channels, tokens, direction in product(dtypes, widths, TOKENS, ("step", "fwd"))
    ]


def measure(case: Case, dry_run: bool) -> tune.Row:
    """Milliseconds of either, the faster first.

    Raises:
        ValueError: ours is wrong.
    """
    h = HEADS[case.channels]
    batch = 1 if dry_run else max(ROWS // case.tokens, 1)
    qkv = torch.randn(batch, case.tokens, 3 * h * case.channels)
    qkv = qkv.to("cuda" if tune.GPU else "cpu", _runtime.DTYPES[case.dtype])
    leaf, dout = qkv.requires_grad_(case.direction == "step"), torch.randn_like(qkv[..., ::3])

    def ours(qkv: Tensor) -> Tensor:
        with backend("triton"):
            return attention(qkv, h)

    def theirs(qkv: Tensor) -> Tensor:
        return _sdpa(*_split(qkv, h), None, 0.0).flatten(2)

    def run(provider: Callable[[Tensor], Tensor]) -> Tensor:
        out = provider(leaf)
        return torch.autograd.grad(out, leaf, dout)[0] if leaf.requires_grad else out

    with tune.poisoned():
        got, want = run(ours), run(theirs)
    error = float((got.float() - want.float()).abs().max() / want.float().abs().max())
    if not error <= TOLERANCE:
        raise ValueError(f"wrong by {error:.1e} of the largest, {TOLERANCE:.0e} is allowed")
    ms = {"triton": tune.time_ms(partial(run, ours)), "sdpa": tune.time_ms(partial(run, theirs))}
    first, second = sorted(ms, key=lambda name: ms[name])
    return {
        "backend": first, "ms": round(ms[first], 5), "rival_ms": {second: round(ms[second], 5)},
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description="Time attention beside PyTorch's on this GPU.")
    parser.add_argument("--seconds", type=float, default=60, help="in all, at most")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on any machine")
    parser.add_argument("--into", type=Path, help="a file instead of the library's")
    args = parser.parse_args(arguments)
    if args.dry_run and args.into is None:
        parser.error("--dry-run measures nothing for the library: say --into FILE")
    if not args.dry_run and (not tune.GPU or _runtime.interpreting()):
        parser.error("this needs a CUDA device, and TRITON_INTERPRET unset; or --dry-run")
    if not tune.GPU:
        os.environ["TRITON_INTERPRET"] = "1"
    into, end = args.into or _runtime.TUNED, time.monotonic() + args.seconds
    arch, where = tune.environment(batch=1)
    for case in list_cases(args.dry_run):
        if time.monotonic() > end:
            print(f"{case.key}: out of time")
            continue
        try:
            row = measure(case, args.dry_run)
        except Exception as error:  # of any kind: such a shape stays PyTorch's
            tune.finish()  # raises again where the GPU is lost for this process
            print(f"{case.key}: {said(error)}")
            continue
        tune.write(into, arch, where, case.key, row, op="attention")
        print(f"{case.key}: {row['backend']} {row['ms']:.4f} ms, {row['rival_ms']}")


if __name__ == "__main__":
    main()

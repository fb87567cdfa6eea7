"""Time our attention beside PyTorch's fused one on this GPU and put the faster on file.

    python -m benchmarks.tune_attention                        # into tuned.json of the library
    python -m benchmarks.tune_attention --dry-run --into a.json  # tiny, on any machine

For each dtype, number of tokens and channels of a head, forward alone and a whole step, forward and
backward. Ours is compared with PyTorch's before it is timed. PyTorch's is what
`F.scaled_dot_product_attention` picks itself: flash, cuDNN or memory-efficient attention.
"""

import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import tuning
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


def measure(case: Case, dry_run: bool) -> tuning.Row:
    """Milliseconds of either, the faster first.

    Raises:
        ValueError: ours is wrong.
    """
    h = HEADS[case.channels]
    batch = 1 if dry_run else max(ROWS // case.tokens, 1)
    qkv = torch.randn(batch, case.tokens, 3 * h * case.channels)
    qkv = qkv.to("cuda" if tuning.GPU else "cpu", _runtime.DTYPES[case.dtype])
    leaf, dout = qkv.requires_grad_(case.direction == "step"), torch.randn_like(qkv[..., ::3])

    def ours(qkv: Tensor) -> Tensor:
        with backend("triton"):
            return attention(qkv, h)

    def theirs(qkv: Tensor) -> Tensor:
        return _sdpa(*_split(qkv, h), None, 0.0).flatten(2)

    def run(provider: Callable[[Tensor], Tensor]) -> Tensor:
        out = provider(leaf)
        return torch.autograd.grad(out, leaf, dout)[0] if leaf.requires_grad else out

    with tuning.poisoned():
        got, want = run(ours), run(theirs)
    error = float((got.float() - want.float()).abs().max() / want.float().abs().max())
    if not error <= TOLERANCE:
        raise ValueError(f"wrong by {error:.1e} of the largest, {TOLERANCE:.0e} is allowed")
    ms = {
        "triton": tuning.time_ms(partial(run, ours)),
        "sdpa": tuning.time_ms(partial(run, theirs)),
    }
    first, second = sorted(ms, key=lambda name: ms[name])
    return {
        "backend": first, "ms": round(ms[first], 5), "rival_ms": {second: round(ms[second], 5)},
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """See the top of the file."""
    description = "Time attention beside PyTorch's on this GPU."
    args = tuning.settings("benchmarks.tune_attention", description, 60, arguments)
    end = time.monotonic() + args.seconds
    arch, where = tuning.environment(batch=1)
    for case in list_cases(args.dry_run):
        if time.monotonic() > end:
            print(f"{case.key}: out of time")
            continue
        try:
            row = measure(case, args.dry_run)
        except Exception as error:  # of any kind: such a shape stays PyTorch's
            tuning.finish()  # raises again where the GPU is lost for this process
            print(f"{case.key}: {said(error)}")
            continue
        tuning.write(args.into, arch, where, case.key, row, op="attention")
        print(f"{case.key}: {row['backend']} {row['ms']:.4f} ms, {row['rival_ms']}")


if __name__ == "__main__":
    main()

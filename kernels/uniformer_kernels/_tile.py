"""What the Triton kernels of `pointwise` and `ffn` share: tiles of rows, norms, GELU.

Rows are tokens, side by side in memory; a tile is BLOCK_M rows by BLOCK_K channels. Products run
on tensor cores in the weights' dtype and add up in fp32; of fp32 they are exact, and slow, since
tensor cores have none: for those the library serves (`_chunked.py`).
"""

# mypy: disable-error-code="assignment"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "DTYPES",
    "Config",
    "block",
    "gelu",
    "gelu_and_slope",
    "of_clips",
    "once",
    "plain",
    "rows_of",
    "scaled",
    "splits",
    "store_rows",
    "through_norm",
    "transposed",
    "xhat_of",
]  # fmt: skip

SQRT_HALF = tl.constexpr(0.7071067811865476)
RSQRT_TAU = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


# --- Device functions -----------------------------------------------------------------


@triton.jit
def rows_of(X, m, M, c, C: tl.constexpr):
    """Rows m of X (M, C), channels c, in fp32; zeros outside."""
    at = X + m.to(tl.int64)[:, None] * C + c[None, :]
    return tl.load(at, mask=(m < M)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)


@triton.jit
def xhat_of(X, m, M, Mean, Rstd, c, C: tl.constexpr):
    """Those rows normalised where there is a norm; then zeros beyond C, but not beyond M."""
    x = rows_of(X, m, M, c, C)
    if Mean is not None:
        mean = tl.load(Mean + c, mask=c < C, other=0.0)
        rstd = tl.load(Rstd + c, mask=c < C, other=0.0)
        x = (x - mean[None, :]) * rstd[None, :]
    return x


@triton.jit
def store_rows(y, Y, m, M, c, C: tl.constexpr):
    """Rows m of Y (M, C), channels c."""
    at = Y + m.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(at, y.to(Y.dtype.element_ty), mask=(m < M)[:, None] & (c < C)[None, :])


@triton.jit
def scaled(x, Scale, m, M, R):
    """Rows times the number of their clip, of R rows, where there is one."""
    if Scale is not None:
        x *= tl.load(Scale + m // R, mask=m < M, other=0.0).to(tl.float32)[:, None]
    return x


@triton.jit
def plain(Weight, a, A: tl.constexpr, b, B: tl.constexpr):
    """Tile (a, b) of Weight (A, B)."""
    return tl.load(
        Weight + a[:, None] * B + b[None, :], mask=(a < A)[:, None] & (b < B)[None, :], other=0.0
    )


@triton.jit
def transposed(Weight, a, A: tl.constexpr, b, B: tl.constexpr):
    """Tile (b, a) of Weight (A, B)."""
    return tl.load(
        Weight + a[None, :] * B + b[:, None], mask=(a < A)[None, :] & (b < B)[:, None], other=0.0
    )


@triton.jit
def once(x):
    """x itself, as the largest of one element: the compiler does not look through a reduction.

    Else it would make x anew for each product that reads it, in that one's layout, which repeats
    it across warps. In the FFN's weight gradient for 128 channels that was 1,022 instructions and
    255 registers where now are 704 and 128.
    """
    return tl.max(x[:, None, :], axis=1)


@triton.jit
def through_norm(g, x, Mean, Rstd, Shift, Slope, c, C: tl.constexpr):
    """From g, the gradient of xhat, that of x."""
    mean = tl.load(Mean + c, mask=c < C, other=0.0)
    rstd = tl.load(Rstd + c, mask=c < C, other=0.0)
    shift = tl.load(Shift + c, mask=c < C, other=0.0)
    slope = tl.load(Slope + c, mask=c < C, other=0.0)
    return (g - shift[None, :]) * rstd[None, :] + (x - mean[None, :]) * slope[None, :]


@triton.jit
def gelu(h):
    """h * Phi(h), Phi the normal distribution."""
    return h * (0.5 + 0.5 * tl.erf(h * SQRT_HALF))


@triton.jit
def gelu_and_slope(h):
    """GELU and its derivative, Phi(h) + h * phi(h)."""
    phi = 0.5 + 0.5 * tl.erf(h * SQRT_HALF)
    return h * phi, phi + h * tl.exp(-0.5 * h * h) * RSQRT_TAU


# --- Launch ---------------------------------------------------------------------------


def block(size: int, most: int) -> int:
    """The edge of a tile along an axis of `size`: a power of 2, as products need it, 16 and up."""
    return max(min(triton.next_power_of_2(size), most), 16)


def splits(rows: int, block_m: int, programs: int, multiprocessors: int) -> int:
    """Into how many shares the rows of a sum go, so that the GPU is full twice over."""
    return max(min(2 * multiprocessors // programs, triton.cdiv(rows, block_m)), 1)


DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def of_clips(scale: Tensor | None, rows: int) -> tuple[Tensor | None, int]:
    """`scale` (B,) as a kernel reads it, and how many rows share a number of it."""
    return (None, rows) if scale is None else (scale.contiguous(), rows // len(scale))


class Config(NamedTuple):
    """A launch: how many programs, the sizes of a tile, warps, and depth of the pipeline."""

    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int = 2

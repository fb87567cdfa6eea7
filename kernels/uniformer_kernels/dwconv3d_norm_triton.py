"""The Triton kernel of `dwconv3d_norm`: a convolution, and the LayerNorm of what it stores.

A program has all channels of its tokens, a block of them at a time. It stores the convolution and
keeps the sums over channels; then it reads back what it has stored, which lies in the caches, for
the squared deviations, and once more to store it normalised. So a statistic is of the numbers that
a LayerNorm after it would read, and device memory sees one pass.

Shapes: B clips, T frames, H rows, W columns, C channels; kernel KT x KH x KW.
"""

# mypy: disable-error-code="assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from uniformer_kernels import _runtime
from uniformer_kernels._depthwise import (
    Config,
    Shape,
    Tuned,
    exists,
    output_of,
    packed,
    place_of,
    readable,
    sums_of,
    tiling,
    tuned_for,
)

__all__ = ["fwd", "fwd_config", "in_one_pass"]


# --- Kernel ---------------------------------------------------------------------------


@triton.jit
def _dwconv3d_norm_fwd_kernel(
    X, Weight, Bias, Gamma, Beta, Y, Normed, Mean, Rstd,
    stride_xb, stride_xt, stride_xh,
    T, H, W, tiles_h, tiles_w, tiles, eps,
    C: tl.constexpr, STRIDE_XW: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, RESIDUAL: tl.constexpr,
    NH: tl.constexpr, NW: tl.constexpr, EVEN_W: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Weight is (KT * KH * KW, C); Mean and Rstd are (B, T, H, W)."""
    tile = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    bt, b, t, h0, w0 = place_of(tile, T, tiles_h, tiles_w, NH, NW)
    first = (bt.to(tl.int64) * H + h0) * W + w0  # token

    total = (tl.zeros([BLOCK_P, BLOCK_C], tl.float32),) * (NH * NW)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        in_c = (c < C)[None, :] | (C % BLOCK_C == 0)
        corner = X + (b * stride_xb + w0 * STRIDE_XW)[:, None] + c[None, :]
        acc = sums_of(
            corner, Weight, c, in_c, tile < tiles, t, h0, w0, T, H, W, stride_xt, stride_xh,
            C, STRIDE_XW, KT, KH, KW, False, NH, NW, EVEN_W, BLOCK_P, BLOCK_C,
        )  # fmt: skip
        here = corner + (t.to(tl.int64) * stride_xt)[:, None]
        new = ()
        for s in tl.static_range(NH * NW):
            mask = exists(s, tile < tiles, h0, w0, H, W, NW, EVEN_W) & in_c
            y = output_of(
                acc, s, Bias, here, h0, stride_xh, c, in_c, mask, STRIDE_XW, RESIDUAL, NW
            ).to(Y.dtype.element_ty)  # fmt: skip
            tl.store(Y + ((first + s // NW * W + s % NW) * C)[:, None] + c[None, :], y, mask=mask)
            new = new + (total[s] + y.to(tl.float32),)  # zero beyond C
        total = new
    tl.debug_barrier()  # what one thread has stored another may read

    mean = ()
    for s in tl.static_range(NH * NW):
        mean = mean + (tl.sum(total[s], axis=1) / C,)
    squares = (tl.zeros([BLOCK_P, BLOCK_C], tl.float32),) * (NH * NW)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        new = ()
        for s in tl.static_range(NH * NW):
            mask = exists(s, tile < tiles, h0, w0, H, W, NW, EVEN_W) & (c < C)[None, :]
            at = Y + ((first + s // NW * W + s % NW) * C)[:, None] + c[None, :]
            y = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            d = tl.where(mask, y - mean[s][:, None], 0.0)
            new = new + (squares[s] + d * d,)
        squares = new

    rstd = ()
    for s in tl.static_range(NH * NW):
        r = tl.rsqrt(tl.sum(squares[s], axis=1) / C + eps)
        token = (first + s // NW * W + s % NW)[:, None]
        real = exists(s, tile < tiles, h0, w0, H, W, NW, EVEN_W)
        tl.store(Mean + token, mean[s][:, None], mask=real)
        tl.store(Rstd + token, r[:, None], mask=real)
        rstd = rstd + (r,)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        for s in tl.static_range(NH * NW):
            mask = exists(s, tile < tiles, h0, w0, H, W, NW, EVEN_W) & (c < C)[None, :]
            at = ((first + s // NW * W + s % NW) * C)[:, None] + c[None, :]
            y = tl.load(Y + at, mask=mask, other=0.0).to(tl.float32)
            y = (y - mean[s][:, None]) * rstd[s][:, None]
            if Gamma is not None:
                y *= tl.load(Gamma + c[None, :], mask=c < C, other=0.0).to(tl.float32)
            if Beta is not None:
                y += tl.load(Beta + c[None, :], mask=c < C, other=0.0).to(tl.float32)
            tl.store(Normed + at, y.to(Normed.dtype.element_ty), mask=mask)


# --- Launch ---------------------------------------------------------------------------

# Each output has a sum for the mean, later one for the variance, beside that of its products.
ROWS = 2


def fwd_config(shape: Shape, stride_w: int, kernel: Shape, tuned: Tuned | None = None) -> Config:
    """How `fwd` is launched on x (B, T, H, W, C), whose columns are `stride_w` apart."""
    arguments, warps = tiling(shape, kernel, ROWS, tuned)
    programs = cdiv(arguments["tiles"], arguments["BLOCK_P"])
    return Config((programs,), arguments | {"STRIDE_XW": stride_w}, warps)


def in_one_pass(x: Tensor, kernel: Shape) -> bool:
    """Whether one kernel is to make both: where it was measured faster, or might be.

    It has a fifth to an eighth of the programs of two kernels, each with all channels, and so needs
    tokens enough for a GPU's processors.
    """
    if kernel[1] > 5:  # whose taps times rows of a tile would not fit the code cache
        return False
    if _runtime.current_backend() == "auto" and (row := tuned_for("norm", x, kernel)):
        return row["backend"] == "triton"
    programs = fwd_config(tuple(x.shape), x.stride(3), kernel).grid[0]
    return programs >= _runtime.multiprocessors(x)


def fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, gamma: Tensor | None,
    beta: Tensor | None, eps: float, dtype: torch.dtype, tuned: Tuned | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x (B, T, H, W, C), not empty -> y likewise, its LayerNorm in `dtype`, and of that mean and
    inverse deviation, (B, T, H, W, 1) in fp32.

    `tuned` is launched with instead of what is on file; {} for the defaults.
    """
    x, kernel = readable(x), weight.shape[2:]
    y, normed = x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype)
    mean, rstd = x.new_empty(2, *x.shape[:-1], 1, dtype=torch.float32)
    bias, gamma, beta = (None if t is None else t.contiguous() for t in (bias, gamma, beta))
    tuned = tuned_for("norm", x, kernel) if tuned is None else tuned
    (programs,), arguments, warps = fwd_config(tuple(x.shape), x.stride(3), kernel, tuned)
    with _runtime.on_device(x):
        _dwconv3d_norm_fwd_kernel[(programs,)](
            x, packed(weight), bias, gamma, beta, y, normed, mean, rstd, *x.stride()[:3],
            **arguments, eps=eps, RESIDUAL=residual, num_warps=warps,
        )  # fmt: skip
    return y, normed, mean, rstd

"""The Triton kernel of `dwconv3d`, forward; gradients are in `dwconv3d_bwd_triton.py`.

A program slides along W: NW outputs of a row are sums of their own in registers, so that the
NW + KW - 1 elements it loads of a row of x serve NW * KW products. Its lanes are BLOCK_P tiles by
BLOCK_C channels.

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
from uniformer_kernels._norm import merge_stats

__all__ = ["fwd", "fwd_config", "fwd_with_stats"]


# --- Kernel ---------------------------------------------------------------------------


@triton.jit
def _dwconv3d_fwd_kernel(
    X, Weight, Bias, Y, Stats,
    stride_xb, stride_xt, stride_xh,
    T, H, W, tiles_h, tiles_w, tiles,
    C: tl.constexpr, STRIDE_XW: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    MIRROR: tl.constexpr, RESIDUAL: tl.constexpr,
    NH: tl.constexpr, NW: tl.constexpr, EVEN_W: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Weight is (KT * KH * KW, C); MIRROR reads its taps from the last to the first.

    Stats, where there are some, is (programs of a block of channels, 3, C): how many outputs this
    program stores, their mean, and the sum of their squared deviations from it.
    """
    tiles_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = (c < C)[None, :] | (C % BLOCK_C == 0)
    tile = tl.program_id(0) // tiles_c * BLOCK_P + tl.arange(0, BLOCK_P)
    bt, b, t, h0, w0 = place_of(tile, T, tiles_h, tiles_w, NH, NW)
    corner = X + (b * stride_xb + w0 * STRIDE_XW)[:, None] + c[None, :]  # (BLOCK_P, BLOCK_C)

    acc = sums_of(
        corner, Weight, c, in_c, tile < tiles, t, h0, w0, T, H, W, stride_xt, stride_xh,
        C, STRIDE_XW, KT, KH, KW, MIRROR, NH, NW, EVEN_W, BLOCK_P, BLOCK_C,
    )  # fmt: skip

    here = corner + (t.to(tl.int64) * stride_xt)[:, None]
    to = Y + (((bt.to(tl.int64) * H + h0) * W + w0) * C)[:, None] + c[None, :]
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    count = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    ys = ()
    for s in tl.static_range(NH * NW):
        mask = exists(s, tile < tiles, h0, w0, H, W, NW, EVEN_W) & in_c
        y = output_of(
            acc, s, Bias, here, h0, stride_xh, c, in_c, mask, STRIDE_XW, RESIDUAL, NW
        ).to(Y.dtype.element_ty)  # fmt: skip
        tl.store(to + (s // NW * W + s % NW) * C, y, mask=mask)
        if Stats is not None:
            y = tl.where(mask, y.to(tl.float32), 0.0)
            total += y
            count += tl.where(mask, 1.0, 0.0)
            ys = ys + (y,)
    if Stats is not None:
        n = tl.maximum(tl.sum(count, axis=0), 1.0)
        mean = tl.sum(total, axis=0) / n
        squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for s in tl.static_range(NH * NW):
            mask = exists(s, tile < tiles, h0, w0, H, W, NW, EVEN_W) & in_c
            d = tl.where(mask, ys[s] - mean[None, :], 0.0)
            squares += d * d
        stats = Stats + tl.program_id(0).to(tl.int64) // tiles_c * 3 * C + c
        tl.store(stats, tl.sum(count, axis=0), mask=c < C)
        tl.store(stats + C, mean, mask=c < C)
        tl.store(stats + 2 * C, tl.sum(squares, axis=0), mask=c < C)


# --- Launch ---------------------------------------------------------------------------

# A tile is NH x NW = 4 x 7 outputs, so that a row of x, loaded and converted once, serves up to 4
# rows of y. With 4 channels a lane 5x5x5 spills; with 1 row a tile two thirds of the instructions
# are no products, now less than a third. Counted for sm_90 by benchmarks/static_cost.py.
ROWS = 4


def fwd_config(shape: Shape, stride_w: int, kernel: Shape, tuned: Tuned | None = None) -> Config:
    """How `fwd` is launched on x (B, T, H, W, C), whose columns are `stride_w` apart."""
    rows = ROWS if kernel[1] <= 5 else 1  # 81 taps x 4 rows would not fit the code cache
    arguments, warps = tiling(shape, kernel, rows, tuned)
    programs = cdiv(arguments["tiles"], arguments["BLOCK_P"]) * cdiv(shape[4], arguments["BLOCK_C"])
    return Config((programs,), arguments | {"STRIDE_XW": stride_w}, warps)


def fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, mirror: bool = False,
    tuned: Tuned | None = None,
) -> Tensor:  # fmt: skip
    """x (B, T, H, W, C), not empty -> y likewise; `mirror` for the gradient of x, from dy.

    `tuned` is launched with instead of what is on file; {} for the defaults.
    """
    return _fwd(x, weight, bias, residual, mirror, tuned, with_stats=False)[0]


def fwd_with_stats(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool
) -> tuple[Tensor, Tensor]:
    """y as of `fwd`, and (2, C) fp32: mean and biased variance, without a pass of its own."""
    y, stats = _fwd(x, weight, bias, residual, mirror=False, tuned=None, with_stats=True)
    assert stats is not None
    return y, merge_stats(stats)


def _fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, mirror: bool,
    tuned: Tuned | None, with_stats: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    x, kernel = readable(x), weight.shape[2:]
    y = x.new_empty(x.shape)
    bias = None if bias is None else bias.contiguous()
    tuned = tuned_for("fwd", x, kernel) if tuned is None else tuned
    grid, arguments, warps = fwd_config(x.shape, x.stride(3), kernel, tuned)
    C = x.shape[-1]
    programs = grid[0] // cdiv(C, arguments["BLOCK_C"])
    stats = x.new_empty(programs, 3, C, dtype=torch.float32) if with_stats else None
    with _runtime.on_device(x):
        _dwconv3d_fwd_kernel[grid](
            x, packed(weight), bias, y, stats, *x.stride()[:3],
            **arguments, MIRROR=mirror, RESIDUAL=residual, num_warps=warps,
        )  # fmt: skip
    return y, stats

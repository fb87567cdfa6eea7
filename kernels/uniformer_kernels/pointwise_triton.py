"""Triton kernels of `pointwise`.

Forward, a program makes BLOCK_M rows times BLOCK_N channels. The norm is applied to the rows it
loads; bias, drop path, residual and statistics are done on the sums before they are stored.

Backward, G = dy^T xhat comes first: it holds the sums over rows that the norm's gradient needs
(`_norm.py`). Then dx = dy W goes through the norm as it is stored. No other pass is made.

Shapes: M rows, K channels in, N channels out; R rows a clip.
"""

# mypy: disable-error-code="assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from uniformer_kernels import _runtime
from uniformer_kernels._norm import Prologue, Sums, merge_stats
from uniformer_kernels._tile import (
    DTYPES,
    Config,
    block,
    of_clips,
    plain,
    rows_of,
    scaled,
    splits,
    store_rows,
    through_norm,
    transposed,
    xhat_of,
)

__all__ = ["bwd", "bwd_input_config", "bwd_weight_config", "fwd", "fwd_config"]


# --- Kernels --------------------------------------------------------------------------


@triton.jit
def _pointwise_fwd_kernel(
    X, Weight, Bias, Mean, Rstd, Scale, Residual, Y, Stats,
    M, R,
    K: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weight is (N, K). Stats, where there are some, is (tiles of rows, 3, N), as in dwconv3d."""
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // tiles_n
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in tl.static_range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = xhat_of(X, m, M, Mean, Rstd, k, K)
        weight = transposed(Weight, n, N, k, K)  # (BLOCK_K, BLOCK_N)
        acc = tl.dot(x.to(weight.dtype), weight, acc, input_precision="ieee")

    inside = (m < M)[:, None] & (n < N)[None, :]
    if Bias is not None:
        acc += tl.load(Bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    acc = scaled(acc, Scale, m, M, R)
    if Residual is not None:
        acc += rows_of(Residual, m, M, n, N)
    y = acc.to(Y.dtype.element_ty)
    tl.store(Y + m.to(tl.int64)[:, None] * N + n[None, :], y, mask=inside)
    if Stats is not None:
        rows = tl.minimum(M - tile * BLOCK_M, BLOCK_M).to(tl.float32)
        y = tl.where(inside, y.to(tl.float32), 0.0)
        mean = tl.sum(y, axis=0) / rows
        d = tl.where(inside, y - mean[None, :], 0.0)
        stats = Stats + tile.to(tl.int64) * 3 * N + n
        tl.store(stats, tl.zeros([BLOCK_N], tl.float32) + rows, mask=n < N)
        tl.store(stats + N, mean, mask=n < N)
        tl.store(stats + 2 * N, tl.sum(d * d, axis=0), mask=n < N)


@triton.jit
def _pointwise_bwd_weight_kernel(
    DY, X, Mean, Rstd, Scale, Partial, PartialBias,
    M, R,
    K: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Partial is (splits, N, K), PartialBias (splits, N); program_id(1) is the split."""
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    k = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.program_id(0) // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)

    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    db = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(split * BLOCK_M, M, tl.num_programs(1) * BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        dy = rows_of(DY, m, M, n, N)  # zeros beyond M make up for an xhat that has none
        dy = scaled(dy, Scale, m, M, R)
        x = xhat_of(X, m, M, Mean, Rstd, k, K)
        acc = tl.dot(tl.trans(dy.to(DTYPE)), x.to(DTYPE), acc, input_precision="ieee")
        db += dy

    at = Partial + split.to(tl.int64) * N * K + n[:, None] * K + k[None, :]
    tl.store(at, acc, mask=(n < N)[:, None] & (k < K)[None, :])
    first_k = tl.program_id(0) % tiles_k == 0
    tl.store(PartialBias + split.to(tl.int64) * N + n, tl.sum(db, axis=0), mask=(n < N) & first_k)


@triton.jit
def _pointwise_bwd_input_kernel(
    DY, Weight, X, Mean, Rstd, Shift, Slope, Scale, More, DX,
    M, R,
    K: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    m = tl.program_id(0) // tiles_k * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)

    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for n0 in tl.static_range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        dy = rows_of(DY, m, M, n, N)
        weight = plain(Weight, n, N, k, K)  # (BLOCK_N, BLOCK_K)
        acc = tl.dot(dy.to(weight.dtype), weight, acc, input_precision="ieee")

    acc = scaled(acc, Scale, m, M, R)
    if Mean is not None:
        acc = through_norm(acc, rows_of(X, m, M, k, K), Mean, Rstd, Shift, Slope, k, K)
    if More is not None:
        acc += rows_of(More, m, M, k, K)
    store_rows(acc, DX, m, M, k, K)


# --- Launch ---------------------------------------------------------------------------

# Not measured yet. Of tiles that compile without spills for sm_80, sm_90 and sm_100 those with the
# fewest instructions a product (`benchmarks/static_cost.py`).
BLOCK_M = 128
INPUT_M = 64  # backward there are the norm's x, and what comes back around the branch, as well
EDGE = 128  # of a tile along channels: up to that x is read once
WEIGHT_M, WEIGHT_EDGE = 64, 64  # 64 x 64 sums of a weight's gradient are 32 registers a lane


def fwd_config(M: int, K: int, N: int) -> Config:
    """How `fwd` is launched on x (M, K) and weight (N, K)."""
    block_n = block(N, EDGE)
    warps, block_k = (4, block(K, 64)) if block_n <= 64 else (8, block(K, 32))
    sizes = {"BLOCK_M": BLOCK_M, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return Config((cdiv(M, BLOCK_M) * cdiv(N, block_n),), {"K": K, "N": N} | sizes, warps)


def bwd_input_config(M: int, K: int, N: int) -> Config:
    """How the gradient of x (M, K) is launched."""
    block_k = block(K, EDGE)
    sizes = {"BLOCK_M": INPUT_M, "BLOCK_N": block(N, 64), "BLOCK_K": block_k}
    grid = (cdiv(M, INPUT_M) * cdiv(K, block_k),)
    return Config(grid, {"K": K, "N": N} | sizes, 4 if block_k <= 64 else 8)


def bwd_weight_config(M: int, K: int, N: int, multiprocessors: int) -> Config:
    """How the gradient of the weight (N, K) is launched; grid (tiles, splits)."""
    block_n, block_k = block(N, WEIGHT_EDGE), block(K, WEIGHT_EDGE)
    tiles = cdiv(N, block_n) * cdiv(K, block_k)
    sizes = {"BLOCK_M": WEIGHT_M, "BLOCK_N": block_n, "BLOCK_K": block_k}
    grid = (tiles, splits(M, WEIGHT_M, tiles, multiprocessors))
    return Config(grid, {"K": K, "N": N} | sizes, 4)


def fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Prologue | None, scale: Tensor | None,
    residual: Tensor | None, dtype: torch.dtype, with_stats: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """x (M, K), weight (N, K), scale (B,), residual (M, N) -> y (M, N), statistics (2, N)."""
    weight, bias = (weight, bias) if norm is None else norm.fold(weight, bias)
    x, weight = x.contiguous(), weight.to(dtype).contiguous()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    (M, K), N = x.shape, len(weight)
    grid, arguments, warps, stages = fwd_config(M, K, N)
    y = x.new_empty(M, N, dtype=dtype if residual is None else residual.dtype)
    tiles = cdiv(M, BLOCK_M)
    scale, R = of_clips(scale, M)
    stats = x.new_empty(tiles, 3, N, dtype=torch.float32) if with_stats else None
    with _runtime.on_device(x):
        _pointwise_fwd_kernel[grid](
            x, weight, bias, *(norm or (None,) * 2)[:2], scale, residual, y, stats, M, R,
            **arguments, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return y, None if stats is None else merge_stats(stats)


def bwd(
    dy: Tensor, x: Tensor, weight: Tensor, norm: Prologue | None, scale: Tensor | None,
    more: Tensor | None, dtype: torch.dtype, group: str, with_dx: bool, with_dw: bool,
) -> tuple[Tensor | None, Sums, Tensor]:  # fmt: skip
    """dx (M, K) in x's dtype, the gradients of the weight (N, K) and norm, and of the bias (N,).

    `more` (M, K) is added to dx.
    """
    dy, x = dy.contiguous(), x.contiguous()
    G, db = weight.new_empty(0), weight.new_empty(0)
    if with_dw or norm is not None:
        G, db = _bwd_weight(dy, x, norm, scale, dtype)
    sums = Sums.of(G, db, weight, norm)
    if not with_dx:
        return None, sums, db
    (M, K), N = x.shape, len(weight)
    grid, arguments, warps, stages = bwd_input_config(M, K, N)
    dx, more = x.new_empty(x.shape), None if more is None else more.contiguous()
    scale, R = of_clips(scale, M)
    through: tuple = (None,) * 5
    if norm is not None:
        weight, through = weight * norm.gamma, (x, *norm[:2], *sums.through(norm, M, group))
    with _runtime.on_device(x):
        _pointwise_bwd_input_kernel[grid](
            dy, weight.to(dtype).contiguous(), *through, scale, more, dx, M, R,
            **arguments, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return dx, sums, db


def _bwd_weight(
    dy: Tensor, x: Tensor, norm: Prologue | None, scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    (M, K), N = x.shape, dy.shape[1]
    grid, arguments, warps, stages = bwd_weight_config(M, K, N, _runtime.multiprocessors(x))
    scale, R = of_clips(scale, M)
    partial = x.new_empty(grid[1], N, K, dtype=torch.float32)
    partial_bias = x.new_empty(grid[1], N, dtype=torch.float32)
    with _runtime.on_device(x):
        _pointwise_bwd_weight_kernel[grid](
            dy, x, *(norm or (None,) * 2)[:2], scale, partial, partial_bias, M, R,
            **arguments, DTYPE=DTYPES[dtype],
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return partial.sum(0), partial_bias.sum(0)

"""Triton kernels of `ffn`: the hidden layer lives on the chip, BLOCK_F of its channels at a time.

Forward, a program has BLOCK_M rows of x, and for each piece of the hidden layer makes
GELU(z W1^T + b1) and adds its product with W2 to its sums.

Backward, the pieces are made anew, twice. First a program has a piece of the hidden layer and
walks over its share of the rows, summing the gradients of that piece's weights; they hold the sums
over rows that the norm's gradient needs (`_norm.py`). Then a program has rows and walks over the
pieces, summing dx.

Shapes: M rows, C channels, F hidden channels; R rows a clip.
"""

# mypy: disable-error-code="assignment"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from uniformer_kernels import _runtime
from uniformer_kernels._norm import Prologue, Sums
from uniformer_kernels._tile import (
    Config,
    block,
    gelu,
    gelu_and_slope,
    of_clips,
    once,
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
def _hidden(z, W1, B1, f, c, C: tl.constexpr, F: tl.constexpr):
    """Channels f of the hidden layer before its GELU, in fp32."""
    h = tl.dot(z, transposed(W1, f, F, c, C), input_precision="ieee")
    if B1 is not None:
        h += tl.load(B1 + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    return h


@triton.jit
def _ffn_fwd_kernel(
    X, W1, B1, W2, B2, Mean, Rstd, Scale, Y,
    M, R,
    C: tl.constexpr, F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """W1 is (F, C), W2 (C, F)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    x = xhat_of(X, m, M, Mean, Rstd, c, C)
    z = x.to(W1.dtype.element_ty)

    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for f0 in range(0, F, BLOCK_F):
        f = f0 + tl.arange(0, BLOCK_F)
        a = gelu(_hidden(z, W1, B1, f, c, C, F))
        w2 = transposed(W2, c, C, f, F)  # (BLOCK_F, BLOCK_C)
        acc = tl.dot(a.to(w2.dtype), w2, acc, input_precision="ieee")

    if B2 is not None:
        acc += tl.load(B2 + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    acc = scaled(acc, Scale, m, M, R)
    if RESIDUAL:
        acc += rows_of(X, m, M, c, C)
    store_rows(acc, Y, m, M, c, C)


@triton.jit
def _ffn_bwd_weight_kernel(
    DY, X, W1, B1, W2, Mean, Rstd, Scale, Partial1, Partial2, PartialBias1,
    M, R,
    C: tl.constexpr, F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Partial1 is (splits, F, C), Partial2 (splits, C, F); program_id(1) is the split."""
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    c = tl.arange(0, BLOCK_C)
    split = tl.program_id(1)

    dw1 = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    dw2 = tl.zeros([BLOCK_C, BLOCK_F], tl.float32)
    db1 = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    for first in range(split * BLOCK_M, M, tl.num_programs(1) * BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        x = xhat_of(X, m, M, Mean, Rstd, c, C)
        x = once(x).to(W1.dtype.element_ty)
        h = _hidden(x, W1, B1, f, c, C, F)
        a, slope = gelu_and_slope(h)

        dy = rows_of(DY, m, M, c, C)  # zeros beyond M, hence no gradient from there
        dy = scaled(dy, Scale, m, M, R)
        dy = once(dy).to(W2.dtype.element_ty)
        dw2 = tl.dot(tl.trans(dy), a.to(dy.dtype), dw2, input_precision="ieee")
        dh = tl.dot(dy, plain(W2, c, C, f, F), input_precision="ieee") * slope
        db1 += dh
        dh = tl.trans(dh.to(dy.dtype))
        dw1 = tl.dot(dh, x, dw1, input_precision="ieee")

    inside = (f < F)[:, None] & (c < C)[None, :]
    split = split.to(tl.int64)
    tl.store(Partial1 + split * F * C + f[:, None] * C + c[None, :], dw1, mask=inside)
    inside = (c < C)[:, None] & (f < F)[None, :]
    tl.store(Partial2 + split * F * C + c[:, None] * F + f[None, :], dw2, mask=inside)
    tl.store(PartialBias1 + split * F + f, tl.sum(db1, axis=0), mask=f < F)


@triton.jit
def _ffn_bwd_input_kernel(
    DY, X, W1, B1, W2, Mean, Rstd, Shift, Slope, Scale, DX, PartialBias2,
    M, R,
    C: tl.constexpr, F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """PartialBias2 is (tiles of rows, C)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    dy = rows_of(DY, m, M, c, C)
    dy = scaled(dy, Scale, m, M, R)
    partial = PartialBias2 + tl.program_id(0).to(tl.int64) * C + c
    tl.store(partial, tl.sum(dy, axis=0), mask=c < C)
    x = xhat_of(X, m, M, Mean, Rstd, c, C)
    dy, z = dy.to(W1.dtype.element_ty), x.to(W1.dtype.element_ty)

    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for f0 in range(0, F, BLOCK_F):
        f = f0 + tl.arange(0, BLOCK_F)
        h = _hidden(z, W1, B1, f, c, C, F)
        _, slope = gelu_and_slope(h)
        dh = tl.dot(dy, plain(W2, c, C, f, F), input_precision="ieee") * slope
        w1 = plain(W1, f, F, c, C)  # (BLOCK_F, BLOCK_C)
        acc = tl.dot(dh.to(w1.dtype), w1, acc, input_precision="ieee")

    if Mean is not None:
        acc = through_norm(acc, rows_of(X, m, M, c, C), Mean, Rstd, Shift, Slope, c, C)
    if RESIDUAL:
        acc += rows_of(DY, m, M, c, C)
    store_rows(acc, DX, m, M, c, C)


# --- Launch ---------------------------------------------------------------------------

# Not measured yet. Of tiles that compile without spills for sm_80, sm_90 and sm_100 those with the
# fewest instructions a hidden element (`benchmarks/static_cost.py`).
ROOMY = 160 * 1024  # bytes of shared memory that the larger tiles of a weight's gradient need


def fwd_config(M: int, C: int, F: int) -> Config:
    """How `fwd` is launched on x (M, C) with F hidden channels."""
    block_m, block_f = (128, 32) if C <= 64 else (64, 64)
    sizes = {"BLOCK_M": block_m, "BLOCK_C": block(C, 2 * C), "BLOCK_F": block(F, block_f)}
    return Config((cdiv(M, block_m),), {"C": C, "F": F} | sizes, 8)


def bwd_input_config(M: int, C: int, F: int) -> Config:
    """How the gradient of x (M, C) is launched."""
    block_f, warps = (32, 4) if C <= 64 else (64, 8)
    sizes = {"BLOCK_M": 64, "BLOCK_C": block(C, 2 * C), "BLOCK_F": block(F, block_f)}
    return Config((cdiv(M, 64),), {"C": C, "F": F} | sizes, warps)


def bwd_weight_config(M: int, C: int, F: int, multiprocessors: int, shared: int) -> Config:
    """How the gradients of the weights are launched, given bytes of shared memory; grid (pieces,
    splits)."""
    block_m, block_f = (64, 32) if C <= 64 else (64, 64) if shared >= ROOMY else (32, 32)
    sizes = {"BLOCK_M": block_m, "BLOCK_C": block(C, 2 * C), "BLOCK_F": block(F, block_f)}
    pieces = cdiv(F, sizes["BLOCK_F"])
    grid = (pieces, splits(M, block_m, pieces, multiprocessors))
    return Config(grid, {"C": C, "F": F} | sizes, 8)


def fwd(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    norm: Prologue | None, scale: Tensor | None, residual: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x (M, C), w1 (F, C), w2 (C, F), scale (B,) -> y (M, C)."""
    (M, C), F = x.shape, len(w1)
    w1, b1, w2 = _operands(w1, b1, w2, norm, dtype)
    grid, arguments, warps, stages = fwd_config(M, C, F)
    x, y = x.contiguous(), x.new_empty(M, C, dtype=x.dtype if residual else dtype)
    scale, R = of_clips(scale, M)
    with _runtime.on_device(x):
        _ffn_fwd_kernel[grid](
            x, w1, b1, w2, None if b2 is None else b2.contiguous(), *(norm or (None,) * 2)[:2],
            scale, y, M, R,
            **arguments, RESIDUAL=residual, num_warps=warps,
            num_stages=stages,
        )  # fmt: skip
    return y


def bwd(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, norm: Prologue | None,
    scale: Tensor | None, residual: bool, dtype: torch.dtype, group: str, with_dx: bool,
    with_dw: bool,
) -> tuple[Tensor | None, Sums, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx (M, C) in x's dtype; gradients of w1 (F, C) and the norm, of b1, of w2 and of b2."""
    dy, x = dy.contiguous(), x.contiguous()
    operands: Any = (dy, x, *_operands(w1, b1, w2, norm, dtype), *(norm or (None,) * 2)[:2])
    none = x.new_empty(0, dtype=torch.float32)
    G, dw2, db1 = none, none, none
    if with_dw or norm is not None:
        G, dw2, db1 = _bwd_weight(operands, scale)
    sums = Sums.of(G, db1, w1, norm)
    if not with_dx:
        rows = dy.float() if scale is None else dy.float().view(len(scale), -1) * scale[:, None]
        return None, sums, db1, dw2, rows.view(dy.shape).sum(0)
    (M, C), F = x.shape, len(w1)
    grid, arguments, warps, stages = bwd_input_config(M, C, F)
    scale, R = of_clips(scale, M)
    dx, partial = x.new_empty(x.shape), x.new_empty(grid[0], C, dtype=torch.float32)
    through = (None, None) if norm is None else sums.through(norm, M, group)
    with _runtime.on_device(x):
        _ffn_bwd_input_kernel[grid](
            *operands, *through, scale, dx, partial, M, R,
            **arguments, RESIDUAL=residual, num_warps=warps,
            num_stages=stages,
        )  # fmt: skip
    return dx, sums, db1, dw2, partial.sum(0)


def _operands(
    w1: Tensor, b1: Tensor | None, w2: Tensor, norm: Prologue | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weights as the kernels read them, w1 and b1 for xhat."""
    w1, b1 = (w1, b1) if norm is None else norm.fold(w1, b1)
    b1 = None if b1 is None else b1.contiguous()
    return w1.to(dtype).contiguous(), b1, w2.to(dtype).contiguous()


def _bwd_weight(operands: tuple, scale: Tensor | None) -> tuple[Tensor, ...]:
    _, x, w1, *_ = operands
    (M, C), F = x.shape, len(w1)
    scale, R = of_clips(scale, M)
    grid, arguments, warps, stages = bwd_weight_config(
        M, C, F, _runtime.multiprocessors(x), _runtime.shared_memory(x) * 2 // w1.itemsize
    )
    partial = [
        x.new_empty(grid[1], *shape, dtype=torch.float32) for shape in ((F, C), (C, F), (F,))
    ]
    with _runtime.on_device(x):
        _ffn_bwd_weight_kernel[grid](
            *operands, scale, *partial, M, R,
            **arguments, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return tuple(p.sum(0) for p in partial)

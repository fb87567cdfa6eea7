"""The Triton kernel of `patch_embed`.

A program makes BLOCK_M rows, positions of the result, with all of their channels, so that the
LayerNorm is done on the sums. It walks over K, the C * KT * KH * KW elements of a patch, in the
order in which they lie in memory: columns last for NCTHW, where 4 pixels of the stem are one load;
channels last otherwise.

Shapes: B clips, T frames, H rows, W columns, C channels in, N out; M = B * T' * H' * W' rows.
"""

# mypy: disable-error-code="assignment"

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from uniformer_kernels import _runtime
from uniformer_kernels._tile import Config, block

__all__ = ["fwd", "fwd_config"]


@triton.jit
def _of_colour(c, a, b, d):
    """A number of each of three channels."""
    return tl.where(c == 0, a, tl.where(c == 1, b, d))


@triton.jit
def _patch_embed_fwd_kernel(
    X, Weight, Bias, Gamma, Beta, Y,
    stride_xb, stride_xt, stride_xh, stride_xw, stride_xc,
    T, H, W, TO, HO, WO, M, eps,
    scale0, scale1, scale2, shift0, shift1, shift2,
    C: tl.constexpr, N: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    COLUMNS_LAST: tl.constexpr, PIXELS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weight is (N, K), its elements in the order of a patch's."""
    K: tl.constexpr = C * KT * KH * KW
    m, n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    w0, h0 = m % WO * SW - PW, m // WO % HO * SH - PH
    t0, b = m // WO // HO % TO * ST - PT, m // WO // HO // TO
    corner = X + b.to(tl.int64) * stride_xb + t0.to(tl.int64) * stride_xt
    corner += h0.to(tl.int64) * stride_xh + w0.to(tl.int64) * stride_xw

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        if COLUMNS_LAST:
            w, h, t, c = k % KW, k // KW % KH, k // KW // KH % KT, k // KW // KH // KT
        else:
            c, w, h, t = k % C, k // C % KW, k // C // KW % KH, k // C // KW // KH
        inside = (m < M)[:, None] & (k < K)[None, :]
        if PT > 0:
            at_t = t0[:, None] + t[None, :]
            inside &= (at_t >= 0) & (at_t < T)
        if PH > 0:
            at_h = h0[:, None] + h[None, :]
            inside &= (at_h >= 0) & (at_h < H)
        if PW > 0:
            at_w = w0[:, None] + w[None, :]
            inside &= (at_w >= 0) & (at_w < W)
        offset = t.to(tl.int64) * stride_xt + h * stride_xh + w * stride_xw + c * stride_xc
        x = tl.load(corner[:, None] + offset[None, :], mask=inside, other=0)
        if PIXELS:
            scale = _of_colour(c, scale0, scale1, scale2)
            shift = _of_colour(c, shift0, shift1, shift2)
            x = tl.where(inside, x.to(tl.float32) * scale[None, :] + shift[None, :], 0.0)
        weight = tl.load(
            Weight + n[None, :] * K + k[:, None],
            mask=(n < N)[None, :] & (k < K)[:, None],
            other=0.0,
        )
        acc = tl.dot(x.to(weight.dtype), weight, acc, input_precision="ieee")

    real = (n < N)[None, :]
    if Bias is not None:
        acc += tl.load(Bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(tl.where(real, acc, 0.0), axis=1) / N
    d = tl.where(real, acc - mean[:, None], 0.0)
    y = d * tl.rsqrt(tl.sum(d * d, axis=1) / N + eps)[:, None]
    if Gamma is not None:
        y *= tl.load(Gamma + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if Beta is not None:
        y += tl.load(Beta + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = Y + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, y.to(Y.dtype.element_ty), mask=(m < M)[:, None] & real)


def fwd_config(M: int, K: int, N: int, itemsize: int) -> Config:
    """How `fwd` is launched on M rows of K elements; not measured yet."""
    block_n = block(N, 512)
    block_m = max(2**14 // block_n, 16) if block_n >= 256 else 64 if block_n == 128 else 128
    if itemsize > 2:  # products without tensor cores
        block_m = 16
    sizes = {"BLOCK_M": min(block_m, block(M, 128)), "BLOCK_N": block_n}
    sizes["BLOCK_K"] = 16 if K % 32 or itemsize > 2 else 32
    return Config((cdiv(M, sizes["BLOCK_M"]),), sizes, 8 if block_n >= 256 else 4, 3)


def fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    eps: float, stride: Sequence[int], padding: Sequence[int], scale: Sequence[float],
    shift: Sequence[float], y: Tensor,
) -> None:  # fmt: skip
    """x (B, T, H, W, C), weight (N, C, kt, kh, kw) in the products' dtype; y is written."""
    N, C, *kernel = weight.shape
    columns_last = x.stride(3) == 1 and (C == 1 or x.stride(4) != 1)
    if not columns_last and x.stride(4) != 1:
        x = x.contiguous()
    weight = (weight if columns_last else weight.permute(0, 2, 3, 4, 1)).reshape(N, -1)
    bias, gamma, beta = (None if t is None else t.contiguous() for t in (bias, gamma, beta))
    M = math.prod(y.shape[:4])
    sizes = dict(zip(("KT", "KH", "KW", "ST", "SH", "SW", "PT", "PH", "PW"),
                     (*kernel, *stride, *padding), strict=True))  # fmt: skip
    grid, arguments, warps, stages = fwd_config(M, weight.shape[1], N, weight.itemsize)
    with _runtime.on_device(x):
        _patch_embed_fwd_kernel[grid](
            x, weight.contiguous(), bias, gamma, beta, y, *x.stride(), *x.shape[1:4],
            *y.shape[1:4], M, eps, *(scale or (1.0,) * 3), *(shift or (0.0,) * 3),
            C=C, N=N, **sizes, COLUMNS_LAST=columns_last, PIXELS=x.dtype == torch.uint8,
            **arguments, num_warps=warps, num_stages=stages,
        )  # fmt: skip

"""Triton kernels of `attention`, after FlashAttention-2: no N x M affinity is ever stored.

Forward, a program has BLOCK_N queries of a head and walks over the keys, BLOCK_M at a time, with
the softmax's maximum and sum brought along. The logarithm of that sum is kept for the gradient.

Backward, affinities are made anew, twice. First a program has queries and walks over the keys,
summing dq; it also leaves delta = sum(dout * out) of its queries. Then a program has keys and walks
over the queries, summing dk and dv. So every sum has one owner: no atomics, the same bits twice.

Scores are multiplied by scale * log2(e) in fp32, after the product, so that exp2 serves and 16 bits
do not overflow.

Shapes: B clips, N queries, M keys, H heads, D channels a head; (B, N, H, D), channels side by side,
any other strides, those of k and v the same. Papers: Dao 2023, https://arxiv.org/abs/2307.08691.
"""

# mypy: disable-error-code="assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from uniformer_kernels import _runtime
from uniformer_kernels._tile import Config, block

__all__ = ["bwd", "bwd_keys_config", "bwd_queries_config", "fwd", "fwd_config"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


# --- Device functions -----------------------------------------------------------------


@triton.jit
def _at(X, b, stride_b, h, stride_h, n, stride_n):
    """Token n of a head of a clip."""
    return X + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + n.to(tl.int64) * stride_n


@triton.jit
def _tokens(X, stride, left, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK tokens from X on, (BLOCK, BLOCK_D), zeros where none is left; None: all are there."""
    n, c = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    at = X + n[:, None] * stride + c[None, :]
    if left is not None:
        found = tl.load(at, mask=(n < left)[:, None] & (c < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        found = tl.load(at, mask=(c < D)[None, :], other=0.0)
    else:
        found = tl.load(at)
    return found


@triton.jit
def _store_tokens(
    x, X, stride, left, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    n, c = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    at = X + n[:, None] * stride + c[None, :]
    tl.store(at, x.to(X.dtype.element_ty), mask=(n < left)[:, None] & (c < D)[None, :])


@triton.jit
def _attend(
    acc, most, total, q, K, V, stride, left, factor,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Bring BLOCK_M more keys into the sums, their maximum and the softmax's sum."""
    k = _tokens(K, stride, left, D, BLOCK_M, BLOCK_D)
    v = _tokens(V, stride, left, D, BLOCK_M, BLOCK_D)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if left is not None:
        s = tl.where((tl.arange(0, BLOCK_M) < left)[None, :], s, -INF)
    now = tl.maximum(most, tl.max(s, axis=1) * factor)
    shift = tl.where(now == -INF, 0.0, now)  # no affinity yet: all weights 0, and not NaN
    p = tl.exp2(s * factor - shift[:, None])
    correction = tl.exp2(most - shift)
    total = total * correction + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision="ieee")
    return acc, now, total


@triton.jit
def _dq_step(
    dq, q, dout, lse, delta, K, V, stride, left, factor,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Bring BLOCK_M more keys into the sums of dq, scale apart. lse is in powers of 2."""
    k = _tokens(K, stride, left, D, BLOCK_M, BLOCK_D)
    v = _tokens(V, stride, left, D, BLOCK_M, BLOCK_D)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * factor - lse[:, None])
    if left is not None:
        p = tl.where((tl.arange(0, BLOCK_M) < left)[None, :], p, 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def _dkv_step(
    dk, dv, k, v, Q, stride_q, DOut, stride_o, Lse, Delta, H, left, factor,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Bring BLOCK_N more queries into the sums of dk, scale apart, and of dv."""
    q = _tokens(Q, stride_q, left, D, BLOCK_N, BLOCK_D)
    dout = _tokens(DOut, stride_o, left, D, BLOCK_N, BLOCK_D)
    lse, delta = _of_tokens(Lse, H, left, INF, BLOCK_N), _of_tokens(Delta, H, left, 0.0, BLOCK_N)
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * factor - (lse * LOG2E)[None, :])
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _of_tokens(X, stride, left, other, BLOCK: tl.constexpr):
    """A number of each of BLOCK tokens from X on."""
    n = tl.arange(0, BLOCK)
    if left is None:
        found = tl.load(X + n * stride)
    else:
        found = tl.load(X + n * stride, mask=n < left, other=other)
    return found


# --- Kernels --------------------------------------------------------------------------


@triton.jit
def _attention_fwd_kernel(
    Q, K, V, Out, Lse,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh,
    N, M, H, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Out is (B, N, H, D) and Lse (B, N, H), both contiguous."""
    tiles = tl.cdiv(N, BLOCK_N)
    n, head = tl.program_id(0) % tiles * BLOCK_N, tl.program_id(0) // tiles
    b, h, left = head // H, head % H, N - n
    K, V = _at(K, b, stride_kb, h, stride_kh, n, 0), _at(V, b, stride_kb, h, stride_kh, n, 0)
    Q = _at(Q, b, stride_qb, h, stride_qh, n, stride_qn)
    q = _tokens(Q, stride_qn, left, D, BLOCK_N, BLOCK_D)

    factor = scale * LOG2E
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    most = tl.full([BLOCK_N], -INF, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for _ in range(M // BLOCK_M):
        acc, most, total = _attend(
            acc, most, total, q, K, V, stride_kn, None, factor, D, BLOCK_M, BLOCK_D
        )
        K += BLOCK_M * stride_kn
        V += BLOCK_M * stride_kn
    if M % BLOCK_M > 0:
        acc, most, total = _attend(
            acc, most, total, q, K, V, stride_kn, M % BLOCK_M, factor, D, BLOCK_M, BLOCK_D
        )

    Out = _at(Out, b * N, H * D, h, D, n, H * D)
    _store_tokens(acc / total[:, None], Out, H * D, left, D, BLOCK_N, BLOCK_D)
    Lse, at = _at(Lse, b * N, H, h, 1, n, H), tl.arange(0, BLOCK_N)
    tl.store(Lse + at * H, (most + tl.log2(total)) * LN2, mask=at < left)


@triton.jit
def _attention_bwd_queries_kernel(
    DOut, Q, K, V, Out, Lse, DQ, Delta,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_db, stride_dn, stride_dh,
    N, M, H, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """DOut and Out are (B, N, H, D), Lse and Delta (B, N, H), all contiguous."""
    tiles = tl.cdiv(N, BLOCK_N)
    n, head = tl.program_id(0) % tiles * BLOCK_N, tl.program_id(0) // tiles
    b, h, left = head // H, head % H, N - n
    K, V = _at(K, b, stride_kb, h, stride_kh, n, 0), _at(V, b, stride_kb, h, stride_kh, n, 0)
    Q, DQ = (
        _at(Q, b, stride_qb, h, stride_qh, n, stride_qn),
        _at(DQ, b, stride_db, h, stride_dh, n, stride_dn),
    )
    DOut, Out = _at(DOut, b * N, H * D, h, D, n, H * D), _at(Out, b * N, H * D, h, D, n, H * D)
    Lse, Delta = _at(Lse, b * N, H, h, 1, n, H), _at(Delta, b * N, H, h, 1, n, H)
    q = _tokens(Q, stride_qn, left, D, BLOCK_N, BLOCK_D)
    dout = _tokens(DOut, H * D, left, D, BLOCK_N, BLOCK_D)
    out = _tokens(Out, H * D, left, D, BLOCK_N, BLOCK_D)
    lse = _of_tokens(Lse, H, left, INF, BLOCK_N) * LOG2E
    delta, at = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1), tl.arange(0, BLOCK_N)
    tl.store(Delta + at * H, delta, mask=at < left)

    factor = scale * LOG2E
    dq = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for _ in range(M // BLOCK_M):
        dq = _dq_step(dq, q, dout, lse, delta, K, V, stride_kn, None, factor, D, BLOCK_M, BLOCK_D)
        K += BLOCK_M * stride_kn
        V += BLOCK_M * stride_kn
    if M % BLOCK_M > 0:
        dq = _dq_step(
            dq, q, dout, lse, delta, K, V, stride_kn, M % BLOCK_M, factor, D, BLOCK_M, BLOCK_D
        )
    _store_tokens(dq * scale, DQ, stride_dn, left, D, BLOCK_N, BLOCK_D)


@triton.jit
def _attention_bwd_keys_kernel(
    DOut, Q, K, V, Lse, Delta, DK, DV,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_db, stride_dn, stride_dh,
    N, M, H, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(M, BLOCK_M)
    m, head = tl.program_id(0) % tiles * BLOCK_M, tl.program_id(0) // tiles
    b, h, left = head // H, head % H, M - m
    K = _at(K, b, stride_kb, h, stride_kh, m, stride_kn)
    V = _at(V, b, stride_kb, h, stride_kh, m, stride_kn)
    k = _tokens(K, stride_kn, left, D, BLOCK_M, BLOCK_D)
    v = _tokens(V, stride_kn, left, D, BLOCK_M, BLOCK_D)
    Q, DOut = _at(Q, b, stride_qb, h, stride_qh, m, 0), _at(DOut, b * N, H * D, h, D, m, 0)
    Lse, Delta = _at(Lse, b * N, H, h, 1, m, 0), _at(Delta, b * N, H, h, 1, m, 0)

    factor = scale * LOG2E
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for _ in range(N // BLOCK_N):
        dk, dv = _dkv_step(
            dk, dv, k, v, Q, stride_qn, DOut, H * D, Lse, Delta, H, None, factor, D, BLOCK_N,
            BLOCK_D,
        )  # fmt: skip
        Q += BLOCK_N * stride_qn
        DOut += BLOCK_N * H * D
        Lse += BLOCK_N * H
        Delta += BLOCK_N * H
    if N % BLOCK_N > 0:
        dk, dv = _dkv_step(
            dk, dv, k, v, Q, stride_qn, DOut, H * D, Lse, Delta, H, N % BLOCK_N, factor, D,
            BLOCK_N, BLOCK_D,
        )  # fmt: skip
    DK = _at(DK, b, stride_db, h, stride_dh, m, stride_dn)
    DV = _at(DV, b, stride_db, h, stride_dh, m, stride_dn)
    _store_tokens(dk * scale, DK, stride_dn, left, D, BLOCK_M, BLOCK_D)
    _store_tokens(dv, DV, stride_dn, left, D, BLOCK_M, BLOCK_D)


# --- Launch ---------------------------------------------------------------------------

# Not measured yet. Of tiles that compile without spills those with the fewest instructions a score
# (`benchmarks/static_cost.py`). Products in fp32 are made without tensor cores, in small tiles.


def fwd_config(B: int, N: int, M: int, H: int, D: int, itemsize: int) -> Config:
    """How `fwd` is launched on q (B, N, H, D) and k, v (B, M, H, D)."""
    block_n = _own(N, itemsize)
    block_m = _others(M, 128 if block_n == 128 and D <= 64 else 64, itemsize)
    return _config(B * H * cdiv(N, block_n), D, block_n, block_m, block_n == 128, stages=3)


def bwd_queries_config(
    B: int, N: int, M: int, H: int, D: int, itemsize: int, wgmma: bool
) -> Config:
    """How the gradient of q is launched."""
    block_n = _own(N, itemsize)
    block_m = _others(M, 64 if D <= 64 else 32 if wgmma else 16, itemsize)
    return _config(B * H * cdiv(N, block_n), D, block_n, block_m, block_n == 128, stages=2)


def bwd_keys_config(B: int, N: int, M: int, H: int, D: int, itemsize: int, wgmma: bool) -> Config:
    """How the gradients of k and v are launched; without wgmma operands take more registers."""
    block_m = _own(M, itemsize)
    block_n = _others(N, (64 if D <= 64 else 32) // (1 if wgmma or D <= 32 else 2), itemsize)
    return _config(B * H * cdiv(M, block_m), D, block_n, block_m, block_m == 128, stages=2)


def _own(size: int, itemsize: int) -> int:
    """Tokens that a program owns: 128 unless a tenth of what the tiles hold would be empty.

    1568 tokens are 13 such tiles, 6% of them empty; 392 would be 4, 23%, and are 7 of 64, 13%.
    """
    if itemsize > 2:
        return block(size, 32)
    return block(size, 128 if cdiv(size, 128) * 128 * 0.9 <= size else 64)


def _others(size: int, most: int, itemsize: int) -> int:
    """Tokens that a program takes at a time of those it walks over."""
    return block(size, most if itemsize == 2 else 32)


def _config(
    programs: int, D: int, block_n: int, block_m: int, wide: bool, stages: int
) -> Config:  # fmt: skip
    sizes = {"BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_D": block(D, 2 * D)}
    return Config((programs,), {"D": D} | sizes, 8 if wide else 4, stages)


def fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, N, H, D), k and v (B, M, H, D) -> out (B, N, H, D), lse (B, N, H) in fp32."""
    B, N, H, D = q.shape
    M = k.shape[1]
    out = q.new_empty(B, N, H, D)
    lse = q.new_empty(B, N, H, dtype=torch.float32)
    q, k, v = _readable(q, k, v)
    grid, arguments, warps, stages = fwd_config(B, N, M, H, D, q.itemsize)
    with _runtime.on_device(q):
        _attention_fwd_kernel[grid](
            q, k, v, out, lse, *q.stride()[:3], *k.stride()[:3], N, M, H, scale,
            **arguments, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, lse


def bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Write dq (B, N, H, D), dk and dv (B, M, H, D), the latter two of the same strides."""
    B, N, H, D = q.shape
    M = k.shape[1]
    q, k, v = _readable(q, k, v)
    dout, out, lse = dout.contiguous(), out.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    shape = (B, N, M, H, D, q.itemsize, _runtime.has_wgmma(q))
    strides, sizes = (*q.stride()[:3], *k.stride()[:3]), (N, M, H, scale)
    with _runtime.on_device(q):
        grid, arguments, warps, stages = bwd_queries_config(*shape)
        _attention_bwd_queries_kernel[grid](
            dout, q, k, v, out, lse, dq, delta, *strides, *dq.stride()[:3], *sizes,
            **arguments, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        grid, arguments, warps, stages = bwd_keys_config(*shape)
        _attention_bwd_keys_kernel[grid](
            dout, q, k, v, lse, delta, dk, dv, *strides, *dk.stride()[:3], *sizes,
            **arguments, num_warps=warps, num_stages=stages,
        )  # fmt: skip


def _readable(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With channels side by side, and k and v alike."""
    q = q if q.stride(3) == 1 else q.contiguous()
    if k.stride() != v.stride() or k.stride(3) != 1:
        k, v = k.contiguous(), v.contiguous()
    return q, k, v

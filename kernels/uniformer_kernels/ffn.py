"""Feed-forward network, the FFN of eq. 3, with what surrounds it in a block.

    y = x + scale * (GELU(norm(x) W1^T + b1) W2^T + b2)

with the exact GELU, h * (1 + erf(h / sqrt(2))) / 2. The hidden layer, four times as wide as x, is
made a piece at a time and never stored; the gradient makes it anew. So x alone is kept for it.

On a GPU a program has a tile of rows on its chip (`ffn_triton.py`, up to 128 channels; wider ones
are left to the library's products). On a CPU a chunk of rows stays in the cache of a thread
(`csrc/ffn_cpu.cpp`); backward, and what that does not serve, in that of all.

Shapes: M rows (B * T * H * W), C channels, F hidden channels.
Paper: Li et al. 2022, https://arxiv.org/abs/2201.04676, eq. 3.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from uniformer_kernels import _runtime, products_native
from uniformer_kernels._chunked import (
    Chunks,
    accumulate,
    compute_dtype,
    fitted,
    prepare,
    product,
    product_into,
    serves,
    some,
    spread,
    summed,
    through_norm,
)
from uniformer_kernels._norm import (
    NO_NORM,
    SCHEMA,
    Norm,
    Prologue,
    Sums,
    check_norm,
    norm_ref,
)
from uniformer_kernels._operator import Operator, once_differentiable

__all__ = ["ffn", "ffn_ref"]

WIDEST = 128  # channels of which a tile of rows and both matrices' tiles fit a GPU's registers

_runtime.register("ffn", {"cuda": ("triton", "chunked"), "cpu": ("native", "chunked", "triton")})
_triton = partial(_runtime.triton_kernels, "ffn")


# --- Reference ------------------------------------------------------------------------


def ffn_ref(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *,
    norm: Norm | None = None, scale: Tensor | None = None, residual: bool = False,
) -> Tensor:  # fmt: skip
    """`ffn` in plain PyTorch; a norm of the batch takes the statistics of x itself."""
    w1, w2 = w1.to(x.dtype), w2.to(x.dtype)
    b1, b2 = (None if b is None else b.to(x.dtype) for b in (b1, b2))
    z = x if norm is None else norm_ref(x, norm)
    y = F.linear(F.gelu(F.linear(z, w1.flatten(1), b1)), w2.flatten(1), b2)
    y = y if scale is None else y * scale.to(y.dtype).view(-1, *[1] * (y.ndim - 1))
    return x + y if residual else y


# --- In chunks ------------------------------------------------------------------------


def _fwd_chunked(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    norm: Prologue | None, scale: Tensor | None, residual: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x (M, C), w1 (F, C), w2 (C, F), scale (B,) -> y (M, C)."""
    chunks = Chunks(norm, x, compute_dtype(x, dtype))
    y = x.new_empty(len(x), len(w2), dtype=x.dtype if residual else dtype)
    w1, b1 = (w1, b1) if norm is None else norm.fold(w1, b1)
    w1, w2 = w1.to(chunks.dtype).t(), w2.to(chunks.dtype).t()
    b1, b2 = (None if b is None else b.to(chunks.dtype) for b in (b1, b2))
    scale = spread(scale, len(x))
    hidden, buffer = chunks.buffer(w1.shape[1]), chunks.buffer(y.shape[1])
    for rows, xhat in chunks:
        a = torch.ops.aten.gelu_(product(xhat, w1, b1, hidden))
        added = x[rows] if residual else None
        product_into(y[rows], a, w2, b2, buffer, added, some(scale, rows))
    return y


def _bwd_chunked(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, norm: Prologue | None,
    scale: Tensor | None, residual: bool, dtype: torch.dtype, group: str, with_dx: bool,
    with_dw: bool,
) -> tuple[Tensor | None, Sums, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx (M, C) in x's dtype; gradients of w1 (F, C) and the norm, of b1, of w2 and of b2."""
    chunks = Chunks(norm, x, compute_dtype(x, dtype))
    exact = torch.promote_types(torch.float32, chunks.dtype)
    dx = x.new_empty(x.shape) if with_dx else None
    G, db1 = x.new_zeros(w1.shape, dtype=exact), x.new_zeros(len(w1), dtype=exact)
    dw2, db2 = x.new_zeros(w2.shape, dtype=exact), x.new_zeros(len(w2), dtype=exact)
    c1, bias = (w1, b1) if norm is None else norm.fold(w1, b1)
    c1, c2 = c1.to(chunks.dtype), w2.to(chunks.dtype)
    bias, scale = None if bias is None else bias.to(chunks.dtype), spread(scale, len(x))
    hidden, slope, buffer = (chunks.buffer(width) for width in (len(w1), len(w1), x.shape[1]))
    for rows, xhat in chunks:
        d = chunks.gradient(dy[rows], some(scale, rows))
        a = product(xhat, c1.t(), bias, hidden)
        dh = product(d, c2, None, slope)
        if not products_native.gelu_bwd_(a, dh):
            torch.ops.aten.gelu_backward.grad_input(dh, a, grad_input=dh)
            torch.ops.aten.gelu_(a)
        if with_dw or norm is not None:
            accumulate(G, dh.t(), xhat)
            db1 += summed(dh, exact)
        if with_dw:
            accumulate(dw2, d.t(), a)
            db2 += summed(d, exact)
        if chunks.per_row:
            g = chunks.through_rows(rows, product(dh, c1, None, buffer))
            if dx is not None:
                dx[rows] = g + dy[rows] if residual else g
        elif dx is not None:
            added = dy[rows] if residual and norm is None else None
            product_into(dx[rows], dh, c1, None, buffer, added)
    sums = chunks.sums(G, db1, w1)
    if dx is not None and norm is not None and not chunks.per_row:
        through_norm(dx, x, norm, sums, group, dy if residual else None)
    return dx, sums, db1, dw2, db2


# --- Ops: shapes, dispatch, autograd --------------------------------------------------


def _fwd_kernel(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, stats: Tensor | None,
    gamma: Tensor | None, beta: Tensor | None, eps: float, of_batch: bool, group: str,
    per_row: bool, scale: Tensor | None, residual: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    in_chunks = serves("ffn", x, dtype)
    if in_chunks and products_native.serves(x, dtype, w1, b1, w2, b2):
        norm = (stats, gamma, beta, eps, per_row)
        return products_native.ffn(x, w1, b1, w2, b2, norm, scale, residual, dtype)
    prologue = Prologue.of(x, stats, gamma, beta, eps, of_batch, per_row)
    rows, m1, m2 = x.reshape(-1, x.shape[-1]), w1.flatten(1), w2.flatten(1)
    run = _fwd_chunked if in_chunks else _triton().fwd
    with torch.autocast(x.device.type, enabled=False):
        y = run(rows, m1, b1, m2, b2, prologue, scale, residual, dtype)
    return torch.ops.aten._unsafe_view(y, x.shape)  # which may be changed in place


def _fwd_fake(
    x, w1, b1, w2, b2, stats, gamma, beta, eps, of_batch, group, per_row, scale, residual, dtype
):  # fmt: skip
    return x.new_empty(x.shape, dtype=x.dtype if residual else dtype)


def _bwd_kernel(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, stats: Tensor | None,
    gamma: Tensor | None, beta: Tensor | None, eps: float, of_batch: bool, group: str,
    per_row: bool, scale: Tensor | None, residual: bool, dtype: torch.dtype, with_dx: bool,
    with_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx in x's dtype; gradients of w1, b1, w2, b2, gamma and beta in the weights'.

    Those that are not wanted come with no elements.
    """
    norm, C = Prologue.of(x, stats, gamma, beta, eps, of_batch, per_row), x.shape[-1]
    m1, m2 = w1.flatten(1), w2.flatten(1)
    run = _bwd_chunked if serves("ffn", x, dtype) else _triton().bwd
    with torch.autocast(x.device.type, enabled=False):
        dx, sums, db1, dw2, db2 = run(
            dy.reshape(-1, C), x.reshape(-1, C), m1, b1, m2, norm, scale, residual, dtype, group,
            with_dx, with_dw,
        )  # fmt: skip
    normed = with_dw and norm is not None
    return (
        fitted(dx, x, with_dx),
        fitted(sums.weight, w1, with_dw),
        fitted(db1, m1[:, 0], with_dw),
        fitted(dw2, w2, with_dw),
        fitted(db2, m2[:, 0], with_dw),
        fitted(sums.gamma, m1[0], normed),
        fitted(sums.beta, m1[0], normed),
    )


def _bwd_fake(
    dy, x, w1, b1, w2, stats, gamma, beta, eps, of_batch, group, per_row, scale, residual, dtype,
    with_dx, with_dw,
):  # fmt: skip
    C, F = x.shape[-1], w1.shape[0]
    channels = C if with_dw and (stats is not None or per_row) else 0
    return (
        x.new_empty(x.shape if with_dx else 0),
        w1.new_empty(w1.shape if with_dw else 0),
        w1.new_empty(F if with_dw else 0),
        w2.new_empty(w2.shape if with_dw else 0),
        w2.new_empty(C if with_dw else 0),
        w1.new_empty(channels),
        w1.new_empty(channels),
    )


_fwd = Operator(
    f"ffn(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, {SCHEMA}, Tensor? scale,"
    " bool residual, ScalarType dtype) -> Tensor",
    _fwd_kernel, _fwd_fake,
)  # fmt: skip
_bwd = Operator(
    f"ffn_bwd(Tensor dy, Tensor x, Tensor w1, Tensor? b1, Tensor w2, {SCHEMA}, Tensor? scale,"
    " bool residual, ScalarType dtype, bool with_dx, bool with_dw)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_kernel, _bwd_fake,
)  # fmt: skip


@_fwd.differentiable
class _Fwd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        x, w1, b1, w2, _, stats, gamma, beta, *constants, scale, residual, dtype = args
        ctx.save_for_backward(x, w1, b1, w2, stats, gamma, beta, scale)
        ctx.rest = constants, residual, dtype
        return _fwd.below_autograd(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        *tensors, scale = ctx.saved_tensors  # x, w1, b1, w2, stats, gamma, beta
        constants, residual, dtype = ctx.rest
        for_x, for_w1, for_b1, for_w2, for_b2, _, for_gamma, for_beta = ctx.needs_input_grad[:8]
        wanted = (for_x, for_w1, for_b1, for_w2, for_b2, for_gamma, for_beta)
        found = _bwd(dy, *tensors, *constants, scale, residual, dtype, for_x, any(wanted[1:]))
        dx, dw1, db1, dw2, db2, dgamma, dbeta = (
            g if want else None for g, want in zip(found, wanted, strict=True)
        )
        return dx, dw1, db1, dw2, db2, None, dgamma, dbeta, *(None,) * 7


@register_flop_formula(_fwd.packet)
def _fwd_flops(x_shape, w1_shape, *_, **__):
    return 4 * torch.Size(x_shape).numel() * w1_shape[0]


@register_flop_formula(_bwd.packet)
def _bwd_flops(dy_shape, x_shape, w1_shape, *rest, **_):
    """As usual, without what is made anew."""
    with_dx, with_dw = rest[-2:]
    return _fwd_flops(x_shape, w1_shape) * (with_dx + with_dw)


# --- Public ---------------------------------------------------------------------------


def ffn(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *,
    norm: Norm | None = None, scale: Tensor | None = None, residual: bool = False,
) -> Tensor:  # fmt: skip
    """Two products with an exact GELU between: scale * (gelu(norm(x) @ w1.T + b1) @ w2.T + b2).

    Differentiable once (under `backend("reference")` twice), with respect to x, the weights, the
    biases and the norm's; the gradient of x goes through the norm's statistics too. Under autocast
    the products are made in its dtype, while x is normalised, and added, in its own.

    Args:
        x: (B, ..., C), fp32, fp16, bf16 or fp64.
        w1: (F, C), or (F, C, 1, 1, 1) as of an nn.Conv3d; of x's dtype, or fp32.
        b1: (F,), likewise, or None.
        w2: (C, F), likewise.
        b2: (C,), likewise.
        norm: BatchNorm of x; in training mode `Norm.stats` are x's. Or LayerNorm, as for
            `pointwise`.
        scale: (B,), factor on the result for each clip; it gets no gradient.
        residual: whether to add `x`; no tensor, unlike `pointwise`'s.

    Returns:
        (B, ..., C), in autocast's dtype or x's; with `residual` always in x's.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    _check(x, w1, b1, w2, b2, norm, scale)
    _runtime.check_residual(residual)
    dtype, plain = prepare("ffn", x, norm)
    wide = x.is_cuda and x.shape[-1] > WIDEST and _runtime.current_backend() != "triton"
    if plain or wide:
        return ffn_ref(x, w1, b1, w2, b2, norm=norm, scale=scale, residual=residual)
    return _fwd(x, w1, b1, w2, b2, *(norm or NO_NORM), scale, residual, dtype)


def _check(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, norm: Norm | None,
    scale: Tensor | None,
) -> None:  # fmt: skip
    for name, w in (("w1", w1), ("w2", w2)):
        if not isinstance(w, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(w).__name__}")
    _runtime.check_dtypes(x, w1=w1, b1=b1, w2=w2, b2=b2)
    if x.ndim < 2:
        raise ValueError(f"x must be (B, ..., C), got shape {tuple(x.shape)}")
    C = x.shape[-1]
    hidden = w1.shape[0] if w1.ndim else 0
    for name, w, size in (("w1", w1, (hidden, C)), ("w2", w2, (C, hidden))):
        if w.shape not in (size, (*size, 1, 1, 1)) or hidden == 0:
            raise ValueError(
                f"{name} must be {size} or {(*size, 1, 1, 1)}, channels being the last axis of x "
                f"{tuple(x.shape)}, got {tuple(w.shape)}"
            )
    weights = {"w1": (w1, w1.shape), "w2": (w2, w2.shape)}
    _runtime.check_shapes(x, weights | {"b1": (b1, (hidden,)), "b2": (b2, (C,))})
    check_norm(norm, x, scale)

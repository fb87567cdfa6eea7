"""1x1x1 convolution, a matrix product over channels, with what surrounds it in a local block.

    y = residual + scale * (norm(x) W^T + bias)

`norm` is a BatchNorm whose statistics are known, or a LayerNorm, applied to what is loaded; `scale`
is the drop path's, a number for each clip. Statistics of y come out on demand, for the next norm.

On a GPU a program makes a tile of rows times a tile of channels (`pointwise_triton.py`). On a CPU
a thread does so in C++ (`csrc/pointwise_cpu.cpp`); backward, and what that does not serve, goes in
chunks of rows through the library's matrix product.

Shapes: M rows (B * T * H * W), K channels in, N channels out.
Paper: Li et al. 2022, https://arxiv.org/abs/2201.04676, eq. 5 and 6.
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
    channel_stats,
    check_norm,
    norm_ref,
)
from uniformer_kernels._operator import Operator, once_differentiable

__all__ = ["pointwise", "pointwise_fork", "pointwise_ref", "pointwise_stats"]

_runtime.register(
    "pointwise", {"cuda": ("triton", "chunked"), "cpu": ("native", "chunked", "triton")}
)
_triton = partial(_runtime.triton_kernels, "pointwise")


# --- Reference ------------------------------------------------------------------------


def pointwise_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: Norm | None = None,
    scale: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`pointwise` in plain PyTorch; a norm of the batch takes the statistics of x itself."""
    x = x if norm is None else norm_ref(x, norm)
    y = F.linear(x, weight.flatten(1).to(x.dtype), None if bias is None else bias.to(x.dtype))
    y = y if scale is None else y * scale.to(y.dtype).view(-1, *[1] * (y.ndim - 1))
    return y if residual is None else (residual + y).to(residual.dtype)


# --- In chunks ------------------------------------------------------------------------


def _fwd_chunked(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Prologue | None, scale: Tensor | None,
    residual: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x (M, K), weight (N, K), scale (B,), residual (M, N) -> y (M, N)."""
    chunks = Chunks(norm, x, compute_dtype(x, dtype))
    y = x.new_empty(len(x), len(weight), dtype=dtype if residual is None else residual.dtype)
    weight, bias = (weight, bias) if norm is None else norm.fold(weight, bias)
    weight, scale = weight.to(chunks.dtype).t(), spread(scale, len(x))
    bias = None if bias is None else bias.to(chunks.dtype)
    buffer = chunks.buffer(y.shape[1])
    for rows, xhat in chunks:
        product_into(y[rows], xhat, weight, bias, buffer, some(residual, rows), some(scale, rows))
    return y


def _bwd_chunked(
    dy: Tensor, x: Tensor, weight: Tensor, norm: Prologue | None, scale: Tensor | None,
    more: Tensor | None, dtype: torch.dtype, group: str, with_dx: bool, with_dw: bool,
) -> tuple[Tensor | None, Sums, Tensor]:  # fmt: skip
    """dx (M, K) in x's dtype, the gradients of the weight (N, K) and norm, and of the bias (N,).

    `more` (M, K) is added to dx.
    """
    chunks = Chunks(norm, x, compute_dtype(x, dtype))
    exact = torch.promote_types(torch.float32, chunks.dtype)
    dx = x.new_empty(x.shape) if with_dx else None
    G, db = x.new_zeros(weight.shape, dtype=exact), x.new_zeros(len(weight), dtype=exact)
    gamma = None if norm is None or chunks.per_row else norm.gamma
    cast = (weight if gamma is None else weight * gamma).to(chunks.dtype)
    buffer, scale = chunks.buffer(x.shape[1]), spread(scale, len(x))
    for rows, xhat in chunks:
        d = chunks.gradient(dy[rows], some(scale, rows))
        if with_dw or norm is not None:
            accumulate(G, d.t(), xhat)
            db += summed(d, exact)
        if chunks.per_row:
            g = chunks.through_rows(rows, product(d, cast, None, buffer))
            if dx is not None:
                dx[rows] = g if more is None else g + more[rows]
        elif dx is not None:
            added = some(more, rows) if norm is None else None
            product_into(dx[rows], d, cast, None, buffer, added)
    sums = chunks.sums(G, db, weight)
    if dx is not None and norm is not None and not chunks.per_row:
        through_norm(dx, x, norm, sums, group, more)
    return dx, sums, db


# --- Ops: shapes, dispatch, autograd --------------------------------------------------


def _fwd_kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, stats: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, eps: float, of_batch: bool, group: str, per_row: bool,
    scale: Tensor | None, residual: Tensor | None, with_stats: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    in_chunks = serves("pointwise", x, dtype)
    if in_chunks and products_native.serves(x, dtype, weight, bias, residual):
        norm = (stats, gamma, beta, eps, per_row)
        out = products_native.pointwise(x, weight, bias, norm, scale, residual, dtype)
        return out, channel_stats(out) if with_stats else out.new_empty(0)
    prologue = Prologue.of(x, stats, gamma, beta, eps, of_batch, per_row)
    rows, weight = x.reshape(-1, x.shape[-1]), weight.flatten(1)
    residual = None if residual is None else residual.reshape(-1, len(weight))
    arguments = (rows, weight, bias, prologue, scale, residual, dtype)
    with torch.autocast(x.device.type, enabled=False):
        if in_chunks:
            out = _fwd_chunked(*arguments)
            found = channel_stats(out) if with_stats else None
        else:
            out, found = _triton().fwd(*arguments, with_stats)
    out = torch.ops.aten._unsafe_view(out, (*x.shape[:-1], len(weight)))  # may change in place
    return out, out.new_empty(0) if found is None else found


def _fwd_fake(
    x, weight, bias, stats, gamma, beta, eps, of_batch, group, per_row, scale, residual,
    with_stats, dtype,
):  # fmt: skip
    N, dtype = weight.shape[0], dtype if residual is None else residual.dtype
    found = x.new_empty(
        (2, N) if with_stats else 0, dtype=torch.promote_types(torch.float32, dtype)
    )
    return x.new_empty((*x.shape[:-1], N), dtype=dtype), found


def _bwd_kernel(
    dy: Tensor, x: Tensor, weight: Tensor, stats: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, eps: float, of_batch: bool, group: str, per_row: bool,
    scale: Tensor | None, more: Tensor | None, dtype: torch.dtype, with_dx: bool, with_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx in x's dtype, plus `more`; gradients of weight, bias, gamma and beta in the weight's.

    Those that are not wanted come with no elements.
    """
    norm = Prologue.of(x, stats, gamma, beta, eps, of_batch, per_row)
    rows, matrix = x.reshape(-1, x.shape[-1]), weight.flatten(1)
    more = None if more is None else more.reshape(rows.shape)
    arguments = (dy.reshape(-1, len(weight)), rows, matrix, norm, scale, more, dtype, group)
    with torch.autocast(x.device.type, enabled=False):
        run = _bwd_chunked if serves("pointwise", x, dtype) else _triton().bwd
        dx, sums, db = run(*arguments, with_dx, with_dw)
    normed = with_dw and norm is not None
    return (
        fitted(dx, x, with_dx),
        fitted(sums.weight, weight, with_dw),
        fitted(db, matrix[:, 0], with_dw),
        fitted(sums.gamma, matrix[0], normed),
        fitted(sums.beta, matrix[0], normed),
    )


def _bwd_fake(
    dy, x, weight, stats, gamma, beta, eps, of_batch, group, per_row, scale, more, dtype, with_dx,
    with_dw,
):  # fmt: skip
    N, normed = weight.shape[0], with_dw and (stats is not None or per_row)
    channels = x.shape[-1] if normed else 0
    return (
        x.new_empty(x.shape if with_dx else 0),
        weight.new_empty(weight.shape if with_dw else 0),
        weight.new_empty(N if with_dw else 0),
        weight.new_empty(channels),
        weight.new_empty(channels),
    )


_fwd = Operator(
    f"pointwise(Tensor x, Tensor weight, Tensor? bias, {SCHEMA}, Tensor? scale,"
    " Tensor? residual, bool with_stats, ScalarType dtype) -> (Tensor, Tensor)",
    _fwd_kernel, _fwd_fake,
)  # fmt: skip
_bwd = Operator(
    f"pointwise_bwd(Tensor dy, Tensor x, Tensor weight, {SCHEMA}, Tensor? scale,"
    " Tensor? more, ScalarType dtype, bool with_dx, bool with_dw)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_kernel, _bwd_fake,
)  # fmt: skip


@_fwd.differentiable
class _Fwd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        x, weight, _, stats, gamma, beta, *constants, scale, _, _, dtype = args
        ctx.save_for_backward(x, weight, stats, gamma, beta, scale)
        ctx.rest = constants, dtype
        ctx.set_materialize_grads(False)  # of a fork a result may be of no use
        y, found = _fwd.below_autograd(*args)
        ctx.mark_non_differentiable(found)
        return y, found

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _, more=None):
        *tensors, scale = ctx.saved_tensors  # x, weight, stats, gamma, beta
        constants, dtype = ctx.rest
        wanted = ctx.needs_input_grad
        for_x, for_weight, for_bias, _, for_gamma, for_beta, *_, for_residual, _, _ = wanted
        dx = dw = db = dgamma = dbeta = None
        with_dw = for_weight or for_bias or for_gamma or for_beta
        if dy is None:
            dx = more
        elif for_x or with_dw:
            dx, dw, db, dgamma, dbeta = _bwd(
                dy, *tensors, *constants, scale, more, dtype, for_x, with_dw
            )
        return (
            dx if for_x else None, dw if for_weight else None, db if for_bias else None, None,
            dgamma if for_gamma else None, dbeta if for_beta else None, *(None,) * 5,
            dy if for_residual else None, None, None,
        )  # fmt: skip


class _Fork(_Fwd):
    """x is a result too, and what comes back for it goes into the gradient of x as that is made."""

    @staticmethod
    def forward(ctx, *args):
        return *_Fwd.forward(ctx, *args), args[0]


@register_flop_formula(_fwd.packet)
def _fwd_flops(x_shape, weight_shape, *_, **__):
    return 2 * torch.Size(x_shape).numel() * weight_shape[0]


@register_flop_formula(_bwd.packet)
def _bwd_flops(dy_shape, x_shape, weight_shape, *rest, **_):
    with_dx, with_dw = rest[-2:]
    return _fwd_flops(x_shape, weight_shape) * (with_dx + with_dw)


# --- Public ---------------------------------------------------------------------------


def pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: Norm | None = None,
    scale: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Mix the channels of every token: residual + scale * (norm(x) @ weight.T + bias).

    Differentiable once (under `backend("reference")` twice), with respect to x, weight, bias, the
    norm's weight and bias, and the residual; the gradient of x goes through the norm's statistics
    too. Under autocast the product is made in its dtype, while x is normalised, and the residual
    added, in their own.

    Args:
        x: (B, ..., K), fp32, fp16, bf16 or fp64.
        weight: (N, K), or (N, K, 1, 1, 1) as of an nn.Conv3d; of x's dtype, or fp32.
        bias: (N,), likewise.
        norm: BatchNorm of x; in training mode `Norm.stats` are x's, as `channel_stats`,
            `dwconv3d_stats` and `pointwise_stats` give them, in eval mode running ones, with
            `of_batch=False`. Or LayerNorm, `Norm(None, per_row=True, ...)`, which on a GPU
            PyTorch makes in a pass of its own.
        scale: (B,), factor on the result for each clip; it gets no gradient.
        residual: (B, ..., N), added last.

    Returns:
        (B, ..., N), in the residual's dtype, else autocast's or x's.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    return _run(x, weight, bias, norm, scale, residual, False)[0]


def pointwise_stats(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: Norm | None = None,
    scale: Tensor | None = None, residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`pointwise`, and what a BatchNorm after it needs to know, without a pass of its own.

    Arguments are those of `pointwise`.

    Returns:
        The result of `pointwise`, and (2, N): mean and biased variance of its channels, in fp32,
        of fp64 in fp64. They carry no gradient.

    Raises:
        ValueError: as `pointwise`; or x has no elements.
    """
    if x.numel() == 0:
        raise ValueError(f"x must have elements to have statistics, got {tuple(x.shape)}")
    return _run(x, weight, bias, norm, scale, residual, True)


def pointwise_fork(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: Norm | None = None,
    scale: Tensor | None = None, residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The first product of a branch, and x for the residual around that branch:

        y, x = pointwise_fork(x, weight, bias, norm=norm)
        x = pointwise(branch(y), weight2, bias2, residual=x)

    Backward, the gradient that comes back for the x that is returned is added to this operator's
    own before that is stored. Of the x that went in, autograd would read both gradients again and
    store their sum: the right numbers too, but two more passes over x. `backend("reference")` and
    `torch.compile` do so anyhow.

    Arguments are those of `pointwise`; `residual` is added to y, as there.

    Returns:
        The result of `pointwise`, and x: the same memory, not to be changed in place.

    Raises:
        ValueError: as `pointwise`.
    """
    _check(x, weight, bias, norm, scale, residual)
    dtype, plain = prepare("pointwise", x, norm)
    if plain:
        return pointwise_ref(x, weight, bias, norm=norm, scale=scale, residual=residual), x
    args = (x, weight, bias, *(norm or NO_NORM), scale, residual, False, dtype)
    if x.requires_grad and _fwd.goes_straight(args):
        y, _, x = _Fork.apply(*args)
        return y, x
    return _fwd(*args)[0], x  # a compiler fuses the sum itself, or leaves it


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, scale: Tensor | None,
    residual: Tensor | None, with_stats: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(x, weight, bias, norm, scale, residual)
    dtype, plain = prepare("pointwise", x, norm)
    if plain:
        y = pointwise_ref(x, weight, bias, norm=norm, scale=scale, residual=residual)
        return y, channel_stats(y) if with_stats else y
    return _fwd(x, weight, bias, *(norm or NO_NORM), scale, residual, with_stats, dtype)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, scale: Tensor | None,
    residual: Tensor | None,
) -> None:  # fmt: skip
    _runtime.check_dtypes(x, weight=weight, bias=bias, residual=residual)
    if x.ndim < 2:
        raise ValueError(f"x must be (B, ..., K), got shape {tuple(x.shape)}")
    N, K = weight.shape[0] if weight.ndim else 0, x.shape[-1]
    if weight.shape not in ((N, K), (N, K, 1, 1, 1)) or N == 0:
        raise ValueError(
            f"weight must be (N, {K}) or (N, {K}, 1, 1, 1), channels being the last axis of x "
            f"{tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    shapes = {"weight": (weight, weight.shape), "bias": (bias, (N,))}
    _runtime.check_shapes(x, shapes | {"residual": (residual, (*x.shape[:-1], N))})
    check_norm(norm, x, scale)

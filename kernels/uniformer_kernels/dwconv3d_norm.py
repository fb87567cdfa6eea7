"""Depthwise 3-D convolution and the LayerNorm of its result, as a global block begins.

    y = dwconv3d(x)        z = gamma * (y - mean(y)) / sqrt(var(y) + eps) + beta

over the channels of each token. Both y, for the residual, and z, for the product behind, are
stored; on a GPU one kernel does so (`dwconv3d_norm_triton.py`), where there are tokens enough.
The gradient is that of the LayerNorm, by PyTorch, and then that of the convolution.

Shapes: B clips, T frames, H rows, W columns, C channels; activations are (B, T, H, W, C).
Paper: Li et al. 2022, https://arxiv.org/abs/2201.04676, eq. 1, 2 and 8.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from uniformer_kernels import _runtime
from uniformer_kernels._operator import Operator, once_differentiable
from uniformer_kernels.dwconv3d import conv_bwd, conv_flops, conv_fwd, dwconv3d_ref, prepare

__all__ = ["dwconv3d_norm", "dwconv3d_norm_ref"]

_triton = partial(_runtime.triton_kernels, "dwconv3d_norm")


# --- Reference ------------------------------------------------------------------------


def dwconv3d_norm_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, *,
    eps: float = 1e-6, residual: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`dwconv3d_norm` in plain PyTorch."""
    y = dwconv3d_ref(x, weight, bias, residual=residual)
    gamma, beta = (None if t is None else t.to(y.dtype) for t in (gamma, beta))
    return y, F.layer_norm(y, y.shape[-1:], gamma, beta, eps)


# --- Op: shapes, dispatch, autograd ---------------------------------------------------


def _affine(y: Tensor, gamma: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    """As PyTorch's LayerNorm of y takes them: on a GPU in y's dtype, on a CPU it can do better."""
    dtype = y.dtype if y.is_cuda else torch.promote_types(y.dtype, torch.float32)
    ones = torch.ones(y.shape[-1], dtype=dtype, device=y.device)
    return (
        ones if gamma is None else gamma.to(dtype),
        torch.zeros_like(ones) if beta is None else beta.to(dtype),
    )


def _fwd_kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    eps: float, residual: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, its LayerNorm in `dtype`, and of that mean and inverse deviation, (B, T, H, W, 1)."""
    if _in_one_pass(x, weight):
        return _triton().fwd(x, weight, bias, residual, gamma, beta, eps, dtype)
    y = conv_fwd(x, weight, bias, residual)
    normed, mean, rstd = torch.native_layer_norm(y, y.shape[-1:], *_affine(y, gamma, beta), eps)
    return y, normed.to(dtype), mean, rstd


def _in_one_pass(x: Tensor, weight: Tensor) -> bool:
    if x.numel() == 0 or _runtime.serving("dwconv3d", x.device) != "triton":
        return False
    return _triton().in_one_pass(x, weight.shape[2:])


def _fwd_fake(x, weight, bias, gamma, beta, eps, residual, dtype):
    exact = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (x.new_empty((*x.shape[:-1], 1), dtype=exact) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype), mean, rstd


_fwd = Operator(
    "dwconv3d_norm(Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, float eps,"
    " bool residual, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd_kernel, _fwd_fake,
)  # fmt: skip


@_fwd.differentiable
class _Fwd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        x, weight, _, gamma, beta, _, ctx.residual, _ = args
        y, normed, mean, rstd = _fwd.below_autograd(*args)
        ctx.save_for_backward(x, weight, gamma, beta, y, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return y, normed, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dnormed, *_):
        x, weight, gamma, beta, y, mean, rstd = ctx.saved_tensors
        for_x, for_weight, for_bias, for_gamma, for_beta, *_ = ctx.needs_input_grad
        with_dw = for_weight or for_bias
        dx = dw = db = dgamma = dbeta = None
        if dnormed is not None:
            through, dgamma, dbeta = torch.ops.aten.native_layer_norm_backward(
                dnormed.to(y.dtype), y, y.shape[-1:], mean, rstd, *_affine(y, gamma, beta),
                [for_x or with_dw, for_gamma, for_beta],
            )  # fmt: skip
            dy = through if dy is None or through is None else through.add_(dy)
        if dy is not None and (for_x or with_dw):
            dx, dw, db = conv_bwd(dy, x, weight, ctx.residual, for_x, with_dw)
        return (
            dx if for_x else None, dw if for_weight else None, db if for_bias else None,
            dgamma.to(gamma.dtype) if dgamma is not None and for_gamma else None,
            dbeta.to(beta.dtype) if dbeta is not None and for_beta else None, None, None, None,
        )  # fmt: skip


register_flop_formula(_fwd.packet)(conv_flops)


# --- Public ---------------------------------------------------------------------------


def dwconv3d_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, *,
    eps: float = 1e-6, residual: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`dwconv3d`, and the LayerNorm of its result, which is not read for that once more.

    On a GPU one kernel makes both, where there are tokens enough for its processors. On a CPU it is
    a convolution and PyTorch's LayerNorm: there `pointwise` normalises the rows that it reads, and
    is the one to be given a norm. Differentiable once, with respect to both results (under
    `backend("reference")` twice).

    Args:
        x: (B, T, H, W, C), and `weight`, `bias` and `residual`, as of `dwconv3d`.
        weight: (C, 1, kt, kh, kw).
        bias: (C,), or None.
        gamma: (C,), the LayerNorm's weight, of x's dtype or fp32; or None for ones.
        beta: (C,), the LayerNorm's bias, likewise; or None for zeros.
        eps: added to the variance of a token's channels.
        residual: add x to the result of the convolution.

    Returns:
        The result of `dwconv3d`, and its LayerNorm, (B, T, H, W, C), in autocast's dtype, else x's.

    Raises:
        ValueError: as `dwconv3d`; or gamma or beta are not as above.
        RuntimeError: as `dwconv3d`.
    """
    x, plain = prepare(x, weight, bias, residual)
    _runtime.check_dtypes(x, gamma=gamma, beta=beta)
    of_channels = {"gamma": (gamma, x.shape[-1:]), "beta": (beta, x.shape[-1:])}
    _runtime.check_shapes(x, of_channels)
    dtype = _runtime.product_dtype(x)
    if plain:
        y, normed = dwconv3d_norm_ref(x, weight, bias, gamma, beta, eps=eps, residual=residual)
        return y, normed.to(dtype)
    return _fwd(x, weight, bias, gamma, beta, eps, residual, dtype)[:2]

"""Depthwise 3-D convolution, stride 1, zero padding to the same size.

    y[b,t,h,w,c] = bias[c] + sum_{i,j,k} weight[c,0,i,j,k] x[b, t+i-kt//2, h+j-kh//2, w+k-kw//2, c]

and, with `residual`, plus x itself. UniFormer uses it as the dynamic position embedding (3x3x3,
with residual) and as the token affinity of the local relation aggregator (5x5x5).

The gradient of x is the same convolution of dy with the taps mirrored; that of the weight is a
correlation of dy with x. Both are linear in each argument, so that gradients of gradients are
made of the same three operations. Triton kernels are in `dwconv3d_triton.py`, C++ in `csrc/`.

Shapes: B clips, T frames, H rows, W columns, C channels; activations are (B, T, H, W, C).
Paper: Li et al. 2022, https://arxiv.org/abs/2201.04676, eq. 6 and 8.
"""

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from uniformer_kernels import _runtime, dwconv3d_native

__all__ = ["MAX_KERNEL", "dwconv3d", "dwconv3d_ref"]

MAX_KERNEL = 9  # the largest tube size of the paper's ablation

_runtime.register("dwconv3d", {"cuda": ("triton", "cuda"), "cpu": ("native", "triton")})


# --- Reference ------------------------------------------------------------------------


def dwconv3d_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: bool = False
) -> Tensor:
    """`dwconv3d` in plain PyTorch; the permuted view is channels_last_3d, so nothing is copied."""
    padding = [k // 2 for k in weight.shape[2:]]
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    y = F.conv3d(x.permute(0, 4, 1, 2, 3), weight, bias, padding=padding, groups=x.shape[-1])
    y = y.permute(0, 2, 3, 4, 1)
    return (x + y if residual else y).contiguous()


def _bwd_ref(dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> list[Tensor | None]:
    """dx (without the residual's share), dweight and dbias, those that are wanted, by PyTorch."""
    return torch.ops.aten.convolution_backward(
        dy.permute(0, 4, 1, 2, 3), x.permute(0, 4, 1, 2, 3), weight, [x.shape[-1]], [1] * 3,
        [k // 2 for k in weight.shape[2:]], [1] * 3, False, [0] * 3, x.shape[-1], wanted,
    )  # fmt: skip


def _fwd_pytorch(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> Tensor:
    """PyTorch's channels-last forward, on a CPU near the machine's peak already."""
    dtype = x.dtype
    if x.shape[-1] == 1 and dtype != torch.float32:  # there it was seen to return what lay around
        return _fwd_pytorch(x.float(), weight, bias, residual).to(dtype)
    if residual and dtype == torch.float32:  # x itself as one more weight of the middle tap
        weight = weight.clone()
        kt, kh, kw = weight.shape[2:]
        weight[:, 0, kt // 2, kh // 2, kw // 2] += 1
        residual = False
    if not torch.is_autocast_enabled(x.device.type):
        return dwconv3d_ref(x, weight, bias, residual=residual)
    with torch.autocast(x.device.type, enabled=False):  # the caller has chosen the dtypes
        return _fwd_pytorch(x, weight, bias, residual)


# --- Ops: shapes, dispatch, autograd --------------------------------------------------


@torch.library.custom_op("uniformer::dwconv3d", mutates_args=())
def _fwd(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> Tensor:
    """x (B, T, H, W, C), weight (C, 1, kt, kh, kw), bias (C,) -> y (B, T, H, W, C), contiguous."""
    served_by = _served_by(x, weight)
    if x.numel() == 0:
        return x.new_empty(x.shape)
    if served_by == "triton":
        return _triton().fwd(x, weight, bias, residual)
    if served_by == "cuda":
        return dwconv3d_native.fwd_cuda(x, weight, bias, residual)
    return _fwd_pytorch(x, weight, bias, residual)


def _served_by(x: Tensor, weight: Tensor) -> str:
    served_by = _runtime.serving("dwconv3d", x.device)
    if served_by == "cuda" and (why := dwconv3d_native.why_not_cuda(x.shape, weight.shape[2:])):
        _runtime.announce("dwconv3d runs in Triton", why)
        return "triton"
    return served_by


def _triton() -> ModuleType:
    """Its kernels, where they are first needed: not every machine has Triton."""
    from uniformer_kernels import dwconv3d_triton

    return dwconv3d_triton


@_fwd.register_fake
def _fwd_fake(x, weight, bias, residual):
    return x.new_empty(x.shape)


@torch.library.custom_op("uniformer::dwconv3d_bwd", mutates_args=())
def _bwd(
    dy: Tensor, x: Tensor, weight: Tensor, residual: bool, with_dx: bool, with_dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dy and x (B, T, H, W, C) -> dx in dy's dtype, dweight and dbias in the weight's.

    Those that are not wanted come with no elements.
    """
    served_by = _served_by(x, weight)
    dx, dw, db = _bwd_fake(dy, x, weight, residual, with_dx, with_dw)
    grads = None  # of weight and bias, (taps + 1, C)
    if dy.numel() == 0:
        return dx, dw.zero_(), db.zero_()
    if served_by == "triton":
        if with_dx:
            dx = _triton().fwd(dy, weight, None, residual, mirror=True)
        if with_dw:
            grads = _triton().bwd_weight(dy, x, weight)
    elif served_by == "cuda":
        if with_dx:
            dx = dwconv3d_native.fwd_cuda(dy, weight, None, residual, mirror=True)
        if with_dw:
            grads = dwconv3d_native.bwd_weight_cuda(dy, x, weight)
    elif served_by == "native":
        if with_dx:
            dx = _fwd_pytorch(dy, weight.flip(2, 3, 4), None, residual)
        if with_dw:
            grads = dwconv3d_native.bwd_weight_cpu(dy, x, weight)
    else:
        weight_ = weight.to(x.dtype)
        dx_, dw_, db_ = _bwd_ref(dy, x, weight_, [with_dx, with_dw, with_dw])
        if dx_ is not None:
            dx = dx_.permute(0, 2, 3, 4, 1).contiguous()
            dx = dx.add_(dy) if residual else dx
        if dw_ is not None and db_ is not None:
            dw, db = dw_.to(weight.dtype), db_.to(weight.dtype)
    if grads is not None:
        dw.copy_(grads[:-1].t().unflatten(1, (1, *weight.shape[2:])))
        db.copy_(grads[-1])
    return dx, dw, db


@_bwd.register_fake
def _bwd_fake(dy, x, weight, residual, with_dx, with_dw):
    dx = dy.new_empty(dy.shape if with_dx else 0)
    dw = weight.new_empty(weight.shape if with_dw else 0)
    return dx, dw, weight.new_empty(weight.shape[0] if with_dw else 0)


def _fwd_context(ctx, inputs, output):
    x, weight, _, ctx.residual = inputs
    ctx.save_for_backward(x, weight)


def _fwd_backward(ctx, dy):
    x, weight = ctx.saved_tensors
    with_dw = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dx, dw, db = _bwd(dy, x, weight, ctx.residual, ctx.needs_input_grad[0], with_dw)
    return (
        dx if ctx.needs_input_grad[0] else None,
        dw if ctx.needs_input_grad[1] else None,
        db if ctx.needs_input_grad[2] else None,
        None,
    )


def _bwd_context(ctx, inputs, output):
    dy, x, weight, ctx.residual, ctx.with_dx, ctx.with_dw = inputs
    ctx.save_for_backward(dy, x, weight)


def _bwd_backward(ctx, gdx, gdw, gdb):
    """Gradients of the gradients: dx is linear in dy and weight, dweight in dy and x."""
    dy, x, weight = ctx.saved_tensors
    g_dy = g_x = g_weight = None
    if ctx.with_dx:
        g_dy = _fwd(gdx, weight, None, ctx.residual)
        g_weight = _bwd(dy, gdx, weight, False, False, True)[1]
    if ctx.with_dw:
        share = _fwd(x, gdw, gdb, False)
        g_dy = share if g_dy is None else g_dy + share
        g_x = _fwd(dy, gdw.flip(2, 3, 4), None, False)
    return g_dy, g_x, g_weight, None, None, None


_fwd.register_autograd(_fwd_backward, setup_context=_fwd_context)
_bwd.register_autograd(_bwd_backward, setup_context=_bwd_context)


@register_flop_formula(torch.ops.uniformer.dwconv3d)
def _fwd_flops(x_shape, weight_shape, *_, **__):
    return 2 * math.prod(x_shape) * math.prod(weight_shape[2:])


@register_flop_formula(torch.ops.uniformer.dwconv3d_bwd)
def _bwd_flops(dy_shape, x_shape, weight_shape, residual, with_dx, with_dw, **_):
    return _fwd_flops(x_shape, weight_shape) * (with_dx + with_dw)


# --- Public ---------------------------------------------------------------------------


def dwconv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: bool = False
) -> Tensor:
    """Convolve every channel of `x` with its own kernel.

    Equivalent to `F.conv3d(x, weight, bias, padding="same", groups=C)` with channels last.
    Differentiable any number of times. Under autocast x is cast as convolutions are, but not with
    `residual`, whose sum keeps x's precision, as `x + conv(x)` does. Under the transforms of
    `torch.func` (vmap, grad, ...) it runs in plain PyTorch.

    Args:
        x: (B, T, H, W, C), fp32, fp16, bf16, or fp64, which runs in plain PyTorch; any strides,
            though only channels side by side are read without a copy.
        weight: (C, 1, kt, kh, kw), each of kt, kh, kw odd and from 1 to 9; of x's dtype, or fp32.
        bias: (C,), of the weight's dtype.
        residual: add `x` to the result.

    Returns:
        (B, T, H, W, C), contiguous, in `x`'s dtype.

    Raises:
        ValueError: a shape or dtype is not as above, or the backend that was asked for does not
            run on x's device.
        RuntimeError: the backend that was asked for cannot run here.
    """
    _check(x, weight, bias)
    device = x.device.type
    known = device in ("cpu", "cuda")
    if known and torch.is_autocast_enabled(device) and not residual and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    plain = not known or x.dtype == torch.float64 or _runtime.current_backend() == "reference"
    if x.numel() and (plain or _runtime.under_torch_func("dwconv3d")):
        return dwconv3d_ref(x, weight, bias, residual=residual)
    if x.device.type == "cpu" and x.numel() and not _needs_op(x, weight, bias):
        return _fwd_pytorch(x, weight, bias, residual)
    return _fwd(x, weight, bias, residual)


def _needs_op(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether more than PyTorch's own forward is wanted: an operator costs 70 us a call."""
    if torch.compiler.is_compiling() or _runtime.current_backend() not in ("auto", "native"):
        return True
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 5:
        raise ValueError(f"x must be (B, T, H, W, C), got shape {tuple(x.shape)}")
    C = x.shape[-1]
    if weight.ndim != 5 or weight.shape[:2] != (C, 1):
        raise ValueError(
            f"weight must be (C, 1, kt, kh, kw), C the last size of x, got {tuple(weight.shape)} "
            f"for x {tuple(x.shape)}"
        )
    if any(k % 2 == 0 or k > MAX_KERNEL for k in weight.shape[2:]):
        raise ValueError(
            f"the kernel must be odd and at most {MAX_KERNEL} along every axis, "
            f"got {tuple(weight.shape[2:])}"
        )
    if bias is not None and bias.shape != (C,):
        raise ValueError(f"bias must be ({C},), got {tuple(bias.shape)}")
    if x.dtype not in (*dwconv3d_native.DTYPES, torch.float64):
        raise ValueError(f"x must be fp32, fp16, bf16 or fp64, got {x.dtype}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name} must be of x's dtype or fp32, got {t.dtype} for x {x.dtype}")
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} must be on x's device, got {t.device} and {x.device}")

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
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from uniformer_kernels import _runtime, dwconv3d_native
from uniformer_kernels._norm import channel_stats
from uniformer_kernels._operator import Operator

__all__ = [
    "MAX_KERNEL", "conv_bwd", "conv_flops", "conv_fwd", "dwconv3d", "dwconv3d_ref",
    "dwconv3d_stats", "prepare",
]  # fmt: skip

MAX_KERNEL = 9  # the largest tube size of the paper's ablation

_runtime.register("dwconv3d", {"cuda": ("triton", "cuda"), "cpu": ("native", "triton")})
_triton = partial(_runtime.triton_kernels, "dwconv3d")
_triton_bwd = partial(_runtime.triton_kernels, "dwconv3d_bwd")


# --- Reference ------------------------------------------------------------------------


def dwconv3d_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: bool = False
) -> Tensor:
    """`dwconv3d` in plain PyTorch; the permuted view is channels_last_3d, so nothing is copied."""
    dtype = _runtime.product_dtype(x)
    if _has_no_gradient(x, dtype) and torch.is_grad_enabled():
        bias = None if bias is None else bias.float()
        with torch.autocast(x.device.type, enabled=False):
            y = dwconv3d_ref(x.float(), weight.float(), bias, residual=residual)
        return y.to(x.dtype if residual else dtype)
    padding = [k // 2 for k in weight.shape[2:]]
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    y = F.conv3d(x.permute(0, 4, 1, 2, 3), weight, bias, padding=padding, groups=x.shape[-1])
    y = y.permute(0, 2, 3, 4, 1)
    return (x + y if residual else y).contiguous()


def _has_no_gradient(x: Tensor, dtype: torch.dtype) -> bool:
    """PyTorch 2.13's weight gradients in bf16 on a CPU have nothing right in them: of 5x5x5 taps,
    of 16 channels, and who knows of what else."""
    return x.device.type == "cpu" and dtype == torch.bfloat16


def _bwd_ref(dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> list[Tensor | None]:
    """dx (without the residual's share), dweight and dbias, those that are wanted, by PyTorch."""
    if _has_no_gradient(x, x.dtype):
        found = _bwd_ref(dy.float(), x.float(), weight.float(), wanted)
        return [None if g is None else g.to(x.dtype) for g in found]
    return torch.ops.aten.convolution_backward(
        dy.permute(0, 4, 1, 2, 3), x.permute(0, 4, 1, 2, 3), weight, [x.shape[-1]], [1] * 3,
        [k // 2 for k in weight.shape[2:]], [1] * 3, False, [0] * 3, x.shape[-1], wanted,
    )  # fmt: skip


def _fwd_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, mirror: bool = False
) -> Tensor:
    """In C++, or by PyTorch's channels-last convolution what that does not serve."""
    if dwconv3d_native.serves_cpu(x, weight.shape[2:]):
        return dwconv3d_native.fwd_cpu(x, weight, bias, residual, mirror)
    dtype = x.dtype
    # In fp16 PyTorch is a hundred times slower; of one channel it returned what lay around.
    if dtype == torch.float16 or (dtype == torch.bfloat16 and x.shape[-1] == 1):
        return _fwd_cpu(x.float(), weight, bias, residual, mirror).to(dtype)
    if mirror:
        weight = weight.flip(2, 3, 4)
    if residual and dtype == torch.float32:  # x itself as one more weight of the middle tap
        weight = weight.clone()
        kt, kh, kw = weight.shape[2:]
        weight[:, 0, kt // 2, kh // 2, kw // 2] += 1
        residual = False
    return _fwd_pytorch(x, weight, bias, residual)


def _fwd_pytorch(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):  # the caller has chosen the dtypes
            return _fwd_pytorch(x, weight, bias, residual)
    y = dwconv3d_ref(x, weight, bias, residual=residual)
    return torch.ops.aten._unsafe_view(y, y.shape)  # no view of it: it may be changed in place


# --- Ops: shapes, dispatch, autograd --------------------------------------------------


def conv_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> Tensor:
    """x (B, T, H, W, C), weight (C, 1, kt, kh, kw), bias (C,) -> y (B, T, H, W, C), contiguous."""
    served_by = _served_by("fwd", x, weight)
    if x.numel() == 0:
        return x.new_empty(x.shape)
    if served_by == "reference":
        return _fwd_pytorch(x, weight, bias, residual)
    return _fwd_by(served_by, x, weight, bias, residual)


def _stats_kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool
) -> tuple[Tensor, Tensor]:
    """y as of `conv_fwd`, and (2, C): mean and biased variance of its channels."""
    if _served_by("fwd", x, weight) == "triton":
        return _triton().fwd_with_stats(x, weight, bias, residual)
    y = conv_fwd(x, weight, bias, residual)
    return y, channel_stats(y)


def _stats_fake(x, weight, bias, residual):
    exact = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(2, x.shape[-1], dtype=exact)


def _served_by(direction: str, x: Tensor, weight: Tensor) -> str:
    """The backend of "fwd" or "bwd_weight" for these shapes."""
    served_by, kernel = _runtime.serving("dwconv3d", x.device), weight.shape[2:]
    if served_by == "cuda" and (why := dwconv3d_native.why_not_cuda(x.shape, kernel)):
        _runtime.announce("dwconv3d runs in Triton", why)
        return "triton"
    if served_by == "triton" and _runtime.current_backend() == "auto":
        key = (direction, kernel, x.dtype, x.shape[4], x.shape[1:4])
        tuned = _runtime.tuned("dwconv3d", key, x.device)
        if tuned and tuned["backend"] == "cuda":
            why = _runtime.why_not("cuda") or dwconv3d_native.why_not_cuda(x.shape, kernel)
            if why is None:
                return "cuda"
            _runtime.announce("dwconv3d runs in Triton, slower than it could", why)
    return served_by


def _in_one_pass(by_dx: str, by_dw: str, x: Tensor, weight: Tensor) -> bool:
    """Whether one kernel is to make both gradients: where it was measured faster, or might be."""
    kernel = weight.shape[2:]
    if "triton" not in (by_dx, by_dw) or not _triton_bwd().in_one_pass(kernel, x.shape[3]):
        return False
    if _runtime.current_backend() == "auto":
        key = ("bwd", kernel, x.dtype, x.shape[4], x.shape[1:4])
        if tuned := _runtime.tuned("dwconv3d", key, x.device):
            return tuned["backend"] == "triton"
    return by_dx == by_dw


def _fwd_by(
    served_by: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool,
    mirror: bool = False,
) -> Tensor:  # fmt: skip
    if served_by == "triton":
        return _triton().fwd(x, weight, bias, residual, mirror)
    if served_by == "cuda":
        return dwconv3d_native.fwd_cuda(x, weight, bias, residual, mirror)
    return _fwd_cpu(x, weight, bias, residual, mirror)


def _bwd_weight_by(served_by: str, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    if served_by == "triton":
        return _triton_bwd().bwd_weight(dy, x, weight)
    if served_by == "cuda":
        return dwconv3d_native.bwd_weight_cuda(dy, x, weight)
    return dwconv3d_native.bwd_weight_cpu(dy, x, weight)


def _fwd_fake(x, weight, bias, residual):
    return x.new_empty(x.shape)


def _bwd_kernel(
    dy: Tensor, x: Tensor, weight: Tensor, residual: bool, with_dx: bool, with_dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dy and x (B, T, H, W, C) -> dx in dy's dtype, dweight and dbias in the weight's.

    Those that are not wanted come with no elements.
    """
    by_dx, by_dw = _served_by("fwd", dy, weight), _served_by("bwd_weight", x, weight)
    dx, dw, db = _bwd_fake(dy, x, weight, residual, with_dx, with_dw)
    if dy.numel() == 0:
        return dx, dw.zero_(), db.zero_()
    if by_dw == "reference":
        return _bwd_pytorch(dy, x, weight, residual, with_dx, with_dw)
    if with_dx and with_dw and _in_one_pass(by_dx, by_dw, x, weight):
        dx, grads = _triton_bwd().bwd(dy, x, weight, residual)
    else:
        if with_dx:
            dx = _fwd_by(by_dx, dy, weight, None, residual, mirror=True)
        if with_dw:
            grads = _bwd_weight_by(by_dw, dy, x, weight)
    if with_dw:  # (taps + 1, C), the bias last
        dw.copy_(grads[:-1].t().unflatten(1, (1, *weight.shape[2:])))
        db.copy_(grads[-1])
    return dx, dw, db


def _bwd_pytorch(
    dy: Tensor, x: Tensor, weight: Tensor, residual: bool, with_dx: bool, with_dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw, db = _bwd_fake(dy, x, weight, residual, with_dx, with_dw)
    dx_, dw_, db_ = _bwd_ref(dy, x, weight.to(x.dtype), [with_dx, with_dw, with_dw])
    if dx_ is not None:
        dx = dx_.permute(0, 2, 3, 4, 1).contiguous()
        dx = dx + dy if residual else dx
    if dw_ is not None and db_ is not None:
        dw, db = dw_.to(weight.dtype), db_.to(weight.dtype)
    return dx, dw, db


def _bwd_fake(dy, x, weight, residual, with_dx, with_dw):
    dx = dy.new_empty(dy.shape if with_dx else 0)
    dw = weight.new_empty(weight.shape if with_dw else 0)
    return dx, dw, weight.new_empty(weight.shape[0] if with_dw else 0)


_fwd = Operator(
    "dwconv3d(Tensor x, Tensor weight, Tensor? bias, bool residual) -> Tensor",
    conv_fwd, _fwd_fake, _fwd_pytorch,
)  # fmt: skip
_stats = Operator(
    "dwconv3d_stats(Tensor x, Tensor weight, Tensor? bias, bool residual) -> (Tensor, Tensor)",
    _stats_kernel, _stats_fake,
)  # fmt: skip
conv_bwd = Operator(
    "dwconv3d_bwd(Tensor dy, Tensor x, Tensor weight, bool residual, bool with_dx, bool with_dw)"
    " -> (Tensor, Tensor, Tensor)",
    _bwd_kernel, _bwd_fake, _bwd_pytorch,
)  # fmt: skip


@_fwd.differentiable
class _Fwd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual):
        ctx.residual = residual
        ctx.save_for_backward(x, weight)
        return _fwd.below_autograd(x, weight, bias, residual)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        dx, dw, db = conv_bwd(dy, x, weight, ctx.residual, for_x, for_weight or for_bias)
        return dx if for_x else None, dw if for_weight else None, db if for_bias else None, None


@_stats.differentiable
class _Stats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual):
        ctx.residual = residual
        ctx.save_for_backward(x, weight)
        y, stats = _stats.below_autograd(x, weight, bias, residual)
        ctx.mark_non_differentiable(stats)
        return y, stats

    @staticmethod
    def backward(ctx, dy, _):
        return _Fwd.backward(ctx, dy)


@conv_bwd.differentiable
class _Bwd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, x, weight, residual, with_dx, with_dw):
        ctx.residual, ctx.with_dx, ctx.with_dw = residual, with_dx, with_dw
        ctx.save_for_backward(dy, x, weight)
        return conv_bwd.below_autograd(dy, x, weight, residual, with_dx, with_dw)

    @staticmethod
    def backward(ctx, gdx, gdw, gdb):
        """Gradients of the gradients: dx is linear in dy and weight, dweight in dy and x."""
        dy, x, weight = ctx.saved_tensors
        g_dy = g_x = g_weight = None
        if ctx.with_dx:
            g_dy = _fwd(gdx, weight, None, ctx.residual)
            g_weight = conv_bwd(dy, gdx, weight, False, False, True)[1]
        if ctx.with_dw:
            share = _fwd(x, gdw, gdb, False)
            g_dy = share if g_dy is None else g_dy + share
            g_x = _fwd(dy, gdw.flip(2, 3, 4), None, False)
        return g_dy, g_x, g_weight, None, None, None


def conv_flops(x_shape, weight_shape, *_, **__):
    """Of any operator that begins with a convolution of x by weight."""
    return 2 * math.prod(x_shape) * math.prod(weight_shape[2:])


register_flop_formula([_fwd.packet, _stats.packet])(conv_flops)


@register_flop_formula(conv_bwd.packet)
def _bwd_flops(dy_shape, x_shape, weight_shape, residual, with_dx, with_dw, **_):
    return conv_flops(x_shape, weight_shape) * (with_dx + with_dw)


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
        bias: (C,), likewise.
        residual: add `x` to the result.

    Returns:
        (B, T, H, W, C), contiguous, in `x`'s dtype.

    Raises:
        ValueError: a shape or dtype is not as above, or the backend that was asked for does not
            run on x's device.
        RuntimeError: the backend that was asked for cannot run here.
    """
    x, plain = prepare(x, weight, bias, residual)
    if plain:
        return dwconv3d_ref(x, weight, bias, residual=residual)
    return _fwd(x, weight, bias, residual)


def dwconv3d_stats(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: bool = False
) -> tuple[Tensor, Tensor]:
    """`dwconv3d`, and what a BatchNorm after it needs to know, without a pass of its own.

    Arguments are those of `dwconv3d`; differentiable once.

    Returns:
        The result of `dwconv3d`, and (2, C): mean and biased variance of its channels, in fp32, of
        fp64 in fp64. They carry no gradient.

    Raises:
        ValueError: as `dwconv3d`; or x has no elements.
    """
    if x.numel() == 0:
        raise ValueError(f"x must have elements to have statistics, got {tuple(x.shape)}")
    x, plain = prepare(x, weight, bias, residual)
    if not plain:
        return _stats(x, weight, bias, residual)
    y = dwconv3d_ref(x, weight, bias, residual=residual)
    return y, channel_stats(y)


def prepare(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> tuple[Tensor, bool]:
    """x as autocast has it, and whether to run in plain PyTorch."""
    _check(x, weight, bias, residual)
    x = x if residual else x.to(_runtime.product_dtype(x))
    known = x.device.type in ("cpu", "cuda")
    plain = not known or x.dtype == torch.float64 or _runtime.current_backend() == "reference"
    return x, x.numel() > 0 and (plain or _runtime.under_torch_func("dwconv3d"))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> None:
    _runtime.check_residual(residual)
    if x.ndim != 5:
        raise ValueError(f"x must be (B, T, H, W, C), got shape {tuple(x.shape)}")
    C = x.shape[-1]
    if weight.ndim != 5 or weight.shape[:2] != (C, 1):
        raise ValueError(
            f"weight must be (C, 1, kt, kh, kw), C the last size of x (B, T, H, W, C), got "
            f"{tuple(weight.shape)} for x {tuple(x.shape)}"
        )
    kt, kh, kw = weight.shape[2:]
    if not (kt & kh & kw & 1 and max(kt, kh, kw) <= MAX_KERNEL):
        raise ValueError(
            f"the kernel must be odd and at most {MAX_KERNEL} along every axis, "
            f"got {tuple(weight.shape[2:])}"
        )
    _runtime.check_dtypes(x, weight=weight, bias=bias)
    _runtime.check_shapes(x, {"weight": (weight, weight.shape), "bias": (bias, (C,))})

"""Strided projection of patches and LayerNorm: the stem, and the downsampling between stages.

    y[b,t,h,w] = LayerNorm(bias + sum_{i,j,l,c} weight[:,c,i,j,l]
                                                x[b, st*t+i-pt, sh*h+j-ph, sw*w+l-pw, c])

with zeros outside of x. On a GPU it is one matrix product whose rows are gathered as they are
loaded, in channels-last or NCTHW memory, with bias and LayerNorm done on the sums
(`patch_embed_triton.py`); pixels in 0..255 are normalised on the way. On a CPU PyTorch's
convolution and LayerNorm serve: as one product it took the same time (0.96x to 1.25x, fp32 and
bf16, the three downsamplings of UniFormer-S). There a clip in NCTHW is copied to channels last
first: the stem then takes 5.6 ms instead of 14.4, fp32, 16 x 224 x 224, two threads.

Shapes: B clips, T frames, H rows, W columns, C channels in, N out; kernel kt x kh x kw.
Paper: Li et al. 2022, https://arxiv.org/abs/2201.04676, section 3.4.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from uniformer_kernels import _runtime
from uniformer_kernels._operator import Operator, once_differentiable

__all__ = ["Pixels", "patch_embed", "patch_embed_ref"]

WIDEST = 512  # channels out whose sums of a tile fit a GPU's registers

_runtime.register("patch_embed", {"cuda": ("triton", "reference"), "cpu": ("reference", "triton")})
_triton = partial(_runtime.triton_kernels, "patch_embed")


class Pixels(NamedTuple):
    """How to normalise pixels of three colours in 0..255, in the order of the channels.

    Attributes:
        mean: of the pixels scaled to 0..1.
        std: likewise.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def linear(self) -> tuple[list[float], list[float]]:
        """Scale and shift of each channel: the normalised value is pixel * scale + shift."""
        scale = [1 / (255 * std) for std in self.std]
        return scale, [-mean / std for mean, std in zip(self.mean, self.std, strict=True)]

    def normalise(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x (..., 3) in 0..255 -> the same shape in `dtype`."""
        return _normalised(x, dtype, *self.linear())


# --- Reference ------------------------------------------------------------------------


def patch_embed_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, *,
    stride: Sequence[int], padding: Sequence[int] = (0, 0, 0), eps: float = 1e-5,
    pixels: Pixels | None = None,
) -> Tensor:  # fmt: skip
    """`patch_embed` in plain PyTorch."""
    scale, shift = ([], []) if pixels is None else pixels.linear()
    z = _project(x, weight, bias, stride, padding, scale, shift)
    if z.dtype == torch.float64:
        gamma, beta = (None if t is None else t.to(z.dtype) for t in (gamma, beta))
    elif (gamma is None) != (beta is None):  # PyTorch wants both, where they are not of z's dtype
        gamma = torch.ones_like(beta) if gamma is None and beta is not None else gamma
        beta = torch.zeros_like(gamma) if beta is None and gamma is not None else beta
    return F.layer_norm(z, z.shape[-1:], gamma, beta, eps)


def _project(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    scale: Sequence[float], shift: Sequence[float],
) -> Tensor:  # fmt: skip
    """Without the LayerNorm; channels last."""
    if scale:
        x = _normalised(x, weight.dtype, scale, shift)
    if x.device.type == "cpu":  # so that the result need not be turned round
        # First cast where it lies: 1.2 ms for the clip of 16 x 224 x 224 in bf16, else 2.6.
        x = x.to(_runtime.product_dtype(x)).contiguous()
    z = F.conv3d(x.permute(0, 4, 1, 2, 3), weight, bias, tuple(stride), tuple(padding))
    return z.permute(0, 2, 3, 4, 1)


def _normalised(
    x: Tensor, dtype: torch.dtype, scale: Sequence[float], shift: Sequence[float]
) -> Tensor:
    """In fp32 whatever the dtype, which pixels need 8 bits of."""
    exact = torch.promote_types(dtype, torch.float32)
    a, b = (torch.tensor(t, dtype=exact, device=x.device) for t in (scale, shift))
    return torch.addcmul(b, x.to(exact), a).to(dtype)


# --- Ops: shapes, dispatch, autograd --------------------------------------------------


def _fwd_kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    eps: float, stride: list[int], padding: list[int], scale: list[float], shift: list[float],
    dtype: torch.dtype, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x (B, T, H, W, C), weight (N, C, kt, kh, kw) -> y (B, T', H', W', N) in `out_dtype`."""
    y = _fwd_fake(
        x, weight, bias, gamma, beta, eps, stride, padding, scale, shift, dtype, out_dtype
    )
    _triton().fwd(x, weight.to(dtype), bias, gamma, beta, eps, stride, padding, scale, shift, y)
    return y


def _fwd_fake(
    x, weight, bias, gamma, beta, eps, stride, padding, scale, shift, dtype, out_dtype
):  # fmt: skip
    sizes = (
        (size + 2 * p - k) // s + 1
        for size, k, s, p in zip(x.shape[1:4], weight.shape[2:], stride, padding, strict=True)
    )
    return x.new_empty((x.shape[0], *sizes, weight.shape[0]), dtype=out_dtype)


def _bwd_kernel(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, eps: float,
    stride: list[int], padding: list[int], scale: list[float], shift: list[float],
    dtype: torch.dtype, with_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx in x's dtype, without elements where it is not wanted; gradients of weight, bias, gamma
    and beta in the weight's. What was projected is projected once more rather than kept."""
    with torch.autocast(x.device.type, enabled=False):
        clip = _normalised(x, dtype, scale, shift) if scale else x.to(dtype)
        cast = weight.to(dtype)
        z = _project(clip, cast, None if bias is None else bias.to(dtype), stride, padding, [], [])
        exact = torch.promote_types(dtype, torch.float32)
        z, shape = z.to(exact).contiguous(), z.shape[-1:]
        g = None if gamma is None else gamma.to(exact)
        ones = torch.ones(shape, dtype=exact, device=x.device)
        _, mean, rstd = torch.native_layer_norm(z, shape, None, None, eps)
        dz, dgamma, dbeta = torch.ops.aten.native_layer_norm_backward(
            dy.to(exact).contiguous(), z, shape, mean, rstd, ones if g is None else g, ones,
            [True, True, True],
        )  # fmt: skip
        dx, dw, db = torch.ops.aten.convolution_backward(
            dz.to(dtype).permute(0, 4, 1, 2, 3), clip.permute(0, 4, 1, 2, 3), cast, shape,
            stride, padding, [1] * 3, False, [0] * 3, 1, [with_dx, True, True],
        )  # fmt: skip
    dx = dx.permute(0, 2, 3, 4, 1).to(x.dtype).contiguous() if with_dx else x.new_empty(0)
    rest = (t.to(weight.dtype).contiguous() for t in (dw, db, dgamma, dbeta))
    return dx, *rest


def _bwd_fake(
    dy, x, weight, bias, gamma, eps, stride, padding, scale, shift, dtype, with_dx
):  # fmt: skip
    N = weight.shape[0]
    dx = x.new_empty(x.shape if with_dx else 0)
    return dx, weight.new_empty(weight.shape), *(weight.new_empty(N) for _ in range(3))


_fwd = Operator(
    "patch_embed(Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, float eps,"
    " int[] stride, int[] padding, float[] scale, float[] shift, ScalarType dtype,"
    " ScalarType out_dtype) -> Tensor",
    _fwd_kernel, _fwd_fake,
)  # fmt: skip
_bwd = Operator(
    "patch_embed_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, float eps,"
    " int[] stride, int[] padding, float[] scale, float[] shift, ScalarType dtype, bool with_dx)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_kernel, _bwd_fake,
)  # fmt: skip


@_fwd.differentiable
class _Fwd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        x, weight, bias, gamma, _, *constants, _ = args
        ctx.save_for_backward(x, weight, bias, gamma)
        ctx.constants = constants
        return _fwd.below_autograd(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        wanted = ctx.needs_input_grad[:5]
        found = _bwd(dy, *ctx.saved_tensors, *ctx.constants, wanted[0])
        return *(g if want else None for g, want in zip(found, wanted, strict=True)), *(None,) * 7


@register_flop_formula(_fwd.packet)
def _fwd_flops(x_shape, weight_shape, *_, out_shape=None, **__):
    return 2 * math.prod(out_shape) * math.prod(weight_shape[1:])


@register_flop_formula(_bwd.packet)
def _bwd_flops(dy_shape, x_shape, weight_shape, *rest, **_):
    """As usual, without what is made anew."""
    return 2 * math.prod(dy_shape) * math.prod(weight_shape[1:]) * (1 + rest[-1])


# --- Public ---------------------------------------------------------------------------


def patch_embed(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, *,
    stride: Sequence[int], padding: Sequence[int] = (0, 0, 0), eps: float = 1e-5,
    pixels: Pixels | None = None,
) -> Tensor:  # fmt: skip
    """Project strided patches of x, and normalise the channels of each.

    Differentiable once where a kernel serves (on a GPU, under `backend("triton")`), else twice.

    Args:
        x: (B, T, H, W, C), floating point, or with `pixels` uint8; any strides, though only
            channels or columns side by side are read without a copy.
        weight: (N, C, kt, kh, kw), as of an nn.Conv3d; of x's dtype, or fp32.
        bias: (N,), likewise, or None.
        gamma: (N,), the LayerNorm's weight, or None for ones.
        beta: (N,), the LayerNorm's bias, or None for zeros.
        stride: (st, sh, sw).
        padding: (pt, ph, pw), of zeros, which with `pixels` are zeros of the normalised clip.
        eps: the LayerNorm's.
        pixels: how to normalise pixels in 0..255; x is then uint8 and has three channels.

    Returns:
        (B, T', H', W', N) with T' = (T + 2 pt - kt) // st + 1 and so on; in x's dtype, with
        `pixels` the weight's. Under autocast in fp32 on a GPU, as PyTorch's LayerNorm gives there,
        and in autocast's dtype on a CPU.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    _check(x, weight, bias, gamma, beta, stride, padding, pixels)
    like = weight if pixels is not None else x
    if _plain(x, weight, like):
        return patch_embed_ref(
            x, weight.to(like.dtype) if _runtime.autocast_dtype(x) is None else weight,
            None if bias is None else bias.to(like.dtype), gamma, beta, stride=stride,
            padding=padding, eps=eps, pixels=pixels,
        )  # fmt: skip
    dtype = _runtime.product_dtype(like)
    casts = x.is_cuda and _runtime.autocast_dtype(x) is not None  # LayerNorm's result, there only
    out_dtype = torch.float32 if casts else dtype
    scale, shift = ([], []) if pixels is None else pixels.linear()
    constants = (eps, list(stride), list(padding), scale, shift, dtype, out_dtype)
    return _fwd(x, weight, bias, gamma, beta, *constants)


def _plain(x: Tensor, weight: Tensor, like: Tensor) -> bool:
    if x.device.type not in ("cpu", "cuda") or like.dtype == torch.float64 or x.numel() == 0:
        return True
    if _runtime.serving("patch_embed", x.device) != "triton":
        return True
    if weight.shape[0] > WIDEST:
        _runtime.announce("patch_embed runs in plain PyTorch", f"more than {WIDEST} channels")
        return True
    return _runtime.under_torch_func("patch_embed")


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], pixels: Pixels | None,
) -> None:  # fmt: skip
    if x.ndim != 5 or weight.ndim != 5 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"x must be (B, T, H, W, C) and weight (N, C, kt, kh, kw), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    for name, sizes, least in (("stride", stride, 1), ("padding", padding, 0)):
        if not isinstance(sizes, Sequence) or len(sizes) != 3 or min(sizes) < least:
            raise ValueError(f"{name} must be three sizes from {least} on, got {sizes}")
    padded = [size + 2 * p for size, p in zip(x.shape[1:4], padding, strict=True)]
    if any(size < k for size, k in zip(padded, weight.shape[2:], strict=True)):
        raise ValueError(
            f"x with its padding, {tuple(padded)}, is smaller than the kernel, "
            f"{tuple(weight.shape[2:])}"
        )
    if pixels is not None and not isinstance(pixels, Pixels):
        raise ValueError(
            f"pixels must be a uniformer_kernels.Pixels, of mean and std, got a "
            f"{type(pixels).__name__}"
        )
    if pixels is None and x.dtype == torch.uint8:
        raise ValueError("x is uint8: say how to normalise it, as in pixels=Pixels(mean, std)")
    if pixels is None:
        _runtime.check_dtypes(x, weight=weight, bias=bias, gamma=gamma, beta=beta)
    elif x.dtype != torch.uint8 or x.shape[-1] != 3:
        raise ValueError(f"pixels are uint8 in 3 channels, got {x.dtype} in {x.shape[-1]}")
    else:
        _runtime.check_dtypes(weight, bias=bias, gamma=gamma, beta=beta)
    of_channels = {"bias": bias, "gamma": gamma, "beta": beta}
    shapes = {name: (t, weight.shape[:1]) for name, t in of_channels.items()}
    _runtime.check_shapes(x, {"weight": (weight, weight.shape)} | shapes)

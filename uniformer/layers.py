"""The layers of UniFormer as modules, usable alone.

Activations are channels-last, (B, T, H, W, C): B clips, T frames, H rows, W columns, C channels.
Parameters have the official names and shapes, convolutions of size 1 included.
Equation numbers are those of Li et al. 2022, https://arxiv.org/abs/2201.04676.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniformer_kernels import (
    Pixels,
    announce,
    attention,
    current_backend,
    dwconv3d,
    ffn,
    patch_embed,
    pointwise,
)

__all__ = [
    "BATCH_NORMS", "DPE", "FFN", "DropPath", "GlobalMHRA", "LocalMHRA", "PatchEmbed", "Pixels",
    "batch_norm", "lacks_weight", "of_batch", "runs_fused", "weight_and_bias", "why_not_around",
]  # fmt: skip


class DropPath(nn.Module):
    """Stochastic depth: a residual branch is dropped for a whole sample, the others scaled up."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ...) -> the same shape; the identity in eval mode."""
        scale = self.draw(x)
        return x if scale is None else x * scale.view(-1, *[1] * (x.ndim - 1))

    def draw(self, x: Tensor) -> Tensor | None:
        """The factor of each sample, (B,): 0, or what makes up for those; None for ones."""
        if not self.is_active():
            return None
        kept = 1 - self.rate
        return x.new_empty(len(x)).bernoulli_(kept).div_(kept or 1.0)

    def is_active(self) -> bool:
        """Whether samples may be dropped now."""
        return self.rate != 0.0 and self.training

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class DepthwiseConv(nn.Conv3d):
    """Depthwise convolution, stride 1, same size, on channels-last activations."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, H, W, C) -> (B, T, H, W, C)."""
        return dwconv3d(x, self.weight, self.bias)


class DPE(DepthwiseConv):
    """Dynamic position embedding with its residual, eq. 1 and 8: X = DWConv(X_in) + X_in.

    Zero padding of the 3x3x3 convolution tells tokens where the border is, and so where they are.

    Args:
        dim: channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, kernel_size=3)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, H, W, C) -> (B, T, H, W, C)."""
        return dwconv3d(x, self.weight, self.bias, residual=True)


class Pointwise(nn.Conv3d):
    """1x1x1 convolution: a Linear over channels, with the weight shape of the official Conv3d."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(dim, out_dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., out_dim)."""
        return pointwise(x, self.weight, self.bias)


_LINEAR = (nn.Linear, Pointwise)


def why_not_around(module: nn.Module, **parts: tuple[type, ...]) -> str | None:
    """Why a kernel may not use the parameters of `module`'s parts without calling those, or None.

    Args:
        module: what the kernel computes.
        parts: for each name of a submodule, the types whose forward the kernel knows.
    """
    for name, types in parts.items():
        part: Any = module._modules[name]
        if type(part) not in types or "forward" in part.__dict__:
            return f"{name} is a {type(part).__name__} with a forward of its own"
        if (
            part._forward_hooks or part._forward_pre_hooks
            or part._backward_hooks or part._backward_pre_hooks
        ):  # fmt: skip
            return f"{name} has hooks, which want to see it called"
    return None


def lacks_weight(part: Any) -> bool:
    """Whether a layer has none, where only an Identity may."""
    return not isinstance(part, nn.Identity) and part.weight is None


def weight_and_bias(part: Any) -> tuple[Tensor | None, Tensor | None]:
    """Of a layer; an Identity has none."""
    return (None, None) if isinstance(part, nn.Identity) else (part.weight, part.bias)


def runs_fused(block: nn.Module, x: Tensor) -> bool:
    """Whether a block's kernels may run in place of its parts; where not, the log says why."""
    if x.numel() == 0 or current_backend() == "reference":
        return False
    why = block.why_not_fused()  # type: ignore[operator]
    if why and not torch.compiler.is_compiling():
        announce(f"a {type(block).__name__} runs part by part, slower than it could", why)
    return why is None


def batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a BatchNorm3d (or a SyncBatchNorm made of one) to channels-last x (B, T, H, W, C)."""
    return norm(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)


BATCH_NORMS = (nn.BatchNorm3d, nn.SyncBatchNorm)


def of_batch(norm: nn.Module) -> bool:
    """Whether a BatchNorm takes the statistics of the batch now."""
    return norm.training or norm.running_mean is None


def _check_channels(x: Tensor, dim: int) -> None:
    if x.ndim < 2 or x.shape[-1] != dim:
        raise ValueError(
            f"x must be channels-last, (B, ..., {dim}), got shape {tuple(x.shape)}; from "
            f"(B, C, T, H, W) it is x.permute(0, 2, 3, 4, 1)"
        )


def local_mhra(x: Tensor, value: nn.Module, affinity: nn.Module, unify: nn.Module) -> Tensor:
    """Eq. 4 to 6 with a head per channel: values, learned affinity in the tube, then U."""
    return unify(affinity(value(x)))


class LocalMHRA(nn.Module):
    """Local multi-head relation aggregator, eq. 4 to 6.

    The affinity of two tokens is a learned weight of their offset within a tube, one head per
    channel, so values, aggregation and fusion of the heads are 1x1x1, depthwise tube and 1x1x1
    convolutions.

    Args:
        dim: channels.
        tube_size: edge of the neighbourhood, odd.
    """

    def __init__(self, dim: int, tube_size: int = 5) -> None:
        super().__init__()
        self.conv1 = Pointwise(dim, dim)  # V
        self.attn = DepthwiseConv(dim, tube_size)  # A
        self.conv2 = Pointwise(dim, dim)  # U

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, H, W, C) -> (B, T, H, W, C), before the residual."""
        _check_channels(x, self.conv1.in_channels)
        return local_mhra(x, self.conv1, self.attn, self.conv2)


class GlobalMHRA(nn.Module):
    """Global multi-head relation aggregator, eq. 4, 5 and 7: softmax attention over all tokens.

    Args:
        dim: channels, a multiple of `num_heads`.
        num_heads: heads.
        qkv_bias: bias on q, k and v.
        scale: factor on the scores, (dim / num_heads)**-0.5 unless given.
        attn_drop: dropout on the affinities.
        proj_drop: dropout after the projection.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.scale = scale
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)  # U
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ..., C), tokens in between -> the same shape, before the residual."""
        _check_channels(x, self.qkv.in_features)
        qkv = self.qkv(x.flatten(1, -2))
        out = attention(qkv, self.num_heads, self.scale, self.dropout())
        return self.proj_drop(self.proj(out)).view(x.shape)

    def dropout(self) -> float:
        """Probability of dropping an affinity now."""
        return self.attn_drop if self.training else 0.0

    def why_not_fused(self) -> str | None:
        """Why its parts are to be called one by one, or None."""
        if self.proj_drop.p > 0 and self.proj_drop.training:
            return f"dropout of {self.proj_drop.p} after the projection: its kernels have none"
        return why_not_around(self, qkv=(nn.Linear,), proj=(nn.Linear,), proj_drop=(nn.Dropout,))


class FFN(nn.Module):
    """Feed-forward network, the FFN of eq. 3: fc2(GELU(fc1(x))), GELU by the error function.

    Args:
        dim: channels.
        hidden_dim: channels between fc1 and fc2.
        drop: dropout after the GELU and after fc2.
        conv: keep the weights in the shape of 1x1x1 convolutions, as the local blocks do.
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, conv: bool = False) -> None:
        super().__init__()
        linear = Pointwise if conv else nn.Linear
        self.fc1 = linear(dim, hidden_dim)
        self.fc2 = linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., C), before the residual."""
        if x.ndim < 2 or self.why_not_fused() is not None:
            return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))
        return ffn(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)

    def why_not_fused(self) -> str | None:
        """Why the hidden layer is to be stored, or None."""
        if self.drop.p > 0 and self.drop.training:
            return f"dropout of {self.drop.p} within the FFN: its kernels have none"
        return why_not_around(self, fc1=_LINEAR, fc2=_LINEAR, drop=(nn.Dropout,))


class PatchEmbed(nn.Module):
    """Strided projection and LayerNorm: the stem, and the downsampling before each later stage.

    Args:
        dim: channels in.
        out_dim: channels out.
        kernel_size: (kt, kh, kw).
        stride: (st, sh, sw).
        padding: (pt, ph, pw).
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        kernel_size: tuple[int, int, int],
        stride: tuple[int, int, int],
        padding: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(out_dim)
        self.proj = nn.Conv3d(dim, out_dim, kernel_size, stride, padding)

    def forward(self, x: Tensor, pixels: Pixels | None = None) -> Tensor:
        """x (B, T, H, W, C) -> (B, T', H', W', out_dim); edges that fill no stride are dropped.

        With `pixels` x is uint8, in 0..255, and normalised on the way.
        """
        proj, norm = self.proj, self.norm
        if not self._is_usual():
            x = x if pixels is None else pixels.normalise(x, proj.weight.dtype)
            return norm(proj(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1))
        return patch_embed(
            x, proj.weight, proj.bias, norm.weight, norm.bias, stride=proj.stride,
            padding=cast(tuple[int, ...], proj.padding), eps=norm.eps, pixels=pixels,
        )  # fmt: skip

    def _is_usual(self) -> bool:
        """Whether its parts are as they were made, but for their sizes, and not to be called."""
        if why_not_around(self, norm=(nn.LayerNorm,), proj=(nn.Conv3d,)) is not None:
            return False
        proj, norm = self.proj, self.norm
        usual = proj.groups == 1 and proj.dilation == (1, 1, 1) and proj.padding_mode == "zeros"
        return usual and proj.padding != "same" and norm.normalized_shape == (proj.out_channels,)

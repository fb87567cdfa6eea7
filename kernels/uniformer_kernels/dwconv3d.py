"""Depthwise 3-D convolution, stride 1, zero padding to the same size.

    y[b,t,h,w,c] = bias[c] + sum_{i,j,k} weight[c,0,i,j,k] x[b, t+i-kt//2, h+j-kh//2, w+k-kw//2, c]

and, with `residual`, plus x itself. UniFormer uses it as the dynamic position embedding (3x3x3,
with residual) and as the token affinity of the local relation aggregator (5x5x5).

Shapes: B clips, T frames, H rows, W columns, C channels; activations are (B, T, H, W, C).
Paper: Li et al. 2022, https://arxiv.org/abs/2201.04676, eq. 6 and 8.
"""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["dwconv3d", "dwconv3d_ref"]

MAX_KERNEL = 9  # the largest tube size of the paper's ablation


# --- Reference ------------------------------------------------------------------------


def dwconv3d_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: bool = False
) -> Tensor:
    """`dwconv3d` in plain PyTorch; the permuted view is channels_last_3d, so nothing is copied."""
    padding = [k // 2 for k in weight.shape[2:]]
    y = F.conv3d(x.permute(0, 4, 1, 2, 3), weight, bias, padding=padding, groups=x.shape[-1])
    y = y.permute(0, 2, 3, 4, 1)
    return x + y if residual else y


# --- Public ---------------------------------------------------------------------------


def dwconv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: bool = False
) -> Tensor:
    """Convolve every channel of `x` with its own kernel.

    Equivalent to `F.conv3d(x, weight, bias, padding="same", groups=C)` with channels last.

    Args:
        x: (B, T, H, W, C), floating point; any strides.
        weight: (C, 1, kt, kh, kw), each of kt, kh, kw odd and from 1 to 9.
        bias: (C,).
        residual: add `x` to the result.

    Returns:
        (B, T, H, W, C), in `x`'s dtype.

    Raises:
        ValueError: a shape is not as above.
    """
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
    return dwconv3d_ref(x, weight, bias, residual=residual)

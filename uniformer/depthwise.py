"""A depthwise convolution for any network; `kernelize` puts it in place of PyTorch's."""

import logging

import torch
from torch import Tensor, nn

from uniformer_kernels import MAX_KERNEL, dwconv3d

__all__ = ["DepthwiseConv3d", "why_not"]

log = logging.getLogger(__name__)
_announced: set[str] = set()


class DepthwiseConv3d(nn.Conv3d):
    """`nn.Conv3d` whose forward and backward are this library's, where it is depthwise.

    Constructor, parameters, state_dict, input and output are those of `nn.Conv3d`. The kernels
    serve groups = in_channels = out_channels, stride 1, dilation 1, zero padding to the same size,
    and odd kernels of at most 9; any other convolution runs as `nn.Conv3d` does, and the log says
    why, once. Fastest on channels_last_3d tensors, which are taken and given as they are; those in
    NCTHW memory are copied twice. Scripted and traced by torch.jit it is PyTorch's convolution;
    torch.fx must be told that it is a leaf.
    """

    def forward(self, input: Tensor) -> Tensor:
        """input (B, C, T, H, W) or (C, T, H, W) -> the same shape and memory format."""
        if torch.jit.is_scripting():
            return self._conv_forward(input, self.weight, self.bias)
        else:  # without this `else` TorchScript would read on
            return self._on_kernels(input)

    @torch.jit.unused
    def _on_kernels(self, input: Tensor) -> Tensor:
        why = why_not(self)
        if why or torch.jit.is_tracing():
            if why and not torch.compiler.is_compiling() and why not in _announced:
                _announced.add(why)
                log.warning("a DepthwiseConv3d runs as nn.Conv3d: %s", why)
            return self._conv_forward(input, self.weight, self.bias)
        if input.ndim == 4:
            return self._on_kernels(input.unsqueeze(0)).squeeze(0)
        if input.ndim != 5:
            raise ValueError(f"the input must be (B, C, T, H, W), got shape {tuple(input.shape)}")
        y = dwconv3d(input.permute(0, 2, 3, 4, 1), self.weight, self.bias).permute(0, 4, 1, 2, 3)
        last = input.is_contiguous(memory_format=torch.channels_last_3d)
        return y if last else y.contiguous()


def why_not(conv: nn.Conv3d) -> str | None:
    """Why the kernels do not serve a convolution, or None."""
    if not conv.groups == conv.in_channels == conv.out_channels:
        return (
            f"{conv.in_channels} channels in, {conv.out_channels} out and {conv.groups} groups: "
            f"not one filter for each channel"
        )
    if conv.weight.is_complex():
        return f"weights of {conv.weight.dtype}: not real"
    if any(k % 2 == 0 or k > MAX_KERNEL for k in conv.kernel_size):
        return f"kernel {conv.kernel_size}: not odd and at most {MAX_KERNEL}"
    if any(s != 1 for s in conv.stride):
        return f"stride {conv.stride}: not 1"
    if any(d != 1 for d in conv.dilation):
        return f"dilation {conv.dilation}: not 1"
    same = tuple(k // 2 for k in conv.kernel_size)
    if conv.padding not in ("same", same):
        return f"padding {conv.padding}: not {same}, which keeps the size"
    if conv.padding_mode != "zeros":
        return f"padding mode {conv.padding_mode!r}: not 'zeros'"
    return None

"""The C++ attention of `csrc/attention_cpu*.cpp`: bf16 on a CPU, from a packed qkv."""

import ctypes

import torch
from torch import Tensor

from uniformer_kernels import _runtime
from uniformer_kernels._runtime import int64s, library, pointer

__all__ = ["bwd", "fwd", "why_not"]

CHANNELS = (16, 32, 48, 64)  # of a head that the kernel serves


def why_not(q: Tensor) -> str | None:
    """Why the kernel does not serve a packed q (B, N, h, d), or None."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.numel() == 0:
        return "it serves bf16 on a CPU"
    if q.shape[-1] not in CHANNELS:
        return f"heads are not of {CHANNELS} channels"
    return _why_not_here()


@torch.compiler.assume_constant_result
def _why_not_here() -> str | None:
    if not library("native").uniformer_attention_fwd_serves(ctypes.c_int64(CHANNELS[0])):
        return "the processor has no AVX512_BF16"
    return None


def fwd(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """qkv (B, N, 3*h*d) bf16 -> o (B, N, h*d), and logarithms of the softmax's sums (B, N, h)."""
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    B, N, width = qkv.shape
    out = qkv.new_empty(B, N, width // 3)
    lse = qkv.new_empty(B, N, num_heads, dtype=torch.float32)
    code = library("native").uniformer_attention_fwd(
        pointer(qkv), ctypes.c_int64(qkv.stride(0)), ctypes.c_int64(qkv.stride(1)), pointer(out),
        pointer(lse), int64s((B, N, num_heads, width // 3 // num_heads)), ctypes.c_float(scale),
        _runtime.parallel_for(),
    )  # fmt: skip
    if code:
        raise MemoryError(f"no memory to pack keys and values of {tuple(qkv.shape)}")
    return out, lse


def bwd(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float
) -> Tensor:
    """dqkv (B, N, 3*h*d), by PyTorch's kernel from our forward's results."""
    dout, out = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (dout, out))
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse.transpose(1, 2), 0.0, False, scale=scale
    )
    return torch.stack([g.transpose(1, 2) for g in found], dim=2).flatten(2)

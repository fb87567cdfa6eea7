"""The C++ attention of `csrc/attention_cpu*.cpp`: bf16 and fp32 on a CPU, from a packed qkv."""

import torch
from torch import Tensor

from uniformer_kernels import _runtime
from uniformer_kernels._runtime import int64s, native

__all__ = ["bwd", "fwd", "why_not", "why_not_of"]

CHANNELS = (16, 32, 48, 64)  # of a head that the kernel serves
NEEDS = {torch.bfloat16: "AVX512_BF16", torch.float32: "AVX512F"}  # of the processor


def why_not(q: Tensor) -> str | None:
    """Why the kernel does not serve a packed q (B, N, h, d), or None."""
    if q.device.type != "cpu" or q.dtype not in NEEDS or q.numel() == 0:
        return "it serves bf16 and fp32 on a CPU"
    return why_not_of(q.shape[1], q.shape[-1], q.dtype)


def why_not_of(tokens: int, channels: int, dtype: torch.dtype) -> str | None:
    """Why it does not serve heads of so many channels, of so many tokens, or None."""
    if channels not in CHANNELS:
        return f"heads are not of {CHANNELS} channels"
    if dtype == torch.float32 and 32 < tokens < 56:
        # In batches of 32 to 48: 16 % slower than PyTorch's with 33 tokens, 5 % with 49; with 16,
        # 56 and 98 it is the faster one.
        return "of 33 to 55 tokens in fp32, too much of its tiles is empty"
    return _why_not_here(dtype)


@torch.compiler.assume_constant_result
def _why_not_here(dtype: torch.dtype) -> str | None:
    serves = native("uniformer_attention_fwd_serves", "qi")
    if not serves(CHANNELS[0], dtype.itemsize):
        return f"the processor has no {NEEDS[dtype]}"
    return None


def fwd(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """qkv (B, N, 3*h*d) -> o (B, N, h*d), and logarithms of the softmax's sums (B, N, h)."""
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    B, N, width = qkv.shape
    out = qkv.new_empty(B, N, width // 3)
    lse = qkv.new_empty(B, N, num_heads, dtype=torch.float32)
    code = native("uniformer_attention_fwd", "pqqpppfip")(
        qkv.data_ptr(), qkv.stride(0), qkv.stride(1), out.data_ptr(), lse.data_ptr(),
        int64s((B, N, num_heads, width // 3 // num_heads)), scale, qkv.itemsize,
        _runtime.parallel_for(),
    )  # fmt: skip
    if code:
        raise MemoryError(f"no memory to pack keys and values of {tuple(qkv.shape)}")
    return out, lse


def bwd(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float
) -> Tensor:
    """dqkv (B, N, 3*h*d) from dout, and from what forward read and gave; contiguous."""
    dout, qkv, out = (t if t.stride(-1) == 1 else t.contiguous() for t in (dout, qkv, out))
    lse = lse.contiguous()
    B, N, width = qkv.shape
    dqkv = qkv.new_empty(B, N, width)
    code = native("uniformer_attention_bwd", "pppppppppfip")(
        qkv.data_ptr(), int64s(qkv.stride()), dout.data_ptr(), int64s(dout.stride()),
        out.data_ptr(), int64s(out.stride()), lse.data_ptr(), dqkv.data_ptr(),
        int64s((B, N, num_heads, width // 3 // num_heads)), scale, qkv.itemsize,
        _runtime.parallel_for(),
    )  # fmt: skip
    if code:
        raise MemoryError(f"no memory for the gradient of {tuple(qkv.shape)}")
    return dqkv

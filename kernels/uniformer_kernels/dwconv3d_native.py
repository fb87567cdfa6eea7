"""The C++ kernels of `dwconv3d`, `csrc/dwconv3d_cpu_*.cpp` and `csrc/dwconv3d.cu`, as functions.

Shapes: B clips, T frames, H rows, W columns, C channels; activations are (B, T, H, W, C).
"""

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from uniformer_kernels import _runtime
from uniformer_kernels._runtime import int64s, library, native, pointer

__all__ = [
    "DTYPES",
    "bwd_weight_cpu",
    "bwd_weight_cuda",
    "fwd_cpu",
    "fwd_cuda",
    "serves_cpu",
    "why_not_cuda",
]  # fmt: skip

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of the C interface
VECTOR = 16  # bytes that the CUDA kernels load at a time


def serves_cpu(x: Tensor, kernel: Sequence[int]) -> bool:
    """Whether `fwd_cpu` takes x: channels side by side, a multiple of 16, kernels 3 or 5
    wide, in fp32 with AVX-512.

    It is then the faster one: 1.1 times and more as fast as PyTorch's channels-last convolution on
    two threads with AVX-512, 15 times and more in fp16 (`benchmarks/bench_dwconv3d.py`).
    """
    serves = native("uniformer_dwconv3d_fwd_serves", "qqqi")
    return x.stride(4) == 1 and serves(*x.shape[3:], kernel[2], DTYPES.index(x.dtype))


def fwd_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, mirror: bool = False
) -> Tensor:
    """x (B, T, H, W, C) -> y likewise, contiguous; `mirror` for the gradient of x, from dy."""
    weight = weight.contiguous()
    bias = None if bias is None else bias.to(weight.dtype).contiguous()
    y = x.new_empty(x.shape)
    code = native("uniformer_dwconv3d_fwd", "pppppppiiiip")(
        x.data_ptr(), int64s(x.stride()), weight.data_ptr(),
        None if bias is None else bias.data_ptr(), y.data_ptr(), int64s(x.shape),
        int64s(weight.shape[2:]), DTYPES.index(x.dtype), DTYPES.index(weight.dtype), mirror,
        residual, _runtime.parallel_for(),
    )  # fmt: skip
    if code == 2:
        raise ValueError(
            f"rows of {x.shape[3]} x {x.shape[4]} channels are not served; see serves_cpu"
        )
    if code:
        raise MemoryError(f"no memory to pack a {tuple(weight.shape)} weight")
    return y


def bwd_weight_cpu(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Gradients of the weight and, last, of the bias: (taps + 1, C) fp32; any strides."""
    C, _, *kernel = weight.shape
    grads = x.new_empty(math.prod(kernel) + 1, C, dtype=torch.float32)
    code = native("uniformer_dwconv3d_bwd_weight", "ppppppipp")(
        x.data_ptr(), int64s(x.stride()), dy.data_ptr(), int64s(dy.stride()), int64s(x.shape),
        int64s(weight.shape[2:]), DTYPES.index(x.dtype), grads.data_ptr(), _runtime.parallel_for(),
    )  # fmt: skip
    if code:
        raise MemoryError(f"no memory for the gradient of a {tuple(weight.shape)} weight")
    return grads


# --- CUDA -----------------------------------------------------------------------------


def why_not_cuda(shape: Sequence[int], kernel: Sequence[int]) -> str | None:
    """Why the CUDA kernels do not serve a shape, or None."""
    if tuple(kernel) not in ((3, 3, 3), (5, 5, 5)):
        return f"its C++ kernels are 3x3x3 and 5x5x5, not {tuple(kernel)}"
    if shape[-1] % 8:
        return f"its C++ kernels take a multiple of 8 channels, not {shape[-1]}"
    return None


def _readable(x: Tensor) -> Tensor:
    """Channels side by side, and all else at multiples of a vector."""
    step = VECTOR // x.element_size()
    aligned = all(s % step == 0 for s, n in zip(x.stride()[:4], x.shape, strict=False) if n > 1)
    return x if x.stride(4) == 1 and aligned and x.data_ptr() % VECTOR == 0 else x.contiguous()


def _stream(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream)


def fwd_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, mirror: bool = False
) -> Tensor:
    """x (B, T, H, W, C), not empty -> y likewise; `mirror` for the gradient of x, from dy."""
    x, weight = _readable(x), weight.contiguous()
    bias = None if bias is None else bias.to(weight.dtype).contiguous()
    y = x.new_empty(x.shape)
    with _runtime.on_device(x):
        code = library("cuda").uniformer_dwconv3d_fwd_cuda(
            pointer(x), int64s(x.stride()), pointer(weight), pointer(bias), pointer(y),
            int64s(x.shape), ctypes.c_int32(weight.shape[-1]),
            ctypes.c_int32(DTYPES.index(x.dtype)), ctypes.c_int32(DTYPES.index(weight.dtype)),
            ctypes.c_int32(mirror), ctypes.c_int32(residual), _stream(x),
        )  # fmt: skip
    _check(code, x)
    return y


def bwd_weight_cuda(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Gradients of the weight and, last, of the bias: (taps + 1, C) fp32; dy and x not empty."""
    dy, x = _readable(dy), _readable(x)
    cuda, k, shape = library("cuda"), ctypes.c_int32(weight.shape[-1]), int64s(x.shape)
    splits = cuda.uniformer_dwconv3d_bwd_weight_splits_cuda(
        shape, k, ctypes.c_int32(_runtime.multiprocessors(x))
    )
    C, _, *kernel = weight.shape
    partial = x.new_empty(splits, math.prod(kernel) + 1, C, dtype=torch.float32)
    with _runtime.on_device(x):
        code = cuda.uniformer_dwconv3d_bwd_weight_cuda(
            pointer(x), int64s(x.stride()), pointer(dy), int64s(dy.stride()),
            pointer(partial), shape, k, ctypes.c_int32(DTYPES.index(x.dtype)),
            ctypes.c_int32(splits), _stream(x),
        )  # fmt: skip
    _check(code, x)
    return partial.sum(0)


def _check(code: int, x: Tensor) -> None:
    if code:
        why = "the launch failed" if code == 1 else "it does not serve these arguments"
        raise RuntimeError(f"csrc/dwconv3d.cu on x {tuple(x.shape)} {x.dtype}: {why}")

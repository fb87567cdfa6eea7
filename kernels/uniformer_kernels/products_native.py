"""The C++ of `pointwise` and `ffn`, `csrc/pointwise_cpu.cpp` and `csrc/ffn_cpu.cpp`: forwards; and
of their gradients GELU's, and sums over rows (`csrc/sums_cpu.cpp`).

Parameters go there as they are: what C++ does to them costs no operator of PyTorch, and some ten
of those would take a tenth of the forward.

Shapes: K channels in, N channels out; C and F of the FFN.
"""

from array import array
from typing import Any

import torch
from torch import Tensor

from uniformer_kernels import _runtime
from uniformer_kernels._runtime import native

__all__ = ["HALF", "column_sums", "ffn", "gelu_bwd_", "has_products", "pointwise", "serves"]

HALF = {torch.float32: 0, torch.bfloat16: 1}  # dtypes that the kernels read and write


def serves(x: Tensor, dtype: torch.dtype, *others: Tensor | None) -> bool:
    """Whether the kernels take x (..., K), to be multiplied in `dtype`, and all other tensors,
    the first of which is a weight (N, K) with K no less a multiple of 8 than N."""
    if dtype not in HALF or x.device.type != "cpu" or x.dtype not in HALF:
        return False
    for t in others:
        if t is not None and t.dtype not in HALF:
            return False
    weight = others[0]
    assert weight is not None
    return has_products(weight.shape[0], weight.shape[1], dtype)


def has_products(rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether there are products in `dtype` here, of fp32 or bf16, with a weight of that size."""
    if _runtime.why_not("native") is not None:
        return False
    return bool(native("uniformer_pointwise_fwd_serves", "qqi")(rows, columns, HALF[dtype]))


# The structures of csrc/tokens_cpu.h, as numbers. What had to be made anew for them goes to `kept`,
# which is to live until the call is over.


def _rows(t: Tensor | None, kept: list[Tensor]) -> tuple[int, ...]:
    if t is None:
        return 0, 0, 0
    if t.is_contiguous():
        return t.data_ptr(), t.shape[-1], HALF[t.dtype]
    t = t.reshape(-1, t.shape[-1])  # a view where rows are evenly apart
    t = t if t.stride(1) == 1 else t.contiguous()
    kept.append(t)
    return t.data_ptr(), t.stride(0), HALF[t.dtype]


def _numbers(t: Tensor | None, kept: list[Tensor]) -> tuple[int, int]:
    if t is None:
        return 0, 0
    if t.dtype not in HALF or not t.is_contiguous():
        t = t.float().contiguous()
        kept.append(t)
    return t.data_ptr(), HALF[t.dtype]


def _norm(norm: tuple[Any, ...], kept: list[Tensor]) -> tuple[int, ...]:
    stats, gamma, beta, _, per_row = norm
    affine = *_numbers(gamma, kept), *_numbers(beta, kept)
    if stats is None:
        return int(per_row), 1, 0, 0, 0, 0, *affine
    mean, half = _numbers(stats, kept)
    variance = mean + stats.shape[1] * (2 if half else 4)
    return 1, 0, mean, half, variance, half, *affine


def _weight(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, kept: list[Tensor]
) -> tuple[int, ...]:
    if weight.dtype not in (dtype, torch.float32) or not weight.is_contiguous():
        weight = weight.to(dtype).contiguous()  # fp32 is cast in C++, in memory that it keeps
        kept.append(weight)
    return weight.data_ptr(), *weight.shape[:2], HALF[weight.dtype], *_numbers(bias, kept)


def _result(
    y: Tensor, residual: Tensor | None, scale: Tensor | None, tokens: int, kept: list[Tensor]
) -> tuple[int, ...]:
    clip = tokens if scale is None else tokens // len(scale)
    return y.data_ptr(), HALF[y.dtype], *_rows(residual, kept), *_numbers(scale, kept), clip


def pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: tuple[Any, ...], scale: Tensor | None,
    residual: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x (..., K), weight (N, K), scale (B,), residual (..., N) -> y (..., N), as `serves` says.

    `norm` is its statistics, weight, bias, eps, and whether it is of rows.
    """
    N, K = weight.shape[:2]
    y = x.new_empty((*x.shape[:-1], N), dtype=dtype if residual is None else residual.dtype)
    tokens, kept = x.numel() // K, []  # type: int, list[Tensor]
    call = (
        *_rows(x, kept), *_norm(norm, kept), *_weight(weight, bias, dtype, kept),
        *_result(y, residual, scale, tokens, kept), tokens,
    )  # fmt: skip
    _run("uniformer_pointwise_fwd", call, norm[3], dtype, x)
    return y


def ffn(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    norm: tuple[Any, ...], scale: Tensor | None, residual: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x (..., C), w1 (F, C), w2 (C, F), scale (B,) -> y (..., C), as `serves` and `pointwise`."""
    y = x.new_empty(x.shape, dtype=x.dtype if residual else dtype)
    tokens, kept = x.numel() // x.shape[-1], []  # type: int, list[Tensor]
    call = (
        *_rows(x, kept), *_norm(norm, kept), *_weight(w1, b1, dtype, kept),
        *_weight(w2, b2, dtype, kept),
        *_result(y, x if residual else None, scale, tokens, kept), tokens,
    )  # fmt: skip
    _run("uniformer_ffn_fwd", call, norm[3], dtype, x)
    return y


def _run(name: str, call: tuple[int, ...], eps: float, dtype: torch.dtype, x: Tensor) -> None:
    numbers = array("q", call)
    code = native(name, "pfip")(
        numbers.buffer_info()[0], eps, HALF[dtype], _runtime.parallel_for()
    )  # fmt: skip
    if code:
        what = "no memory for" if code == 1 else "not served:"
        raise (MemoryError if code == 1 else ValueError)(f"{what} x {tuple(x.shape)}")


def gelu_bwd_(h: Tensor, dh: Tensor) -> bool:
    """Of the same chunk h becomes gelu(h), and the gradient dh of that the gradient of h, in place.

    Both contiguous. Returns whether it was done: it takes AVX-512, and fp32 or bf16.
    """
    if h.dtype not in HALF or h.device.type != "cpu" or _runtime.why_not("native"):
        return False
    code = native("uniformer_gelu_bwd", "ppqip")(
        h.data_ptr(), dh.data_ptr(), h.numel(), HALF[h.dtype], _runtime.parallel_for()
    )
    return code == 0


def column_sums(x: Tensor) -> Tensor | None:
    """x (M, N) -> (N,) in fp32; None of what it does not serve: it takes bf16, contiguous."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or not x.is_contiguous():
        return None
    if _runtime.why_not("native"):
        return None
    sums = x.new_empty(x.shape[1], dtype=torch.float32)
    code = native("uniformer_column_sums", "pqqpp")(
        x.data_ptr(), *x.shape, sums.data_ptr(), _runtime.parallel_for()
    )
    return None if code else sums

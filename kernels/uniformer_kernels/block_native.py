"""A whole block in one call of C++, `csrc/block_cpu.cpp`: inference on a CPU.

It runs the kernels that the operators of the block would run, to the same bits. What it spares is
Python's share, which in the network is five times what it is alone: kernels leave none of it in
the processor's caches.

Shapes: B clips, T frames, H rows, W columns, C channels.
"""

import math
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from uniformer_kernels import MAX_KERNEL, _runtime, attention_native, products_native
from uniformer_kernels._operator import only_autograd_listens
from uniformer_kernels._runtime import native

__all__ = ["infer_block"]

DTYPES = {torch.float32: 0, torch.bfloat16: 2}  # of dwconv3d's C interface
NAMES = (
    "dpe.weight", "dpe.bias", "norm1.mean", "norm1.variance", "norm1.weight", "norm1.bias",
    "first.weight", "first.bias", "tube.weight", "tube.bias", "second.weight", "second.bias",
    "norm2.mean", "norm2.variance", "norm2.weight", "norm2.bias", "fc1.weight", "fc1.bias",
    "fc2.weight", "fc2.bias",
)  # fmt: skip


def infer_block(
    x: Tensor, parameters: Sequence[Tensor | None], eps: tuple[float, float], num_heads: int = 0,
    scale: float | None = None,
) -> Tensor | None:  # fmt: skip
    """x + dpe(x), with the aggregation of its norm added, and then the FFN of that one's norm.

    Args:
        x: (B, T, H, W, C).
        parameters: of the block, as in `NAMES`, None for what it has not: without a dpe both of
            its own; of a LayerNorm mean and variance; of softmax attention both of the tube.
        eps: of the two norms.
        num_heads: of the softmax attention, where there is no tube.
        scale: factor on its scores.

    Returns:
        (B, T, H, W, C); or None where it does not serve, and operators are to run one by one:
        where gradients are recorded, anything listens to operators, or any tensor is not as its
        kernels take it.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if not only_autograd_listens((x, *parameters)) or not _may_run(x):
        return None
    described: list[Any] = []
    for t in parameters:
        if t is None:
            described.append(None)
            continue
        if not t.is_cpu or not t.is_contiguous():
            return None
        described.append((t.data_ptr(), t.dtype, t.shape))
    if type(num_heads) is not int:
        return None
    numbers = _numbers(x.shape, x.dtype, num_heads, tuple(described))
    if numbers is None:
        return None
    y = x.new_empty(x.shape)
    scale = (x.shape[-1] // (num_heads or 1)) ** -0.5 if scale is None else scale
    code = native("uniformer_block_fwd", "pppfffp")(
        numbers.buffer_info()[0], x.data_ptr(), y.data_ptr(), *eps, scale, _runtime.parallel_for()
    )
    if code:
        what = "no memory for" if code == 1 else "not served:"
        raise (MemoryError if code == 1 else ValueError)(f"{what} a block of x {tuple(x.shape)}")
    return y


def _may_run(x: Tensor) -> bool:
    if type(x) is not Tensor:
        return False
    if not x.is_cpu or x.dtype not in products_native.HALF or x.ndim != 5 or not x.is_contiguous():
        return False
    if _runtime.product_dtype(x) != x.dtype or x.numel() == 0:
        return False
    if _runtime.current_backend() not in ("auto", "native") or _runtime.why_not("native"):
        return False
    return not _runtime.is_transformed()


@lru_cache(maxsize=1024)
def _numbers(
    shape: torch.Size, dtype: torch.dtype, num_heads: int, described: tuple[Any, ...]
) -> array | None:
    """The structure of a call, to be read alone; None of what is not served.

    It depends on the arguments alone, so that one found again is as good as one made anew.
    """
    given = dict(zip(NAMES, described, strict=True))
    if not _fits(given, shape, dtype, num_heads):
        return None

    def pointer(name: str) -> int:
        return given[name][0] if given[name] else 0

    def half(name: str) -> int:
        return products_native.HALF[given[name][1]] if given[name] else 0

    def numbers(name: str) -> tuple[int, int]:
        return pointer(name), half(name)

    def depthwise(name: str) -> tuple[int, ...]:
        weight = given[f"{name}.weight"]
        kernel = weight[2][2:] if weight else (0, 0, 0)
        return pointer(f"{name}.weight"), pointer(f"{name}.bias"), half(f"{name}.weight"), *kernel

    def norm(name: str) -> tuple[int, ...]:
        per_row = given[f"{name}.mean"] is None
        parts = (numbers(f"{name}.{part}") for part in ("mean", "variance", "weight", "bias"))
        return 1, per_row, *(n for part in parts for n in part)

    def weight(name: str) -> tuple[int, ...]:
        matrix, bias = f"{name}.weight", numbers(f"{name}.bias")
        return pointer(matrix), *given[matrix][2][:2], half(matrix), *bias

    return array("q", (
        *shape, products_native.HALF[dtype], *depthwise("dpe"), *norm("norm1"), *weight("first"),
        *depthwise("tube"), num_heads, *weight("second"), *norm("norm2"), *weight("fc1"),
        *weight("fc2"),
    ))  # fmt: skip


def _fits(given: dict[str, Any], shape: torch.Size, dtype: torch.dtype, num_heads: int) -> bool:
    """Whether all parameters are as the kernels take them."""
    T, H, W, C = shape[1:]
    of_attention = given["tube.weight"] is None
    hidden = _rows(given["fc1.weight"])
    first = 3 * C if of_attention else C
    matrices = {"first": (first, C), "second": (C, C), "fc1": (hidden, C), "fc2": (C, hidden)}
    if not all(_multiplies(given, name, *size, dtype) for name, size in matrices.items()):
        return False
    for name in NAMES:
        if given[name] and given[name][1] not in (dtype, torch.float32):
            return False
        if not name.startswith("norm"):
            continue
        statistics = name.endswith((".mean", ".variance"))
        if statistics and (given[name] is None) != of_attention:
            return False
        if not _sized(given[name], C):
            return False
    convolutions = ("dpe",) if of_attention else ("dpe", "tube")
    if not all(_convolves(given, name, W, C, dtype) for name in convolutions):
        return False
    if not of_attention:
        return True
    if num_heads < 1 or C % num_heads:
        return False
    return attention_native.why_not_of(T * H * W, C // num_heads, dtype) is None


def _rows(weight: Any) -> int:
    return weight[2][0] if weight and weight[2] else 0


def _multiplies(
    given: dict[str, Any], name: str, rows: int, columns: int, dtype: torch.dtype
) -> bool:
    weight = given[f"{name}.weight"]
    if weight is None or weight[2] not in ((rows, columns), (rows, columns, 1, 1, 1)) or rows < 1:
        return False
    return (
        columns > 0
        and _sized(given[f"{name}.bias"], rows)
        and products_native.has_products(rows, columns, dtype)
    )


def _sized(given: Any, size: int) -> bool:
    return given is None or given[2] == (size,)


def _convolves(given: dict[str, Any], name: str, W: int, C: int, dtype: torch.dtype) -> bool:
    weight, bias = given[f"{name}.weight"], given[f"{name}.bias"]
    if weight is None:
        return True
    size = weight[2]
    if len(size) != 5 or size[:2] != (C, 1) or not _sized(bias, C):
        return False
    if math.prod(size[2:]) % 2 == 0 or max(size[2:]) > MAX_KERNEL:
        return False
    if bias is not None and bias[1] != weight[1]:
        return False
    serves = native("uniformer_dwconv3d_fwd_serves", "qqqi")
    return bool(serves(W, C, size[4], DTYPES[dtype]))

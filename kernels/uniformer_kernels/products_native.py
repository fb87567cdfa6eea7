"""The C++ of `pointwise` and `ffn`, `csrc/pointwise_cpu.cpp` and `csrc/ffn_cpu.cpp`: forwards, and
the gradient of GELU.

Shapes: M rows (B * T * H * W), K channels in, N channels out; C and F of the FFN.
"""

import ctypes

import torch
from torch import Tensor

from uniformer_kernels import _runtime
from uniformer_kernels._norm import Prologue
from uniformer_kernels._runtime import native

__all__ = ["ffn", "gelu_bwd_", "pointwise", "serves"]

HALF = {torch.float32: False, torch.bfloat16: True}  # dtypes that the kernels read and write


class _Rows(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("half", ctypes.c_int32),
    )  # fmt: skip

    @classmethod
    def of(cls, t: Tensor | None) -> "_Rows":
        return cls() if t is None else cls(t.data_ptr(), t.stride(0), HALF[t.dtype])


class _Norm(ctypes.Structure):
    _fields_ = (
        ("mean", ctypes.c_void_p), ("factor", ctypes.c_void_p), ("shift", ctypes.c_void_p),
        ("eps", ctypes.c_float),
    )  # fmt: skip


class _Weight(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    )  # fmt: skip


class _Result(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("half", ctypes.c_int32), ("residual", _Rows),
        ("scale", ctypes.c_void_p), ("clip", ctypes.c_int64),
    )  # fmt: skip


def serves(x: Tensor, dtype: torch.dtype, *others: Tensor | None) -> bool:
    """Whether the kernels take rows x (M, K), to be multiplied in `dtype`, and all other tensors,
    the first of which is a weight (N, K) with K no less a multiple of 8 than N."""
    if dtype not in HALF or x.device.type != "cpu":
        return False
    if any(t is not None and t.dtype not in HALF for t in (x, *others)):
        return False
    weight = others[0]
    assert weight is not None
    if _runtime.why_not("native") is not None:
        return False
    return native("uniformer_pointwise_fwd_serves", "qqi")(*weight.shape, HALF[dtype])


class _Arguments:
    """Tensors as C takes them, kept alive until it has."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def keep(self, t: Tensor | None) -> Tensor | None:
        if t is not None:
            self.kept.append(t)
        return t

    def floats(self, t: Tensor | None) -> int | None:
        t = self.keep(None if t is None else t.float().contiguous())
        return None if t is None else t.data_ptr()

    def rows(self, t: Tensor | None) -> _Rows:
        return _Rows.of(self.keep(t if t is None or t.stride(1) == 1 else t.contiguous()))

    def norm(self, norm: Prologue | None) -> _Norm:
        """(x - mean) * factor + shift; a LayerNorm's factor and shift are gamma and beta."""
        if norm is None:
            return _Norm()
        mean, gamma, beta = self.floats(norm.mean), norm.gamma, self.floats(norm.beta)
        factor = self.floats(gamma if norm.rstd is None else norm.rstd * gamma)
        return _Norm(mean, factor, beta, norm.eps)

    def weight(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> _Weight:
        weight = weight.to(dtype).contiguous()
        self.keep(weight)
        return _Weight(weight.data_ptr(), self.floats(bias), *weight.shape)

    def result(self, y: Tensor, residual: Tensor | None, scale: Tensor | None) -> _Result:
        clip = len(y) if scale is None else len(y) // len(scale)
        return _Result(
            y.data_ptr(), HALF[y.dtype], self.rows(residual), self.floats(scale), clip
        )  # fmt: skip


def pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Prologue | None, scale: Tensor | None,
    residual: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x (M, K), weight (N, K), scale (B,), residual (M, N) -> y (M, N), as `serves` says."""
    y = x.new_empty(len(x), len(weight), dtype=dtype if residual is None else residual.dtype)
    c, ref = _Arguments(), ctypes.byref
    code = native("uniformer_pointwise_fwd", "ppppqip")(
        ref(c.rows(x)), ref(c.norm(norm)), ref(c.weight(weight, bias, dtype)),
        ref(c.result(y, residual, scale)), len(x), HALF[dtype], _runtime.parallel_for(),
    )  # fmt: skip
    _check(code, x)
    return y


def ffn(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    norm: Prologue | None, scale: Tensor | None, residual: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x (M, C), w1 (F, C), w2 (C, F), scale (B,) -> y (M, C), as `serves` says."""
    y = x.new_empty(len(x), len(w2), dtype=x.dtype if residual else dtype)
    c, ref = _Arguments(), ctypes.byref
    code = native("uniformer_ffn_fwd", "pppppqip")(
        ref(c.rows(x)), ref(c.norm(norm)), ref(c.weight(w1, b1, dtype)),
        ref(c.weight(w2, b2, dtype)), ref(c.result(y, x if residual else None, scale)), len(x),
        HALF[dtype], _runtime.parallel_for(),
    )  # fmt: skip
    _check(code, x)
    return y


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


def _check(code: int, x: Tensor) -> None:
    if code:
        what = "no memory for" if code == 1 else "not served:"
        raise (MemoryError if code == 1 else ValueError)(f"{what} rows {tuple(x.shape)}")

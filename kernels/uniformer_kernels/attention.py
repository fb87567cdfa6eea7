"""Global token affinity: softmax attention over all tokens, from a packed qkv.

    o_n = softmax(scale * q_n k_n^T) v_n        for every head n

No affinity is stored: Triton kernels (`attention_triton.py`) and, on a CPU in bf16 and fp32, C++
(`csrc/attention_cpu*.cpp`) make them tile by tile, read a packed qkv as it is and write its
gradient packed. On a GPU PyTorch's own fused attention serves until ours is measured to be faster.

Shapes: B clips, N tokens, 3 for q | k | v, h heads, d channels a head; M keys where not N.
Paper: Li et al. 2022, https://arxiv.org/abs/2201.04676, eq. 4 and 7.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from uniformer_kernels import _runtime, attention_native
from uniformer_kernels._operator import Operator, once_differentiable

__all__ = ["attention", "attention_qkv", "attention_ref"]

WIDEST = 128  # channels of a head that the Triton kernels serve, in multiples of 4

_runtime.register("attention", {"cpu": ("native", "sdpa", "triton"), "cuda": ("sdpa", "triton")})
_triton = partial(_runtime.triton_kernels, "attention")


def _split(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3*h*d) -> q, k, v, each a view (B, N, h, d)."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
    return q, k, v


# --- Reference ------------------------------------------------------------------------


def attention_ref(
    qkv: Tensor, num_heads: int, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """`attention` as the paper writes it: the N x N affinity is materialised."""
    return _qkv_ref(*_split(qkv, num_heads), scale, dropout).flatten(2)


def _qkv_ref(q: Tensor, k: Tensor, v: Tensor, scale: float | None, dropout: float) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    affinity = ((q @ k.transpose(2, 3)) * scale).softmax(dim=-1)  # (B, h, N, M)
    return (F.dropout(affinity, dropout) @ v).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None, dropout: float) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    return out.transpose(1, 2)


# --- Which implementation serves ------------------------------------------------------


def _served_by(q: Tensor, k: Tensor, scale: float | None, dropout: float, packed: bool) -> str:
    """Which of reference, sdpa, native and triton runs for q (B, N, h, d) and k (B, M, h, d)."""
    asked = _runtime.current_backend()
    if asked == "reference" or _runtime.forward_mode():  # which PyTorch's fused one lacks
        return "reference"
    if q.device.type not in ("cpu", "cuda") or q.dtype == torch.float64:
        return "sdpa"
    chosen = _runtime.serving("attention", q.device)
    if chosen == "sdpa" and asked == "auto" and _measured_faster(q, k):
        chosen = "triton"
    if chosen == "triton":
        if why := _why_not_triton(q, k, scale, dropout):
            _runtime.announce("attention runs in PyTorch's fused attention, not in Triton", why)
            return "sdpa"
    elif chosen != "native" or not packed or dropout or attention_native.why_not(q):
        return "sdpa"
    return "sdpa" if _runtime.under_torch_func("attention") else chosen


def _why_not_triton(q: Tensor, k: Tensor, scale: float | None, dropout: float) -> str | None:
    if dropout:
        return f"affinities are to be dropped, with probability {dropout}: its kernels drop none"
    if q.shape[-1] > WIDEST or q.shape[-1] % 4:
        return f"heads of {q.shape[-1]} channels: not a multiple of 4 up to {WIDEST}"
    if scale is not None and not scale > 0:
        return f"a scale of {scale}: not above 0"
    if q.numel() == 0 or k.numel() == 0:
        return "there are no tokens"
    return None


def _measured_faster(q: Tensor, k: Tensor) -> bool:
    """Whether our kernels were the faster ones here, as benchmarks/tune_attention.py found."""
    if torch.compiler.is_compiling() or k.shape[1] != q.shape[1]:
        return False
    direction = "step" if torch.is_grad_enabled() and q.requires_grad else "fwd"
    row = _runtime.tuned("attention", (direction, q.dtype, *q.shape[1::2]), q.device)
    return row is not None and row["backend"] == "triton"


# --- Ops: shapes, dispatch, autograd --------------------------------------------------


def _fwd_kernel(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """qkv (B, N, 3*h*d) -> out (B, N, h*d), and logarithms of the softmax's sums (B, N, h)."""
    if _is_native(qkv, num_heads):
        return attention_native.fwd(qkv, num_heads, scale)
    out, lse = _triton().fwd(*_split(qkv, num_heads), scale)
    return out.flatten(2), lse


def _bwd_kernel(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float
) -> Tensor:
    """dqkv (B, N, 3*h*d)."""
    if _is_native(qkv, num_heads):
        return attention_native.bwd(dout, qkv, out, lse, num_heads, scale)
    dqkv = qkv.new_empty(qkv.shape)
    dout, out = (t.unflatten(-1, (num_heads, -1)) for t in (dout, out))
    into = _split(dqkv, num_heads)
    _triton().bwd(dout, *_split(qkv, num_heads), out, lse, scale, *into)
    return dqkv


def _is_native(qkv: Tensor, num_heads: int) -> bool:
    """Either kernel goes on from what the other has kept, whatever backend is asked for by then."""
    if qkv.is_cuda or _runtime.current_backend() == "triton" or _runtime.why_not("native"):
        return False
    return attention_native.why_not(_split(qkv, num_heads)[0]) is None


def _fwd_fake(qkv, num_heads, scale):
    B, N, width = qkv.shape
    lse = qkv.new_empty(B, N, num_heads, dtype=torch.float32)
    return qkv.new_empty(B, N, width // 3), lse


def _bwd_fake(dout, qkv, out, lse, num_heads, scale):
    return qkv.new_empty(qkv.shape)


def _qkv_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, N, h, d), k and v (B, M, h, d) -> out (B, N, h, d), lse (B, N, h)."""
    return _triton().fwd(q, k, v, scale)


def _qkv_bwd_kernel(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    found = _qkv_bwd_fake(dout, q, k, v, out, lse, scale)
    _triton().bwd(dout, q, k, v, out, lse, scale, *found)
    return found


def _qkv_fake(q, k, v, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _qkv_bwd_fake(dout, q, k, v, out, lse, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_fwd = Operator(
    "attention(Tensor qkv, int num_heads, float scale) -> (Tensor, Tensor)", _fwd_kernel, _fwd_fake
)
_bwd = Operator(
    "attention_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int num_heads, float scale)"
    " -> Tensor",
    _bwd_kernel, _bwd_fake,
)  # fmt: skip
_qkv = Operator(
    "attention_qkv(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    _qkv_kernel, _qkv_fake,
)  # fmt: skip
_qkv_bwd = Operator(
    "attention_qkv_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " float scale) -> (Tensor, Tensor, Tensor)",
    _qkv_bwd_kernel, _qkv_bwd_fake,
)  # fmt: skip


@_fwd.differentiable
class _Fwd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, num_heads, scale):
        out, lse = _fwd.below_autograd(qkv, num_heads, scale)
        ctx.save_for_backward(qkv, out, lse)
        ctx.rest = num_heads, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        return _bwd(dout, *ctx.saved_tensors, *ctx.rest), None, None


@_qkv.differentiable
class _Qkv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale):
        out, lse = _qkv.below_autograd(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        return *_qkv_bwd(dout, *ctx.saved_tensors, ctx.scale), None


@register_flop_formula(_fwd.packet)
def _fwd_flops(qkv_shape, num_heads, *_, **__):
    B, N, width = qkv_shape
    return 4 * B * N * N * width // 3


@register_flop_formula(_bwd.packet)
def _bwd_flops(dout_shape, *_, **__):
    B, N, width = dout_shape
    return 10 * B * N * N * width


@register_flop_formula(_qkv.packet)
def _qkv_flops(q_shape, k_shape, *_, **__):
    return 4 * math.prod(q_shape) * k_shape[1]


@register_flop_formula(_qkv_bwd.packet)
def _qkv_bwd_flops(dout_shape, q_shape, k_shape, *_, **__):
    return 10 * math.prod(q_shape) * k_shape[1]


# --- Public ---------------------------------------------------------------------------


def attention(
    qkv: Tensor, num_heads: int, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Attend from every token to every token.

    Differentiable once, under `backend("reference")` twice.

    Args:
        qkv: (B, N, 3*h*d), floating point, as a Linear gives it: q, k and v side by side, each
            of them h heads of d channels.
        num_heads: h.
        scale: factor on the scores, d**-0.5 unless given.
        dropout: probability of dropping an affinity; applied whenever above 0, by PyTorch's fused
            attention.

    Returns:
        (B, N, h*d), the heads side by side, in `qkv`'s dtype, or autocast's.

    Raises:
        ValueError: `qkv` is not (B, N, 3*h*d), or a number is out of its range.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be 1 or more, got {num_heads}")
    _check(qkv, "qkv", dropout)
    if qkv.ndim != 3 or qkv.shape[-1] % (3 * num_heads) or qkv.shape[-1] == 0:
        raise ValueError(
            f"qkv must be (B, N, 3*h*d) with h = {num_heads} heads, got shape {tuple(qkv.shape)}"
        )
    q, k, v = _split(qkv, num_heads)
    served_by = _served_by(q, k, scale, dropout, packed=True)
    if served_by in ("triton", "native"):
        return _fwd(qkv, num_heads, q.shape[-1] ** -0.5 if scale is None else scale)[0]
    run = _qkv_ref if served_by == "reference" else _sdpa
    return run(q, k, v, scale, dropout).flatten(2)


def attention_qkv(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Attend from every query to every key; `attention` for q, k and v that lie apart.

    Args:
        q: (B, N, h, d), not SDPA's order of axes, floating point; any strides, channels side by
            side are read as they are.
        k: (B, M, h, d), likewise, of q's dtype.
        v: (B, M, h, d), likewise.
        scale: factor on the scores, d**-0.5 unless given.
        dropout: as of `attention`.

    Returns:
        (B, N, h, d), in `q`'s dtype, or autocast's.

    Raises:
        ValueError: a shape, dtype or device is not as above, or dropout is out of its range.
    """
    _check(q, "q", dropout)
    if q.ndim != 4 or 0 in q.shape[2:]:
        raise ValueError(f"q must be (B, N, h, d), got shape {tuple(q.shape)}")
    B, _, h, d = q.shape
    for name, t in (("k", k), ("v", v)):
        _check(t, name, dropout)
        M = k.shape[1] if k.ndim == 4 else 0
        if t.shape != (B, M, h, d) or t.dtype != q.dtype or t.device != q.device:
            raise ValueError(
                f"{name} must be (B, M, h, d) with q's B, h and d, dtype and device, and k and v "
                f"of one shape; got {tuple(t.shape)}, {t.dtype}, {t.device} for q "
                f"{tuple(q.shape)}, {q.dtype}, {q.device}"
            )
    served_by = _served_by(q, k, scale, dropout, packed=False)
    if served_by == "triton":
        return _qkv(q, k, v, d**-0.5 if scale is None else scale)[0]
    return (_qkv_ref if served_by == "reference" else _sdpa)(q, k, v, scale, dropout)


def _check(t: Tensor, name: str, dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be from 0 to below 1, got {dropout}")
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise ValueError(
            f"{name} must be a floating point tensor, got {getattr(t, 'dtype', type(t).__name__)}"
        )

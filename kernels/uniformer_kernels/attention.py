"""Global token affinity: softmax attention over all tokens, from a packed qkv.

    o_n = softmax(scale * q_n k_n^T) v_n        for every head n

Shapes: B clips, N tokens, 3 for q | k | v, h heads, d channels a head.
Paper: Li et al. 2022, https://arxiv.org/abs/2201.04676, eq. 4 and 7.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from uniformer_kernels import _runtime, attention_native
from uniformer_kernels._operator import Operator

__all__ = ["attention", "attention_ref"]

# C++ for bf16 on a CPU; else PyTorch's fused attention, until ours is measured to be faster.
_runtime.register("attention", {"cpu": ("native", "sdpa"), "cuda": ("sdpa",)})


def _split(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3*h*d) -> q, k, v, each a view (B, h, N, d)."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


# --- Reference ------------------------------------------------------------------------


def attention_ref(
    qkv: Tensor, num_heads: int, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """`attention` as the paper writes it: the N x N affinity is materialised."""
    q, k, v = _split(qkv, num_heads)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    affinity = ((q @ k.transpose(-2, -1)) * scale).softmax(dim=-1)  # (B, h, N, N)
    return (F.dropout(affinity, dropout) @ v).transpose(1, 2).flatten(2)


# --- Ops: shapes, dispatch, autograd --------------------------------------------------


def _fwd_fake(qkv, num_heads, scale):
    B, N, width = qkv.shape
    lse = qkv.new_empty(B, N, num_heads, dtype=torch.float32)
    return qkv.new_empty(B, N, width // 3), lse


def _bwd_fake(dout, qkv, out, lse, num_heads, scale):
    return qkv.new_empty(qkv.shape)


_fwd = Operator(
    "attention(Tensor qkv, int num_heads, float scale) -> (Tensor, Tensor)",
    attention_native.fwd,
    _fwd_fake,
)
_bwd = Operator(
    "attention_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int num_heads, float scale)"
    " -> Tensor",
    attention_native.bwd, _bwd_fake,
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


@register_flop_formula(_fwd.packet)
def _fwd_flops(qkv_shape, num_heads, *_, **__):
    B, N, width = qkv_shape
    return 4 * B * N * N * width // 3


@register_flop_formula(_bwd.packet)
def _bwd_flops(dout_shape, *_, **__):
    B, N, width = dout_shape
    return 10 * B * N * N * width


# --- Public ---------------------------------------------------------------------------


def _transformed() -> bool:
    return _runtime.functorch_is_active() or _runtime.under_torch_func("attention")


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
        dropout: probability of dropping an affinity; applied whenever above 0.

    Returns:
        (B, N, h*d), the heads side by side, in `qkv`'s dtype.

    Raises:
        ValueError: `qkv` is not (B, N, 3*h*d), or a number is out of its range.
    """
    if num_heads < 1 or not 0 <= dropout < 1:
        raise ValueError(
            f"num_heads must be 1 or more and dropout from 0 to below 1, got {num_heads} and "
            f"{dropout}"
        )
    if not qkv.is_floating_point():
        raise ValueError(f"qkv must be floating point, got {qkv.dtype}")
    if qkv.ndim != 3 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"qkv must be (B, N, 3*h*d) with h = {num_heads} heads, got shape {tuple(qkv.shape)}"
        )
    if _runtime.current_backend() == "reference":
        return attention_ref(qkv, num_heads, scale, dropout)
    q, k, v = _split(qkv, num_heads)
    if not (dropout or _transformed()) and attention_native.why_not(qkv, num_heads) is None:
        return _fwd(qkv, num_heads, q.shape[-1] ** -0.5 if scale is None else scale)[0]
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    return out.transpose(1, 2).flatten(2)

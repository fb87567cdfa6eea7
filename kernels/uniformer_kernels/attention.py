"""Global token affinity: softmax attention over all tokens, from a packed qkv.

    o_n = softmax(scale * q_n k_n^T) v_n        for every head n

Shapes: B clips, N tokens, 3 for q | k | v, h heads, d channels a head.
Paper: Li et al. 2022, https://arxiv.org/abs/2201.04676, eq. 4 and 7.
"""

import torch.nn.functional as F
from torch import Tensor

from uniformer_kernels._runtime import register, serving

__all__ = ["attention", "attention_ref"]


register("attention", {"cpu": ("sdpa",), "cuda": ("sdpa",)})  # PyTorch's


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


# --- Public ---------------------------------------------------------------------------


def attention(
    qkv: Tensor, num_heads: int, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Attend from every token to every token.

    Args:
        qkv: (B, N, 3*h*d), floating point, as a Linear gives it: q, k and v side by side, each
            of them h heads of d channels.
        num_heads: h.
        scale: factor on the scores, d**-0.5 unless given.
        dropout: probability of dropping an affinity; applied whenever above 0.

    Returns:
        (B, N, h*d), the heads side by side, in `qkv`'s dtype.

    Raises:
        ValueError: `qkv` is not (B, N, 3*h*d).
    """
    if qkv.ndim != 3 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"qkv must be (B, N, 3*h*d) with h = {num_heads} heads, got shape {tuple(qkv.shape)}"
        )
    if serving("attention", qkv.device) == "reference":
        return attention_ref(qkv, num_heads, scale, dropout)
    q, k, v = _split(qkv, num_heads)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    return out.transpose(1, 2).flatten(2)

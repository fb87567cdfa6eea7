"""The blocks of the deep stages: DPE, global MHRA and FFN on kernels that share their passes.

On a CPU LayerNorms are made where the product behind them reads its rows; on a GPU the first with
the DPE, the second by PyTorch in a pass. Drop path and residual are the last step of the product
before them. So on a CPU a block keeps its input, q, k and v, the aggregated tokens and the sums of
either half for its gradient, and nothing else.

Equation numbers are those of Li et al. 2022, https://arxiv.org/abs/2201.04676.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from uniformer.configs import UniFormerConfig
from uniformer.layers import (
    DPE,
    FFN,
    DropPath,
    GlobalMHRA,
    lacks_weight,
    runs_fused,
    weight_and_bias,
    why_not_around,
)
from uniformer_kernels import (
    Norm,
    attention,
    dwconv3d_norm,
    ffn,
    normalises_rows,
    pointwise,
    pointwise_fork,
)
from uniformer_kernels.block_native import infer_block

__all__ = ["GlobalBlock", "SplitBlock"]

_PARTS: dict[str, tuple[type, ...]] = {
    "norm1": (nn.LayerNorm,), "attn": (GlobalMHRA,), "drop_path": (DropPath,),
    "norm2": (nn.LayerNorm,), "mlp": (FFN,),
}  # fmt: skip


class GlobalBlock(nn.Module):
    """LayerNorm, and attention over all tokens of the clip: eq. 1 to 5, 7 and 8.

    Its parts are modules under the official names, but their forwards are not called: where one
    has been replaced or hooked, or has dropout to do after a product, the block runs part by part
    instead, and the log says so once.
    """

    def __init__(self, cfg: UniFormerConfig, dim: int, drop_path: float) -> None:
        super().__init__()
        self.pos_embed = DPE(dim) if cfg.dpe else nn.Identity()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = _global_mhra(cfg, dim)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FFN(dim, int(dim * cfg.mlp_ratio), cfg.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, H, W, C) -> (B, T, H, W, C)."""
        return self.fused(x) if runs_fused(self, x) else self.part_by_part(x)

    def why_not_fused(self) -> str | None:
        """Why its parts are to be called one by one, or None."""
        why = why_not_around(self, **_PARTS)
        return why or self.attn.why_not_fused() or self.mlp.why_not_fused()

    def part_by_part(self, x: Tensor) -> Tensor:
        """The block as its modules make it."""
        x = self.pos_embed(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def fused(self, x: Tensor) -> Tensor:
        """The same on operators that do more at a time."""
        if (y := self._at_once(x)) is not None:
            return y
        # One name for all that is passed on, so that without gradients its memory is used again.
        y, tokens = self._begin(x)
        y = _attend(self.attn, y)
        tokens = self._project(self.attn, y, tokens)
        del y
        return self._ffn(tokens).view(x.shape)

    def _at_once(self, x: Tensor) -> Tensor | None:
        """All of it in inference on a CPU, where its kernels serve."""
        attn, mlp, norm1, norm2 = self.attn, self.mlp, self.norm1, self.norm2
        if torch.is_grad_enabled() or attn.dropout() or self.drop_path.is_active():
            return None
        if why_not_around(self, pos_embed=(DPE, nn.Identity)) or lacks_weight(self.pos_embed):
            return None
        parameters = (
            *weight_and_bias(self.pos_embed), None, None, *weight_and_bias(norm1),
            *weight_and_bias(attn.qkv), None, None, *weight_and_bias(attn.proj), None, None,
            *weight_and_bias(norm2), *weight_and_bias(mlp.fc1), *weight_and_bias(mlp.fc2),
        )  # fmt: skip
        return infer_block(x, parameters, (norm1.eps, norm2.eps), attn.num_heads, attn.scale)

    def _begin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q, k and v, and what the residual around the attention starts from, (B, T*H*W, ...)."""
        dpe: Any = self.pos_embed
        norm, qkv = self.norm1, self.attn.qkv
        if normalises_rows(x) or why_not_around(self, pos_embed=(DPE,)):
            tokens = dpe(x).flatten(1, -2)
            return pointwise_fork(tokens, qkv.weight, qkv.bias, norm=_norm(norm))
        x, normed = dwconv3d_norm(
            x, dpe.weight, dpe.bias, norm.weight, norm.bias, eps=norm.eps, residual=True
        )
        weight, bias = (None if t is None else t.to(normed.dtype) for t in (qkv.weight, qkv.bias))
        return F.linear(normed.flatten(1, -2), weight, bias), x.flatten(1, -2)

    def _project(self, attn: GlobalMHRA, y: Tensor, residual: Tensor) -> Tensor:
        """The residual (B, N, C), plus the projection of what was aggregated, y (B, N, C)."""
        scale = self.drop_path.draw(residual)
        return pointwise(y, attn.proj.weight, attn.proj.bias, scale=scale, residual=residual)

    def _ffn(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, C), plus what the FFN makes of them."""
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        return ffn(
            tokens, fc1.weight, fc1.bias, fc2.weight, fc2.bias, norm=_norm(self.norm2),
            scale=self.drop_path.draw(tokens), residual=True,
        )  # fmt: skip


class SplitBlock(GlobalBlock):
    """A global block with divided attention: over time at each position, then over each frame.

    As in the official code, attention over time is only the input of attention over space: the
    residual around the latter starts from the output of the DPE.
    """

    def __init__(self, cfg: UniFormerConfig, dim: int, drop_path: float) -> None:
        super().__init__(cfg, dim, drop_path)
        self.t_norm = nn.LayerNorm(dim, eps=1e-6)
        self.t_attn = _global_mhra(cfg, dim)

    def why_not_fused(self) -> str | None:
        """Why its parts are to be called one by one, or None."""
        why = why_not_around(self, t_norm=(nn.LayerNorm,), t_attn=(GlobalMHRA,))
        return why or self.t_attn.why_not_fused() or super().why_not_fused()

    def part_by_part(self, x: Tensor) -> Tensor:
        """The block as its modules make it."""
        B, _, H, W, _ = x.shape
        if B == 0:
            return x
        x = self.pos_embed(x)
        t = rearrange(x, "b t h w c -> (b h w) t c")
        t = t + self.drop_path(self.t_attn(self.t_norm(t)))
        s = rearrange(t, "(b h w) t c -> (b t) h w c", b=B, h=H, w=W)
        s = self.drop_path(self.attn(self.norm1(s)))
        x = x + rearrange(s, "(b t) h w c -> b t h w c", b=B)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def fused(self, x: Tensor) -> Tensor:
        """The same on operators that do more at a time."""
        B, _, H, W, _ = shape = x.shape
        x = self.pos_embed(x)
        t = rearrange(x, "b t h w c -> (b h w) t c")
        t_qkv, qkv = self.t_attn.qkv, self.attn.qkv
        y, t = pointwise_fork(t, t_qkv.weight, t_qkv.bias, norm=_norm(self.t_norm))
        t = self._project(self.t_attn, _attend(self.t_attn, y), t)
        s = rearrange(t, "(b h w) t c -> (b t) (h w) c", b=B, h=H, w=W)
        y = pointwise(s, qkv.weight, qkv.bias, norm=_norm(self.norm1))
        x = self._project(self.attn, _attend(self.attn, y), x.flatten(0, 1).flatten(1, 2))
        return self._ffn(x.view(B, -1, shape[-1])).view(shape)


def _global_mhra(cfg: UniFormerConfig, dim: int) -> GlobalMHRA:
    return GlobalMHRA(
        dim, dim // cfg.head_dim, cfg.qkv_bias, cfg.qk_scale, cfg.attn_drop_rate, cfg.drop_rate
    )


def _attend(attn: GlobalMHRA, qkv: Tensor) -> Tensor:
    """qkv (B, N, 3*C) -> (B, N, C)."""
    return attention(qkv, attn.num_heads, attn.scale, attn.dropout())


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(None, norm.weight, norm.bias, norm.eps, per_row=True)

"""The blocks of the deep stages: DPE, global MHRA and FFN.

Equation numbers are those of Li et al. 2022, https://arxiv.org/abs/2201.04676.
"""

from einops import rearrange
from torch import Tensor, nn

from uniformer.configs import UniFormerConfig
from uniformer.layers import DPE, FFN, DropPath, GlobalMHRA

__all__ = ["GlobalBlock", "SplitBlock"]


class GlobalBlock(nn.Module):
    """A block of the deep stages: LayerNorm, and attention over all tokens of the clip."""

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
        x = self.pos_embed(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SplitBlock(GlobalBlock):
    """A global block with divided attention: over time at each position, then over each frame.

    As in the official code, attention over time is only the input of attention over space: the
    residual around the latter starts from the output of the DPE.
    """

    def __init__(self, cfg: UniFormerConfig, dim: int, drop_path: float) -> None:
        super().__init__(cfg, dim, drop_path)
        self.t_norm = nn.LayerNorm(dim, eps=1e-6)
        self.t_attn = _global_mhra(cfg, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, H, W, C) -> (B, T, H, W, C)."""
        B, _, H, W, _ = x.shape
        x = self.pos_embed(x)
        t = rearrange(x, "b t h w c -> (b h w) t c")
        t = t + self.drop_path(self.t_attn(self.t_norm(t)))
        s = rearrange(t, "(b h w) t c -> (b t) h w c", b=B, h=H, w=W)
        s = self.drop_path(self.attn(self.norm1(s)))
        x = x + rearrange(s, "(b t) h w c -> b t h w c", b=B)
        return x + self.drop_path(self.mlp(self.norm2(x)))


def _global_mhra(cfg: UniFormerConfig, dim: int) -> GlobalMHRA:
    return GlobalMHRA(
        dim, dim // cfg.head_dim, cfg.qkv_bias, cfg.qk_scale, cfg.attn_drop_rate, cfg.drop_rate
    )

"""UniFormer in plain PyTorch: the rival of the benchmarks, and a second opinion for the tests.

It is written the way the official code is: (B, C, T, H, W) between blocks, nn.Conv3d for every
convolution, those of size 1 included, and tokens flattened to (B, N, C) and back in every global
block. It computes the same function as `uniformer.UniFormer` and loads its state_dict as it is.

Which memory format the convolutions run in is the caller's choice, as for any network of PyTorch:
NCTHW, or `model.to(memory_format=torch.channels_last_3d)` with a clip in that format.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniformer.configs import UniFormerConfig

__all__ = ["PlainGlobalBlock", "PlainLocalBlock", "PlainUniFormer"]

Three = tuple[int, int, int]


class DropPath(nn.Module):
    """Stochastic depth: in training, zero a branch for some samples and scale up the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ...) -> the same shape."""
        if not self.training or self.rate == 0:
            return x
        return x * F.dropout(x.new_ones(len(x), *[1] * (x.ndim - 1)), self.rate)


class MLP(nn.Module):
    """fc2(GELU(fc1(x))), on (B, C, T, H, W) with `conv`, otherwise on (B, N, C)."""

    def __init__(self, cfg: UniFormerConfig, dim: int, conv: bool = False) -> None:
        super().__init__()
        hidden = int(dim * cfg.mlp_ratio)
        layer = partial(nn.Conv3d, kernel_size=1) if conv else nn.Linear
        self.fc1 = layer(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = layer(hidden, dim)
        self.drop = nn.Dropout(cfg.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Attention(nn.Module):
    """Softmax attention over N tokens, naive or by `F.scaled_dot_product_attention`."""

    def __init__(self, cfg: UniFormerConfig, dim: int, sdpa: bool) -> None:
        super().__init__()
        self.heads = dim // cfg.head_dim
        self.scale = cfg.head_dim**-0.5 if cfg.qk_scale is None else cfg.qk_scale
        self.sdpa = sdpa
        self.qkv = nn.Linear(dim, 3 * dim, bias=cfg.qkv_bias)
        self.attn_drop = nn.Dropout(cfg.attn_drop_rate)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(cfg.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, N, C)."""
        B, N, C = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, head_dim)
        if self.sdpa:
            dropout = self.attn_drop.p if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        else:
            affinity = (q @ k.transpose(2, 3)) * self.scale  # (B, heads, N, N)
            out = self.attn_drop(affinity.softmax(dim=-1)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(B, N, C)))


def _depthwise(dim: int, size: int) -> nn.Conv3d:
    return nn.Conv3d(dim, dim, size, padding=size // 2, groups=dim)


def _to_grid(x: Tensor, grid: torch.Size) -> Tensor:
    """x (B, T * H * W, C) -> (B, C, T, H, W), a view.

    Not `x.transpose(1, 2).unflatten(2, grid)`: with one clip that makes up a batch stride of C,
    for which PyTorch's BatchNorm on the CPU returns wrong gradients.
    """
    return x.unflatten(1, grid).permute(0, 4, 1, 2, 3)


class PlainLocalBlock(nn.Module):
    """DPE, BatchNorm and a depthwise tube between two 1x1x1 convolutions, BatchNorm and MLP."""

    def __init__(self, cfg: UniFormerConfig, dim: int, drop_path: float) -> None:
        super().__init__()
        self.pos_embed = _depthwise(dim, 3) if cfg.dpe else None
        self.norm1 = nn.BatchNorm3d(dim)
        self.conv1 = nn.Conv3d(dim, dim, 1)
        self.conv2 = nn.Conv3d(dim, dim, 1)
        self.attn = _depthwise(dim, cfg.tube_size)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.BatchNorm3d(dim)
        self.mlp = MLP(cfg, dim, conv=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, T, H, W) -> (B, C, T, H, W)."""
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        x = x + self.drop_path(self.conv2(self.attn(self.conv1(self.norm1(x)))))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PlainGlobalBlock(nn.Module):
    """DPE, LayerNorm and attention over all tokens of the clip, LayerNorm and MLP."""

    def __init__(
        self, cfg: UniFormerConfig, dim: int, drop_path: float, sdpa: bool = False
    ) -> None:
        super().__init__()
        self.pos_embed = _depthwise(dim, 3) if cfg.dpe else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(cfg, dim, sdpa)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(cfg, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, T, H, W) -> (B, C, T, H, W), in the same memory format."""
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)  # (B, N, C)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return _to_grid(x, grid)


class PatchEmbed(nn.Module):
    """Strided convolution, then LayerNorm over channels."""

    def __init__(
        self, dim: int, out_dim: int, size: Three, stride: Three, padding: Three = (0, 0, 0)
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(out_dim)
        self.proj = nn.Conv3d(dim, out_dim, size, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, T, H, W) -> (B, out_dim, T', H', W'), in the convolution's memory format."""
        x = self.proj(x)
        y = _to_grid(self.norm(x.flatten(2).transpose(1, 2)), x.shape[2:])
        return y.contiguous() if x.is_contiguous() else y


class PlainUniFormer(nn.Module):
    """UniFormer for video classification, without any kernel of ours.

    Args:
        cfg: the network, any but those with `split` or `std`.
        sdpa: attention by `F.scaled_dot_product_attention`; otherwise (B, heads, N, N) is stored.

    Raises:
        ValueError: `cfg` asks for divided attention or overlapping downsampling.
    """

    def __init__(self, cfg: UniFormerConfig, sdpa: bool = False) -> None:
        super().__init__()
        if cfg.split or cfg.std:
            raise ValueError(
                f"the plain network needs split=False and std=False, got split={cfg.split} and "
                f"std={cfg.std}; uniformer.UniFormer has both"
            )
        # On the CPU whatever the default device, meta included.
        rates = torch.linspace(0, cfg.drop_path_rate, sum(cfg.depths), device="cpu").tolist()

        def stage(i: int) -> nn.Sequential:
            dim = cfg.dims[i]
            drop_paths = [rates.pop(0) for _ in range(cfg.depths[i])]
            if cfg.stages[i] == "L":
                return nn.Sequential(*[PlainLocalBlock(cfg, dim, rate) for rate in drop_paths])
            return nn.Sequential(*[PlainGlobalBlock(cfg, dim, rate, sdpa) for rate in drop_paths])

        half = (1, 2, 2)
        self.patch_embed1 = PatchEmbed(
            cfg.in_channels, cfg.dims[0], (3, 4, 4), (2, 4, 4), (1, 0, 0)
        )
        self.pos_drop = nn.Dropout(cfg.drop_rate)
        self.blocks1 = stage(0)
        self.patch_embed2 = PatchEmbed(cfg.dims[0], cfg.dims[1], half, half)
        self.blocks2 = stage(1)
        self.patch_embed3 = PatchEmbed(cfg.dims[1], cfg.dims[2], half, half)
        self.blocks3 = stage(2)
        self.patch_embed4 = PatchEmbed(cfg.dims[2], cfg.dims[3], half, half)
        self.blocks4 = stage(3)
        self.norm = nn.BatchNorm3d(cfg.dims[3])
        self.head = nn.Linear(cfg.dims[3], cfg.num_classes) if cfg.num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """x (B, 3, T, H, W), normalised -> feature map (B, C, T', H', W')."""
        x = self.blocks1(self.pos_drop(self.patch_embed1(x)))
        x = self.blocks2(self.patch_embed2(x))
        x = self.blocks3(self.patch_embed3(x))
        x = self.blocks4(self.patch_embed4(x))
        return self.norm(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """Feature map (B, C, T', H', W') -> logits (B, num_classes)."""
        return self.head(x.flatten(2).mean(-1))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, T, H, W), normalised -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

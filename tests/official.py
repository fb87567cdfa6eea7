"""A UniFormer laid out as the official one and mmaction2's are: names, order, (B, C, T, H, W).

`kernelize` is to find its blocks by what they hold. Written anew; numbers of the official code
itself are in `golden`.
"""

from functools import partial

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """As timm has it."""

    def __init__(self, drop_prob: float, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.drop_prob
        return x * mask / (1 - self.drop_prob if self.scale_by_keep else 1)


class Mlp(nn.Module):
    def __init__(self, dim: int, drop: float, conv: bool) -> None:
        super().__init__()
        layer = partial(nn.Conv3d, kernel_size=1) if conv else nn.Linear
        self.fc1 = layer(dim, 4 * dim)
        self.act = nn.GELU()
        self.fc2 = layer(4 * dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.act(self.fc1(x)))
        return self.drop(self.fc2(hidden))


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, drop: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        affinity = (self.scale * (q @ k.mT)).softmax(-1)
        return self.proj_drop(self.proj((self.attn_drop(affinity) @ v).transpose(1, 2).flatten(2)))


def _depthwise(dim: int, size: int) -> nn.Conv3d:
    return nn.Conv3d(dim, dim, size, padding=size // 2, groups=dim)


class Block(nn.Module):
    """What all three kinds hold; official ones have no such base."""

    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.pos_embed = _depthwise(dim, 3)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()


class CBlock(Block):
    def __init__(self, dim: int, drop_path: float = 0.0, drop: float = 0.0) -> None:
        super().__init__(dim, drop_path)
        self.norm1 = nn.BatchNorm3d(dim)
        self.conv1 = nn.Conv3d(dim, dim, 1)
        self.conv2 = nn.Conv3d(dim, dim, 1)
        self.attn = _depthwise(dim, 5)
        self.norm2 = nn.BatchNorm3d(dim)
        self.mlp = Mlp(dim, drop, conv=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed(x)
        x = x + self.drop_path(self.conv2(self.attn(self.conv1(self.norm1(x)))))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SABlock(Block):
    def __init__(
        self, dim: int, heads: int, drop_path: float = 0.0, drop: float = 0.0, eps: float = 1e-6
    ) -> None:
        super().__init__(dim, drop_path)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, drop)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, drop, conv=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed(x)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        tokens = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        return tokens.transpose(1, 2).reshape(x.shape)


class SplitSABlock(SABlock):
    def __init__(self, dim: int, heads: int, *args: float, eps: float = 1e-6) -> None:
        super().__init__(dim, heads, *args, eps=eps)
        self.t_norm = nn.LayerNorm(dim, eps=eps)
        self.t_attn = Attention(dim, heads, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed(x)
        B, C, T, H, W = x.shape
        x = x.flatten(3).permute(0, 2, 3, 1)  # (B, T, H*W, C)
        a = x.transpose(1, 2).reshape(B * H * W, T, C)
        a = a + self.drop_path(self.t_attn(self.t_norm(a)))
        a = a.unflatten(0, (B, H * W)).transpose(1, 2).reshape(B * T, H * W, C)
        a = x.reshape(a.shape) + self.drop_path(self.attn(self.norm1(a)))
        a = a.view(B, T * H * W, C)
        a = a + self.drop_path(self.mlp(self.norm2(a)))
        return a.transpose(1, 2).reshape(B, C, T, H, W)


class PatchEmbed(nn.Module):
    def __init__(self, dim: int, out_dim: int, first: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(out_dim)
        form = ((3, 4, 4), (2, 4, 4), (1, 0, 0)) if first else ((1, 2, 2), (1, 2, 2))
        self.proj = nn.Conv3d(dim, out_dim, *form)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        return tokens.unflatten(1, x.shape[2:]).permute(0, 4, 1, 2, 3).contiguous()


class Uniformer(nn.Module):
    """The official one; in mmaction2 it ends with `norm`, and lies under `backbone.`."""

    def __init__(
        self, head: bool = True, split: bool = False, eps: float = 1e-6, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        dims, heads = (16, 32, 64, 64), (1, 1, 2, 4)
        rates = torch.linspace(0, drop_path, 8).view(4, 2).tolist()
        late = SplitSABlock if split else SABlock
        for i, dim in enumerate(dims):
            embed = PatchEmbed(dims[i - 1] if i else 3, dim, first=i == 0)
            self.add_module(f"patch_embed{i + 1}", embed)
            blocks = [
                CBlock(dim, r) if i < 2 else late(dim, heads[i], r, eps=eps) for r in rates[i]
            ]
            self.add_module(f"blocks{i + 1}", nn.ModuleList(blocks))
        self.norm = nn.BatchNorm3d(dims[-1])
        self.head = nn.Linear(dims[-1], 7) if head else None

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        x = x[0] if isinstance(x, list) else x
        for i in range(1, 5):
            x = self.get_submodule(f"patch_embed{i}")(x)
            for block in self.get_submodule(f"blocks{i}"):
                x = block(x)
        x = self.norm(x)
        return x if self.head is None else self.head(x.flatten(2).mean(-1))


class Recognizer(nn.Module):
    """mmaction2's: the same blocks, whose LayerNorms have PyTorch's own eps, under a prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Uniformer(head=False, eps=1e-5)
        self.cls_head = nn.ModuleDict({"fc_cls": nn.Linear(64, 7)})

    def forward(self, x: Tensor) -> Tensor:
        return self.cls_head["fc_cls"](self.backbone(x).mean((2, 3, 4)))

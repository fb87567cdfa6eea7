"""The operators of UniFormer. Knows torch and triton, nothing of models."""

from uniformer_kernels._chunked import normalises_rows
from uniformer_kernels._norm import Norm, channel_stats, sync_stats
from uniformer_kernels._runtime import (
    announce,
    backend,
    current_backend,
    product_dtype,
    report,
    why_not,
)
from uniformer_kernels.attention import attention, attention_qkv
from uniformer_kernels.dwconv3d import MAX_KERNEL, dwconv3d, dwconv3d_stats
from uniformer_kernels.dwconv3d_norm import dwconv3d_norm
from uniformer_kernels.ffn import ffn
from uniformer_kernels.patch_embed import Pixels, patch_embed
from uniformer_kernels.pointwise import pointwise, pointwise_fork, pointwise_stats

__all__ = [
    "MAX_KERNEL",
    "Norm",
    "Pixels",
    "announce",
    "attention",
    "attention_qkv",
    "backend",
    "channel_stats",
    "current_backend",
    "dwconv3d",
    "dwconv3d_norm",
    "dwconv3d_stats",
    "ffn",
    "normalises_rows",
    "patch_embed",
    "pointwise",
    "pointwise_fork",
    "pointwise_stats",
    "product_dtype",
    "report",
    "sync_stats",
    "why_not",
]

"""The operators of UniFormer. Knows torch, nothing of models."""

from uniformer_kernels._runtime import backend
from uniformer_kernels.attention import attention
from uniformer_kernels.dwconv3d import dwconv3d

__all__ = ["attention", "backend", "dwconv3d"]

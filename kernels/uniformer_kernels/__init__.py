"""The operators of UniFormer. Knows torch and triton, nothing of models."""

from uniformer_kernels._runtime import backend, report
from uniformer_kernels.attention import attention
from uniformer_kernels.dwconv3d import MAX_KERNEL, dwconv3d

__all__ = ["MAX_KERNEL", "attention", "backend", "dwconv3d", "report"]

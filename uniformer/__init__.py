"""UniFormer for video: the official weights and numbers, a readable network, fast kernels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uniformer.checkpoint import CheckpointError as CheckpointError
    from uniformer.checkpoint import load_weights as load_weights
    from uniformer.checkpoint import read_checkpoint as read_checkpoint
    from uniformer.checkpoint import save_checkpoint as save_checkpoint
    from uniformer.configs import InputConfig as InputConfig
    from uniformer.configs import UniFormerConfig as UniFormerConfig
    from uniformer.depthwise import DepthwiseConv3d as DepthwiseConv3d
    from uniformer.factory import create_model as create_model
    from uniformer.factory import list_models as list_models
    from uniformer.factory import load_model as load_model
    from uniformer.kernelized import kernelize as kernelize
    from uniformer.model import UniFormer as UniFormer
    from uniformer.pretrained import list_pretrained as list_pretrained

__version__ = "0.1.0"

# Names are found on first use: the processes that decode video need none of them, nor torch.
_HOME = {
    "CheckpointError": "checkpoint",
    "DepthwiseConv3d": "depthwise",
    "InputConfig": "configs",
    "UniFormer": "model",
    "UniFormerConfig": "configs",
    "create_model": "factory",
    "kernelize": "kernelized",
    "list_models": "factory",
    "list_pretrained": "pretrained",
    "load_model": "factory",
    "load_weights": "checkpoint",
    "read_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'uniformer' has no attribute {name!r}")
    return getattr(import_module(f"uniformer.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])

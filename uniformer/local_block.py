"""The block of the shallow stages: DPE, local MHRA and FFN on kernels that share their passes.

Plain PyTorch reads and writes the activation some thirty times in a block; on a GPU this one does
so eleven times forward, by count. Statistics of a BatchNorm are taken by the operator that writes
its input, and applied by the one that reads it, as running ones are in eval mode. Drop path and
residual are the last step of the product before them. The hidden layer of the FFN is never stored.

Equation numbers are those of Li et al. 2022, https://arxiv.org/abs/2201.04676.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from uniformer.configs import UniFormerConfig
from uniformer.layers import (
    BATCH_NORMS,
    DPE,
    FFN,
    DepthwiseConv,
    DropPath,
    Pointwise,
    batch_norm,
    lacks_weight,
    local_mhra,
    of_batch,
    runs_fused,
    weight_and_bias,
    why_not_around,
)
from uniformer_kernels import (
    Norm,
    channel_stats,
    dwconv3d,
    dwconv3d_stats,
    ffn,
    pointwise,
    pointwise_fork,
    pointwise_stats,
    sync_stats,
)
from uniformer_kernels.block_native import infer_block

__all__ = ["LocalBlock"]

_PARTS: dict[str, tuple[type, ...]] = {
    "pos_embed": (DPE, nn.Identity), "norm1": BATCH_NORMS, "conv1": (Pointwise,),
    "attn": (DepthwiseConv,), "conv2": (Pointwise,), "drop_path": (DropPath,), "norm2": BATCH_NORMS,
    "mlp": (FFN,),
}  # fmt: skip


class LocalBlock(nn.Module):
    """BatchNorm, and aggregation in a small tube of tokens: eq. 1 to 6 and 8.

    Its parts are modules under the official names, but their forwards are not called: where one
    has been replaced or hooked, or has dropout to do, the block runs part by part instead, and the
    log says so once.
    """

    def __init__(self, cfg: UniFormerConfig, dim: int, drop_path: float) -> None:
        super().__init__()
        self.pos_embed = DPE(dim) if cfg.dpe else nn.Identity()
        self.norm1 = nn.BatchNorm3d(dim)
        self.conv1 = Pointwise(dim, dim)
        self.conv2 = Pointwise(dim, dim)
        self.attn = DepthwiseConv(dim, cfg.tube_size)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.BatchNorm3d(dim)
        self.mlp = FFN(dim, int(dim * cfg.mlp_ratio), cfg.drop_rate, conv=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, H, W, C) -> (B, T, H, W, C)."""
        return self.fused(x) if runs_fused(self, x) else self.part_by_part(x)

    def why_not_fused(self) -> str | None:
        """Why its parts are to be called one by one, or None."""
        return why_not_around(self, **_PARTS) or self.mlp.why_not_fused()

    def part_by_part(self, x: Tensor) -> Tensor:
        """The block as its modules make it."""
        x = self.pos_embed(x)
        mhra = local_mhra(batch_norm(self.norm1, x), self.conv1, self.attn, self.conv2)
        x = x + self.drop_path(mhra)
        return x + self.drop_path(self.mlp(batch_norm(self.norm2, x)))

    def fused(self, x: Tensor) -> Tensor:
        """The same on operators that pass on what the next one needs."""
        if (y := self._at_once(x)) is not None:
            return y
        x, stats = self._dpe(x)
        conv1, conv2, fc1, fc2 = self.conv1, self.conv2, self.mlp.fc1, self.mlp.fc2
        run = pointwise_stats if of_batch(self.norm2) else _without(pointwise)
        # One name for all that is passed on, so that without gradients its memory is used again.
        y, x = pointwise_fork(x, conv1.weight, conv1.bias, norm=_norm(self.norm1, stats, x))
        y = dwconv3d(y, self.attn.weight, self.attn.bias)
        x, stats = run(y, conv2.weight, conv2.bias, scale=self.drop_path.draw(x), residual=x)
        del y
        return ffn(
            x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, norm=_norm(self.norm2, stats, x),
            scale=self.drop_path.draw(x), residual=True,
        )  # fmt: skip

    def _at_once(self, x: Tensor) -> Tensor | None:
        """All of it in inference on a CPU, where its kernels serve."""
        norm1, norm2, mlp = self.norm1, self.norm2, self.mlp
        if torch.is_grad_enabled() or self.drop_path.is_active() or lacks_weight(self.pos_embed):
            return None
        if of_batch(norm1) or of_batch(norm2):
            return None
        parameters = (
            *weight_and_bias(self.pos_embed), norm1.running_mean, norm1.running_var,
            *weight_and_bias(norm1), *weight_and_bias(self.conv1), *weight_and_bias(self.attn),
            *weight_and_bias(self.conv2), norm2.running_mean, norm2.running_var,
            *weight_and_bias(norm2), *weight_and_bias(mlp.fc1), *weight_and_bias(mlp.fc2),
        )  # fmt: skip
        return infer_block(x, parameters, (norm1.eps, norm2.eps))

    def _dpe(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Its output, and the statistics of that where `norm1` needs them."""
        if isinstance(self.pos_embed, nn.Identity):
            return x, channel_stats(x) if of_batch(self.norm1) else None
        run = dwconv3d_stats if of_batch(self.norm1) else _without(dwconv3d)
        return run(x, self.pos_embed.weight, self.pos_embed.bias, residual=True)


def _without(op: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """An operator that might have given statistics, and does not."""
    return lambda *args, **kwargs: (op(*args, **kwargs), None)


def _norm(norm: Any, stats: Tensor | None, x: Tensor) -> Norm:
    """The norm as the operator that reads x is to apply it: x's own statistics, or running ones."""
    if stats is not None:
        return _from_batch(norm, stats, x)
    running = torch.stack([norm.running_mean, norm.running_var])
    return Norm(running, norm.weight, norm.bias, norm.eps, False)


def _from_batch(norm: Any, stats: Tensor, x: Tensor) -> Norm:
    """The norm with these statistics of x, which also go into its running ones, as PyTorch does."""
    group, rows = _group(norm), x.numel() // x.shape[-1]
    stats, rows = sync_stats(stats, rows, group)
    if norm.training:
        if rows == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input {tuple(x.shape)}"
            )
        if norm.track_running_stats and norm.running_mean is not None:
            _update(norm, stats, rows)
    return Norm(stats, norm.weight, norm.bias, norm.eps, True, group)


def _group(norm: nn.Module) -> str:
    """The process group that shares a norm's statistics, or ""."""
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training):
        return ""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ""
    group: Any = norm.process_group or torch.distributed.group.WORLD
    return group.group_name if group.size() > 1 else ""


@torch.no_grad()
def _update(norm: Any, stats: Tensor, rows: int) -> None:
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    mean, var = stats
    momentum = 0.0 if momentum is None else momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_((var * (rows / (rows - 1))).to(norm.running_var.dtype), momentum)

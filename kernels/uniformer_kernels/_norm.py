"""Norms without passes of their own: what the operators around them know of them.

Of a BatchNorm, the operator that writes an activation also takes the statistics; the one that
reads it normalises what it loads. Statistics are (2, C), mean and biased variance, as deviations
from a mean of their own part of the tensor and merged by Chan's formula, so that a large mean costs
no digits.

The gradient through normalised values t = gamma * xhat + beta is, over n rows,

    dx = gamma * rstd * (dt - dbeta / n - xhat * dgamma / n)

and where t only enters a matrix product with weight W, whose gradient is needed anyway, the sums
over rows come out of that: with G = dout^T xhat and db = sum dout, both of W's size,

    dgamma = sum_n W * G    dbeta = db W    dW = gamma * G + db beta^T

A LayerNorm's statistics are those of a row of C channels: the operator that reads the row makes
them, and gamma and beta are applied there, too.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from uniformer_kernels import _runtime

__all__ = [
    "NO_NORM", "SCHEMA", "Norm", "Prologue", "Sums", "channel_stats", "check_norm", "merge_stats",
    "norm_ref", "sync_stats",
]  # fmt: skip


class Norm(NamedTuple):
    """A BatchNorm or LayerNorm, for an operator to apply to what it reads.

    Attributes:
        stats: (2, C), mean and biased variance: of the operator's input, or running ones. None for
            a LayerNorm.
        weight: (C,), gamma, or None for ones.
        bias: (C,), beta, or None for zeros.
        eps: added to the variance.
        of_batch: whether the statistics are those of the input, so that its gradient goes through
            them, as in training; otherwise they are constants, as in eval mode.
        group: name of the process group (`group.group_name`) whose ranks share the statistics, as
            `sync_stats` makes them, or "".
        per_row: whether it is a LayerNorm, over the channels of each row.
    """

    stats: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    of_batch: bool = True
    group: str = ""
    per_row: bool = False


def check_norm(norm: Norm | None, x: Tensor, scale: Tensor | None) -> None:
    """Raise ValueError unless a norm is one, of x, and nothing is asked that has no gradient."""
    if norm is not None and not isinstance(norm, Norm):
        raise ValueError(
            f"norm must be a uniformer_kernels.Norm, of statistics, weight and bias, "
            f"got a {type(norm).__name__}"
        )
    C = x.shape[-1]
    shapes: dict[str, tuple] = {"scale": (scale, x.shape[:1])}
    if norm is not None:
        if norm.per_row == (norm.stats is not None):
            raise ValueError(
                "norm must have statistics, or be per_row, for which they are made, and not both"
            )
        shapes |= {"norm.stats": (norm.stats, (2, C))}
        shapes |= {"norm.weight": (norm.weight, (C,)), "norm.bias": (norm.bias, (C,))}
    _runtime.check_shapes(x, shapes)
    known = {"scale": scale, "norm.stats": None if norm is None else norm.stats}
    for name, t in known.items():
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} gets no gradient, but requires one: detach it")


# A Norm as arguments of an operator, and what stands for none.
SCHEMA = (
    "Tensor? stats, Tensor? gamma, Tensor? beta, float eps, bool of_batch, str group, bool per_row"
)
NO_NORM = (None, None, None, 0.0, True, "", False)


class Prologue(NamedTuple):
    """A norm in numbers: xhat = (x - mean) * rstd. Gamma and beta go into the weight behind it.

    Of a LayerNorm mean and rstd are None: every row has its own, and gamma and beta go into xhat.
    """

    mean: Any
    rstd: Any
    gamma: Tensor
    beta: Tensor
    of_batch: bool
    eps: float

    @classmethod
    def of(
        cls, x: Tensor, stats: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
        eps: float, of_batch: bool, per_row: bool,
    ) -> "Prologue | None":  # fmt: skip
        if stats is None and not per_row:
            return None
        dtype, mean, rstd = torch.promote_types(x.dtype, torch.float32), None, None
        if stats is not None:
            mean, var = stats.contiguous().to(torch.promote_types(stats.dtype, torch.float32))
            dtype, rstd = mean.dtype, (var + eps).rsqrt()
        shape = x.shape[-1:]
        gamma = x.new_ones(shape, dtype=dtype) if gamma is None else gamma.to(dtype)
        beta = x.new_zeros(shape, dtype=dtype) if beta is None else beta.to(dtype)
        return cls(mean, rstd, gamma, beta, of_batch, eps)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight (N, C) and bias (N,) for xhat: as exact in 16 bits as rounded gamma * xhat + beta
        would be, since xhat is of size 1 whatever the mean of x. A LayerNorm leaves them alone."""
        if self.mean is None:
            return weight, bias
        weight = weight.to(self.gamma.dtype)
        shift = weight @ self.beta
        return weight * self.gamma, shift if bias is None else shift + bias


class Sums(NamedTuple):
    """What the gradient of the product's weight tells of the norm before it."""

    weight: Tensor  # (N, C), the gradient of the weight itself
    gamma: Tensor  # (C,)
    beta: Tensor

    @classmethod
    def of(cls, G: Tensor, db: Tensor, weight: Tensor, norm: Prologue | None) -> "Sums":
        """G (N, C) = dout^T xhat, db (N,) and the product's weight (N, C)."""
        if norm is None:
            return cls(G, G.new_empty(0), G.new_empty(0))
        weight = weight.to(G.dtype)
        dw = G * norm.gamma + db[:, None] * norm.beta
        return cls(dw, (weight * G).sum(0), db @ weight)

    def through(self, norm: Prologue, rows: int, group: str) -> tuple[Tensor, Tensor]:
        """Shift and slope of the step from g, the gradient of xhat, to that of x:

            dx = (g - shift) * rstd + (x - mean) * slope

        with means over the rows of all ranks of `group`.
        """
        if not norm.of_batch:
            return torch.zeros_like(norm.mean), torch.zeros_like(norm.mean)
        gamma, beta = self.gamma / rows, self.beta / rows
        if group:
            total = torch.cat([self.gamma, self.beta, self.gamma.new_full((1,), rows)])
            dist.all_reduce(total, group=_group(group))
            gamma, beta = (total[:-1] / total[-1]).chunk(2)
        return norm.gamma * beta, -norm.rstd.square() * norm.gamma * gamma


def channel_stats(x: Tensor) -> Tensor:
    """x (..., C), not empty -> (2, C), mean and biased variance, in fp32 or, of fp64, in fp64."""
    x = x.detach().reshape(-1, x.shape[-1])
    x = x if x.dtype == torch.float64 else x.float()
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        var, mean = torch.var_mean(x, 0, correction=0)
        return torch.stack([mean, var])
    # 30 times as fast there, but its sums drift with a large mean: hence parts of the rows.
    parts = x.split(4096)
    found = x.new_empty(len(parts), 3, x.shape[1])
    for i, part in enumerate(parts):
        mean, var = torch.ops.aten.batch_norm_update_stats(part, None, None, 0.0)
        found[i, 0] = len(part)
        found[i, 1] = mean
        torch.mul(var, len(part), out=found[i, 2])
    return merge_stats(found.double()).to(x.dtype)


def norm_ref(x: Tensor, norm: Norm) -> Tensor:
    """The norm of x (..., C) in plain PyTorch; a BatchNorm of the batch takes x's own statistics.

    A LayerNorm's result is in fp32 under autocast, as PyTorch has it.
    """
    gamma, beta = (None if t is None else t.to(x.dtype) for t in (norm.weight, norm.bias))
    if norm.stats is None:
        return F.layer_norm(x, x.shape[-1:], gamma, beta, norm.eps)
    rows = x.reshape(-1, x.shape[-1])
    mean, var = (None, None) if norm.of_batch else norm.stats.to(x.dtype)
    return F.batch_norm(rows, mean, var, gamma, beta, norm.of_batch, 0.0, norm.eps).view(x.shape)


def merge_stats(parts: Tensor) -> Tensor:
    """parts (P, 3, C): rows, mean and summed squared deviations of each -> (2, C), as above."""
    rows, mean, squares = parts.unbind(1)
    n = rows.sum(0)
    total = (rows * mean).sum(0) / n
    squares = squares + rows * (mean - total).square()
    return torch.stack([total, squares.sum(0) / n])


def sync_stats(stats: Tensor, rows: int, group: str) -> tuple[Tensor, int]:
    """Statistics and rows of all ranks of `group` together; those of this rank without one."""
    if not group:
        return stats, rows
    mean, var = stats
    part = torch.stack([torch.full_like(mean, rows), mean, var * rows])
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(_group(group)))]
    dist.all_gather(parts, part, group=_group(group))
    merged = torch.stack(parts)
    return merge_stats(merged), int(merged[:, 0, 0].sum().item())


def _group(name: Any) -> dist.ProcessGroup:
    return torch._C._distributed_c10d._resolve_process_group(name)

"""Parameter groups and learning-rate schedule of the official recipes."""

import math

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["cosine_with_warmup", "make_optimizer"]


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> AdamW:
    """AdamW that spares norms and biases from weight decay, as the released weights were trained.

    Args:
        model: its `no_weight_decay()` names parameters to spare as well.
        lr: peak learning rate.
        weight_decay: of everything else, the depthwise kernels of the DPE included.
    """
    spared: set[str] = getattr(model, "no_weight_decay", set)()
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 or name in spared else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8)


def cosine_with_warmup(
    optimizer: Optimizer, steps: int, warmup: int, floor: float = 1e-6
) -> LambdaLR:
    """Rise linearly from `floor` for `warmup` steps, then fall along half a cosine to `floor`.

    Args:
        optimizer: its learning rate is the peak.
        steps: of the whole training.
        warmup: of them, fewer than `steps`.
        floor: learning rate at both ends.
    """
    peak = optimizer.param_groups[0]["lr"]
    low = min(floor / peak, 1.0)

    def factor(step: int) -> float:
        if step < warmup:
            return low + (1 - low) * step / warmup
        done = min((step - warmup) / max(steps - warmup, 1), 1.0)
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)

"""Multiply-adds of a forward pass, counted as the paper counts its "GFLOPs".

A multiply and its add count one (so twice the figure is true floating-point operations), for
convolutions, linear layers and the two products of attention; norms count a few an element, as
fvcore does, whose counts the paper prints. Biases, GELU, softmax and sums count nothing.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch.utils.flop_counter import FlopCounterMode

from uniformer.configs import UniFormerConfig

__all__ = ["StageMacs", "count_flops", "count_macs"]

LAYER_NORM, BATCH_NORM = 5, 2  # multiply-adds an element, by fvcore's convention


@dataclass
class StageMacs:
    """Multiply-adds of one stage, for one view.

    Attributes:
        stage: 1 to 4; 5 is the final norm and the classifier.
        kind: L local, G global, or - after the last stage.
        tokens: (T, H, W) of the feature map.
        embed: strided projection before the blocks; the classifier in stage 5.
        dpe: dynamic position embeddings.
        pointwise: 1x1x1 convolutions and linear layers of the MHRA.
        affinity: depthwise tube convolutions, or the two products of attention.
        ffn: feed-forward networks.
        norm: all norms.
    """

    stage: int
    kind: str
    tokens: tuple[int, int, int]
    embed: int = 0
    dpe: int = 0
    pointwise: int = 0
    affinity: int = 0
    ffn: int = 0
    norm: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self)[3:])


def count_macs(cfg: UniFormerConfig, frames: int, height: int, width: int) -> list[StageMacs]:
    """Count one view, stage by stage.

    Args:
        cfg: the network.
        frames: T of the clip.
        height: H, at least 32.
        width: W, at least 32.

    Returns:
        Stages 1 to 4, then the final norm and classifier; their `total`s add up to the figure of
        the paper's tables for one view.
    """
    return list(_stages(cfg, frames, height, width))


def _stages(cfg: UniFormerConfig, T: int, H: int, W: int) -> Iterator[StageMacs]:
    # (kernel T, H, W), as the strides are: H and W by 4, then by 2; T by 2 in the stem only.
    T, H, W = (T + 2 - 3) // 2 + 1, H // 4, W // 4
    taps, dim_in = 3 * 4 * 4, cfg.in_channels
    for stage, (kind, depth, C) in enumerate(
        zip(cfg.stages, cfg.depths, cfg.dims, strict=True), start=1
    ):
        if stage > 1:
            H, W, taps = H // 2, W // 2, (3 if cfg.std else 1) * 2 * 2
        N = T * H * W
        row = StageMacs(stage, kind, (T, H, W))
        row.embed = N * C * dim_in * taps
        row.dpe = depth * N * C * 27 * cfg.dpe
        row.ffn = depth * 2 * N * C * int(C * cfg.mlp_ratio)
        row.norm = N * C * LAYER_NORM  # of the patch embedding
        if kind == "L":
            row.pointwise = depth * 2 * N * C * C
            row.affinity = depth * N * C * cfg.tube_size**3
            row.norm += depth * 2 * N * C * BATCH_NORM
        else:
            row.pointwise = depth * 4 * N * C * C * (1 + cfg.split)
            pairs = T * N + H * W * N if cfg.split else N * N
            row.affinity = depth * 2 * pairs * C
            row.norm += depth * (2 + cfg.split) * N * C * LAYER_NORM
        yield row
        dim_in = C
    yield StageMacs(
        5, "-", (T, H, W), embed=dim_in * cfg.num_classes, norm=T * H * W * dim_in * BATCH_NORM
    )


# --- Counting what runs ---------------------------------------------------------------


def count_flops(fn: Callable[[], object]) -> int:
    """Operations of whatever `fn` runs, forward and backward, 2 for a multiply-add.

    PyTorch's `FlopCounterMode`, which knows this library's operators by their own formulas, with
    two of PyTorch's mended: it counts the backward pass of a depthwise convolution some twenty
    times over, and attention on a CPU not at all. Only products count.

    Args:
        fn: called once.
    """
    mended = {
        torch.ops.aten.convolution_backward: _convolution_backward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=mended) as counter:
        fn()
    return counter.get_total_flops()


def _convolution_backward(dy, x, weight, *args, out_shape=None, **kwargs) -> int:
    """dx and dweight each cost what the forward did; `args` ends with groups and which are wanted.

    One product for each element of dy and each weight that it meets.
    """
    *_, wanted = args
    return 2 * math.prod(dy) * math.prod(weight[1:]) * (wanted[0] + wanted[1])


def _attention(q, k, v, *args, **kwargs) -> int:
    return 4 * math.prod(q) * k[-2]


def _attention_backward(dy, q, k, v, *args, **kwargs) -> int:
    """Scores again, then dv, dp, dq and dk."""
    return 10 * math.prod(q) * k[-2]

"""UniFormer, the whole network.

Stem -> four stages of blocks -> BatchNorm -> mean over all tokens -> Linear. A block is
DPE -> MHRA -> FFN, each with its residual (eq. 1 to 3): local blocks (BatchNorm, convolutions)
in the shallow stages, global blocks (LayerNorm, attention) in the deep ones.

Inside, activations are channels-last, (B, T, H, W, C); clips come in, and feature maps go out,
as (B, C, T, H, W). Attribute names are those of the official state_dict.

Paper: Li et al. 2022, https://arxiv.org/abs/2201.04676; equation numbers are its own.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from uniformer.configs import InputConfig, UniFormerConfig
from uniformer.global_block import GlobalBlock, SplitBlock
from uniformer.layers import BATCH_NORMS, PatchEmbed, Pixels, of_batch, why_not_around
from uniformer.local_block import LocalBlock

__all__ = ["GlobalBlock", "LocalBlock", "SplitBlock", "UniFormer"]

MIN_SIZE = 32  # the product of the spatial strides


class UniFormer(nn.Module):
    """UniFormer for video classification, or as a backbone.

    Args:
        cfg: the network; `PRESETS` holds the paper's.

    Attributes:
        cfg: the network.
        num_features: channels of the feature map before the classifier.
        input: the clips its weights expect, where that is known.
        classes: names in the order of the logits, where they are known.
    """

    def __init__(self, cfg: UniFormerConfig = UniFormerConfig()) -> None:  # noqa: B008 (frozen)
        super().__init__()
        self.cfg = cfg
        self.input: InputConfig | None = None
        self.classes: list[str] | None = None
        self.num_features = cfg.dims[-1]
        self.grad_checkpointing: tuple[int, ...] = (
            0,
            0,
            0,
            0,
        )  # leading blocks a stage that are recomputed

        between = ((3, 2, 2), (1, 2, 2), (1, 0, 0)) if cfg.std else ((1, 2, 2), (1, 2, 2))
        self.patch_embed1 = PatchEmbed(
            cfg.in_channels, cfg.dims[0], (3, 4, 4), (2, 4, 4), (1, 0, 0)
        )
        self.patch_embed2 = PatchEmbed(cfg.dims[0], cfg.dims[1], *between)
        self.patch_embed3 = PatchEmbed(cfg.dims[1], cfg.dims[2], *between)
        self.patch_embed4 = PatchEmbed(cfg.dims[2], cfg.dims[3], *between)
        self.pos_drop = nn.Dropout(cfg.drop_rate)

        # On the CPU whatever the default device, meta included.
        rates = torch.linspace(0, cfg.drop_path_rate, sum(cfg.depths), device="cpu").tolist()
        global_block = SplitBlock if cfg.split else GlobalBlock
        for stage, (kind, depth, dim) in enumerate(
            zip(cfg.stages, cfg.depths, cfg.dims, strict=True), start=1
        ):
            block = LocalBlock if kind == "L" else global_block
            blocks = [block(cfg, dim, rates.pop(0)) for _ in range(depth)]
            self.add_module(f"blocks{stage}", nn.ModuleList(blocks))

        self.norm = nn.BatchNorm3d(self.num_features)
        self.reset_classifier(cfg.num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the parameters as the official code does; convolutions keep PyTorch's own draw."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, SplitBlock):  # attention over time starts as the identity
                nn.init.zeros_(module.t_attn.qkv.weight)
                nn.init.ones_(module.t_attn.proj.weight)

    # --- Forward ----------------------------------------------------------------------

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature map before pooling.

        Args:
            x: (B, 3, T, H, W), floating point and normalised, or where `input` is known uint8, red,
                green and blue in 0..255; T >= 1, H and W >= 32.

        Returns:
            (B, C, ceil(T/2), H//32, W//32), a channels_last_3d view but for 16 bits on a CPU.

        Raises:
            ValueError: `x` is not as above.
        """
        x = self._trunk(x).permute(0, 4, 1, 2, 3)
        if x.device.type == "cpu" and x.dtype.itemsize == 2:
            x = x.contiguous()  # else PyTorch's gradient of the norm is several times less exact
        return self.norm(x)

    def _trunk(self, x: Tensor) -> Tensor:
        """`forward_features` before the norm, (B, T', H', W', C)."""
        self._check_input(x)
        for stage, count in enumerate(self.grad_checkpointing, start=1):
            x = self._stem(x) if stage == 1 else self.get_submodule(f"patch_embed{stage}")(x)
            for i, block in enumerate(self.get_submodule(f"blocks{stage}").children()):
                recompute = i < count and torch.is_grad_enabled()
                x = _checkpointed(block, x) if recompute else block(x)
        return x

    def _stem(self, x: Tensor) -> Tensor:
        """x (B, 3, T, H, W), normalised or uint8 -> (B, T', H', W', C)."""
        pixels = None
        if x.dtype == torch.uint8 and self.input is not None:
            pixels = Pixels(self.input.mean, self.input.std)
            if self.input.bgr:
                (r, g, b), (sr, sg, sb) = pixels
                x, pixels = x.flip(1), Pixels((b, g, r), (sb, sg, sr))
        return self.pos_drop(self.patch_embed1(x.permute(0, 2, 3, 4, 1), pixels))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """x (B, C, T, H, W), the feature map -> (B, num_classes), or (B, C) with `pre_logits`."""
        x = x.mean((2, 3, 4))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, T, H, W), as for `forward_features` -> raw logits (B, num_classes).

        In eval mode tokens are pooled before the last norm, not after it: to rounding the same, and
        only where nothing hooks the norm or overrides `forward_features` or `forward_head`.
        """
        if not self._pools_first():
            return self.forward_head(self.forward_features(x))
        x, norm = self._trunk(x), self.norm
        pooled = x.mean((1, 2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
        parameters = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        mean, var, gamma, beta = (None if p is None else p.to(pooled.dtype) for p in parameters)
        pooled = F.batch_norm(pooled, mean, var, gamma, beta, eps=norm.eps)
        return self.head(pooled.to(x.dtype))

    def _pools_first(self) -> bool:
        """Whether the norm, in eval mode a factor and a shift, may go behind the pooling, where it
        is of B x C numbers instead of all: nobody wants to see the feature map."""
        own = type(self).forward_features, type(self).forward_head
        if own != (UniFormer.forward_features, UniFormer.forward_head):
            return False
        if "forward_features" in self.__dict__ or "forward_head" in self.__dict__:
            return False
        return why_not_around(self, norm=BATCH_NORMS) is None and not of_batch(self.norm)

    def _check_input(self, x: Tensor) -> None:
        channels = self.cfg.in_channels
        if x.ndim != 5 or x.shape[1] != channels:
            raise ValueError(
                f"the clip must be (B, {channels}, T, H, W), got shape {tuple(x.shape)}"
            )
        known = self.input is not None and channels == 3
        if not x.is_floating_point() and not (x.dtype == torch.uint8 and known):
            raise ValueError(
                f"the clip must be floating point and normalised, got {x.dtype}: for pixels in "
                f"0..255 that is (x / 255 - mean) / std, which is done here for a uint8 clip once "
                f"model.input says which, as in model.input = uniformer.InputConfig()"
            )
        if x.shape[2] < 1 or min(x.shape[3:]) < MIN_SIZE:
            raise ValueError(
                f"the clip needs T >= 1 and H, W >= {MIN_SIZE}, got T, H, W = {tuple(x.shape[2:])}"
            )

    # --- timm's habits ----------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """Logits a clip; 0 where there is no classifier."""
        return self.cfg.num_classes

    def get_classifier(self) -> nn.Module:
        """The classifier: a Linear, or an Identity where there are no classes."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier, freshly drawn, in place of the old one; 0 for none."""
        self.cfg = replace(self.cfg, num_classes=num_classes)
        self.classes = None
        old = next(self.norm.parameters())
        self.head: nn.Module = nn.Identity()
        if num_classes:
            self.head = nn.Linear(
                self.num_features, num_classes, device=old.device, dtype=old.dtype
            )
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def no_weight_decay(self) -> set[str]:
        """Parameters to spare from weight decay beyond those with one dimension: none.

        The official code names `pos_embed` here but matches it against whole parameter names, so
        that the released weights were trained with decay on the DPE.
        """
        return set()

    def set_grad_checkpointing(self, enable: bool | Sequence[int] = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations.

        Args:
            enable: all blocks, none, or how many leading blocks of each of the four stages.

        Raises:
            ValueError: not four counts from 0 to the stage's depth.
        """
        depths = self.cfg.depths
        if isinstance(enable, bool):
            counts: tuple[int, ...] = depths if enable else (0, 0, 0, 0)
        else:
            counts = tuple(enable) if isinstance(enable, Sequence) else ()
        if len(counts) != 4 or any(
            type(n) is not int or not 0 <= n <= d for n, d in zip(counts, depths, strict=True)
        ):
            raise ValueError(
                f"give True, False, or four counts of at most {depths} blocks, got {enable!r}"
            )
        self.grad_checkpointing = counts


@torch.compiler.disable(recursive=False)  # Dynamo cannot trace contexts; it compiles the blocks
def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return contextlib.nullcontext(), _frozen_statistics(block)

    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Leave the running statistics as they are: the first pass has updated them.

    Momentum 0 does so and, unlike passing no statistics, saves the same tensors for backward.
    """
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked

"""Parameters, multiply-adds, and the paper's tables."""

from dataclasses import dataclass, field
from typing import Any

import torch

from uniformer.configs import PRESETS, UniFormerConfig
from uniformer.factory import configure, list_models
from uniformer.flops import StageMacs, count_macs
from uniformer.model import UniFormer
from uniformer.pretrained import ZOO

__all__ = ["InfoConfig", "info", "paper_rounding"]

# Model, frames, crops, clips, and the "GFLOPs" that the paper and its model zoo print.
PAPER = (
    ("uniformer_small", 8, 1, 4, 70),
    ("uniformer_small", 16, 1, 4, 167),
    ("uniformer_small", 16, 3, 1, 125),
    ("uniformer_small", 32, 1, 4, 438),
    ("uniformer_small", 32, 3, 1, 329),
    ("uniformer_base", 8, 1, 4, 161),
    ("uniformer_base", 16, 1, 4, 387),
    ("uniformer_base", 16, 3, 1, 290),
    ("uniformer_base", 32, 1, 4, 1036),
    ("uniformer_base", 32, 3, 1, 777),
    ("uniformer_base", 32, 3, 4, 3108),
)


@dataclass
class InfoConfig:
    """Settings of `uniformer info`.

    Attributes:
        name: preset; none for a list of them.
        frames: T of the clip.
        size: H and W of the clip, in pixels.
        overrides: other fields of `UniFormerConfig`, as in {"stages": "LGGG"}.
        paper: print the paper's table of GFLOPs beside our count.
        zoo: print the released checkpoints.
    """

    name: str | None = None
    frames: int = 16
    size: int = 224
    overrides: dict[str, Any] = field(default_factory=dict)
    paper: bool = False
    zoo: bool = False


def info(cfg: InfoConfig) -> None:
    """Print what is asked for.

    Raises:
        ValueError: no such preset, or a setting out of its range.
    """
    if cfg.paper:
        _print_paper()
    if cfg.zoo:
        _print_zoo()
    if cfg.name is not None:
        if cfg.size < 32 or cfg.frames < 1:
            raise ValueError(
                f"size must be at least 32 and frames at least 1, got {cfg.size} and {cfg.frames}"
            )
        _print_model(cfg.name, configure(cfg.name, cfg.overrides), cfg.frames, cfg.size)
    elif not (cfg.paper or cfg.zoo):
        print("models:", *list_models())
        print("uniformer info MODEL, or --paper, or --zoo")


def paper_rounding(macs: float, views: int) -> int:
    """The paper's figure for a test: three digits for a view, times the views."""
    return round(float(f"{macs / 1e9:.3g}") * views)


def _print_model(name: str, cfg: UniFormerConfig, frames: int, size: int) -> None:
    with torch.device("meta"):
        model = UniFormer(cfg)
    parameters = sum(p.numel() for p in model.parameters())
    stages = count_macs(cfg, frames, size, size)
    total = sum(row.total for row in stages)
    print(f"{name}, {frames} x {size} x {size}")
    print(f"  parameters  {parameters / 1e6:.1f} M")
    print(f"  GMACs       {total / 1e9:.1f}   (the paper's GFLOPs; {2 * total / 1e9:.1f} GFLOP)")
    print()
    columns = ("embed", "dpe", "pointwise", "affinity", "ffn", "norm", "total")
    print(
        f"  {'stage':<7}{'blocks':<8}{'T x H x W':<14}"
        + "".join(f"{c:>11}" for c in columns)
        + "   params"
    )
    for row in stages:
        label = f"{row.stage} {row.kind}" if row.stage <= 4 else "head"
        tokens = " x ".join(map(str, row.tokens)) if row.stage <= 4 else ""
        values = "".join(f"{getattr(row, c) / 1e9:>11.3f}" for c in columns)
        depth = cfg.depths[row.stage - 1] if row.stage <= 4 else ""
        parameters = _stage_parameters(model, row)
        print(f"  {label:<7}{depth:<8}{tokens:<14}{values}{parameters / 1e6:>8.2f}M")


def _stage_parameters(model: UniFormer, row: StageMacs) -> int:
    prefixes = (
        (f"patch_embed{row.stage}.", f"blocks{row.stage}.")
        if row.stage <= 4
        else ("norm.", "head.")
    )
    return sum(p.numel() for n, p in model.named_parameters() if n.startswith(prefixes))


def _print_paper() -> None:
    print(
        "GFLOPs of a test at 224 x 224, counted as the paper counts them: multiply-adds, all views;"
        " true operations are twice as many"
    )
    print(
        f"  {'model':<17}{'frames x crops x clips':<24}{'a view':>9}{'times views':>13}"
        f"{'3 digits a view':>17}{'published':>11}{'true GFLOP':>12}"
    )
    for name, frames, crops, clips, published in PAPER:
        macs = sum(row.total for row in count_macs(PRESETS[name], frames, 224, 224))
        views = crops * clips
        print(
            f"  {name:<17}{f'{frames} x {crops} x {clips}':<24}{macs / 1e9:>9.2f}"
            f"{macs * views / 1e9:>13.1f}{paper_rounding(macs, views):>17}{published:>11}"
            f"{2 * macs * views / 1e9:>12.1f}"
        )


def _print_zoo() -> None:
    print(
        f"  {'name':<36}{'frames':>7}{'stride':>8}{'views':>7}{'top-1':>7}{'GFLOPs':>8}  "
        f"{'order':<7}from"
    )
    for w in ZOO.values():
        source = w.hub or ("Google Drive" if w.drive else "not released")
        source += "" if w.model in PRESETS else ", not built by this version"
        print(
            f"  {w.name:<36}{w.frames:>7}{w.stride or 'even':>8}{f'{w.clips}x{w.crops}':>7}"
            f"{w.top1:>7}{w.gflops:>8}  {'BGR' if w.input.bgr else 'RGB':<7}{source}"
        )

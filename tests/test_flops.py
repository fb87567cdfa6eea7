"""Our count of multiply-adds: the paper's figures, and an independent counter."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from uniformer import UniFormer
from uniformer.configs import PRESETS
from uniformer.flops import count_flops, count_macs
from uniformer.info import PAPER, InfoConfig, info, paper_rounding
from uniformer_kernels import backend


def total(cfg, frames, size=224):
    return sum(row.total for row in count_macs(cfg, frames, size, size))


@pytest.mark.parametrize(("name", "frames", "crops", "clips", "published"), PAPER)
def test_the_papers_table(name, frames, crops, clips, published):
    views = crops * clips
    macs = total(PRESETS[name], frames)
    assert abs(macs * views / 1e9 / published - 1) < 0.007  # 70 is printed for 70.45


@pytest.mark.parametrize(("name", "frames", "crops", "clips", "published"), [
    ("uniformer_small", 16, 1, 4, 167),
    ("uniformer_small", 16, 3, 1, 125),
    ("uniformer_base", 16, 3, 1, 290),
    ("uniformer_base", 32, 3, 1, 777),
    ("uniformer_base", 32, 3, 4, 3108),
])  # fmt: skip
def test_the_papers_own_rounding(name, frames, crops, clips, published):
    assert paper_rounding(total(PRESETS[name], frames), crops * clips) == published


@pytest.mark.parametrize("changes", [
    {}, {"split": True}, {"std": True}, {"stages": "LGLG"}, {"tube_size": 7}, {"dpe": False},
], ids=str)  # fmt: skip
def test_an_independent_counter_agrees(changes):
    """PyTorch counts products alone, and twice; on the reference path it sees all of them."""
    cfg = replace(PRESETS["uniformer_nano"], **changes)
    model = UniFormer(cfg).eval()
    with torch.no_grad(), backend("reference"), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 5, 64, 96))
    rows = count_macs(cfg, 5, 64, 96)
    assert counter.get_total_flops() == 2 * sum(row.total - row.norm for row in rows)


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_a_training_step_is_counted(name):
    """Backward costs twice as much, but for the clip, which needs no gradient, and for the scores
    that fused attention computes again."""
    cfg = PRESETS["uniformer_nano"]
    model, clip = UniFormer(cfg), torch.zeros(1, 3, 4, 64, 64)
    with backend(name):
        counted = count_flops(lambda: model(clip).sum().backward())
    rows = count_macs(cfg, 4, 64, 64)
    products = sum(row.total - row.norm for row in rows)
    again = sum(row.affinity for row in rows[2:4]) / 2 if name == "auto" else 0
    assert counted == 2 * (3 * products - rows[0].embed + again)


def test_info_prints_the_papers_figures(capsys):
    info(InfoConfig("uniformer_small", frames=16))
    printed = capsys.readouterr().out
    assert "GMACs       41.8" in printed
    assert "parameters  21.4 M" in printed
    info(InfoConfig(paper=True, zoo=True))
    printed = capsys.readouterr().out
    assert "3108" in printed
    assert "uniformer_small.k400_16x4" in printed


def test_info_refuses_unknown_models():
    with pytest.raises(ValueError, match="no model is named 'resnet'"):
        info(InfoConfig("resnet"))
    with pytest.raises(ValueError, match="size must be at least 32"):
        info(InfoConfig("uniformer_small", size=16))

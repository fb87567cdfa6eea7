"""Settings out of their range are refused with a sentence that names them."""

import math

import pytest

from uniformer import InputConfig, UniFormerConfig
from uniformer.recipe import TrainConfig


@pytest.mark.parametrize(("name", "bad"), [
    ("depths", 5), ("depths", (3, 4, 8)), ("depths", (3, 4, 8, 0)), ("depths", ("3", 4, 8, 3)),
    ("dims", None), ("dims", "1234"),
    ("head_dim", 0), ("head_dim", -8), ("head_dim", 8.0), ("head_dim", "8"), ("head_dim", 63),
    ("in_channels", -3), ("num_classes", 2.5), ("num_classes", "4"), ("num_classes", True),
    ("mlp_ratio", -1), ("mlp_ratio", "4"), ("mlp_ratio", math.nan), ("qk_scale", "x"),
    ("qk_scale", math.nan), ("stages", None), ("stages", "LLG"), ("stages", "LLGX"),
    ("tube_size", 5.0), ("tube_size", 4), ("dpe", "false"), ("split", "no"), ("std", 1),
    ("qkv_bias", None), ("drop_rate", "x"), ("drop_rate", -0.1), ("drop_path_rate", 1.0),
], ids=str)  # fmt: skip
def test_networks_out_of_range(name, bad):
    with pytest.raises(ValueError, match=name):
        UniFormerConfig(**{name: bad})


@pytest.mark.parametrize(("name", "bad"), [
    ("frames", 0), ("frames", "4"), ("frames", 2.5), ("stride", 0), ("size", None), ("size", 32.5),
    ("size", 31), ("mean", 1), ("mean", (1, 2)), ("std", (math.nan,) * 3), ("std", (0, 1, 1)),
    ("std", ("a", "b", "c")), ("sampling", "random"), ("bgr", "x"),
], ids=str)  # fmt: skip
def test_clips_out_of_range(name, bad):
    with pytest.raises(ValueError, match=name):
        InputConfig(**{name: bad})


def test_what_the_videos_decide_is_no_override():
    with pytest.raises(ValueError, match="num_classes"):
        TrainConfig(data="x", overrides={"num_classes": 9})

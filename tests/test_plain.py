"""The plain network of the benchmarks computes what ours does, in the caller's memory format."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.plain import DropPath, PlainGlobalBlock, PlainLocalBlock, PlainUniFormer
from tests.reference_values import clip, fill
from uniformer import UniFormer
from uniformer.configs import PRESETS
from uniformer.model import GlobalBlock, LocalBlock

NANO = replace(PRESETS["uniformer_nano"], num_classes=7, drop_path_rate=0.0)
FORMATS = {"NCTHW": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}
SHAPES = [(2, 3, 4, 32, 32), (2, 3, 8, 64, 64)]  # one token a frame in the last stage, and four

formats = pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
both = pytest.mark.parametrize("sdpa", [False, True], ids=["naive", "sdpa"])


def pair(cfg, sdpa: bool, memory_format=torch.contiguous_format) -> tuple[nn.Module, nn.Module]:
    """Our network and the plain one with the same weights, in float64."""
    ours, plain = fill(UniFormer(cfg)), PlainUniFormer(cfg, sdpa)
    plain.load_state_dict(ours.state_dict())
    return ours.double(), plain.double().to(memory_format=memory_format)


def assert_same(got: Tensor, want: Tensor, name: str, rtol: float = 1e-9) -> None:
    """All values within `rtol` of the largest wanted one.

    One below 0.01 counts as 0.01: gradients of biases before a norm are zero but for rounding.
    """
    assert got.shape == want.shape, name
    error, scale = (got - want).abs().max().item(), want.abs().max().item()
    assert error <= rtol * max(scale, 0.01), f"{name}: error {error:.1e} at scale {scale:.1e}"


def assert_training_alike(got: nn.Module, want: nn.Module, rtol: float = 1e-9) -> None:
    """Every parameter's gradient, and every buffer."""
    gradients = {name: p.grad for name, p in want.named_parameters()}
    buffers = dict(want.named_buffers())
    assert gradients.keys() == {name for name, _ in got.named_parameters()}
    assert buffers.keys() == {name for name, _ in got.named_buffers()}
    for name, p in got.named_parameters():
        assert_same(p.grad, gradients[name], f"gradient of {name}", rtol)
    for name, buffer in got.named_buffers():
        assert_same(buffer, buffers[name], name, rtol)


# --- The network ----------------------------------------------------------------------


@both
@formats
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eval_equals_ours(shape, memory_format, sdpa):
    ours, plain = pair(NANO, sdpa, memory_format)
    x = clip(shape)
    with torch.no_grad():
        got = plain.eval()(x.contiguous(memory_format=memory_format))
        assert_same(got, ours.eval()(x), "logits")


@both
@formats
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_equals_ours(shape, memory_format, sdpa):
    ours, plain = pair(NANO, sdpa, memory_format)
    x = clip(shape).requires_grad_()
    z = clip(shape).contiguous(memory_format=memory_format).requires_grad_()
    want, got = ours.train()(x), plain.train()(z)
    dy = torch.randn_like(want)
    want.backward(dy)
    got.backward(dy)
    assert_same(got, want, "logits")
    assert_same(z.grad, x.grad, "gradient of the clip")
    assert_training_alike(plain, ours)


# In float64 PyTorch has no channels_last_3d convolutions on the CPU. With one clip, statistics are
# frozen: the last BatchNorm, whose output is averaged, would make all logits its biases.
@both
@formats
@pytest.mark.parametrize(("clips", "training"), [(2, True), (1, False)], ids=["train", "one clip"])
def test_float32_stays_near_ours_in_float64(clips, training, memory_format, sdpa):
    ours, plain = pair(NANO, sdpa, memory_format)
    ours, plain = ours.train(training), plain.float().train(training)
    x = clip((clips, 3, 8, 64, 64)).requires_grad_()
    z = x.detach().float().contiguous(memory_format=memory_format).requires_grad_()
    want, got = ours(x), plain(z)
    dy = torch.randn_like(want)
    want.backward(dy)
    got.backward(dy.float())
    assert_same(got, want, "logits", 1e-4)
    assert_same(z.grad, x.grad, "gradient of the clip", 1e-4)
    assert_training_alike(plain, ours, 1e-4)


@both
@pytest.mark.parametrize("change", [
    {"stages": "GLGL"}, {"stages": "LLLL"}, {"stages": "GGGG"}, {"tube_size": 3}, {"tube_size": 7},
    {"dpe": False}, {"qkv_bias": False}, {"qk_scale": 0.3}, {"mlp_ratio": 2.5}, {"num_classes": 0},
], ids=str)  # fmt: skip
def test_every_switch_equals_ours(change, sdpa):
    ours, plain = pair(replace(NANO, **change), sdpa)
    x = clip(SHAPES[0])
    with torch.no_grad():
        assert_same(plain.eval()(x), ours.eval()(x), "logits")
    want, got = ours.train()(x), plain.train()(x)
    want.square().sum().backward()
    got.square().sum().backward()
    assert_training_alike(plain, ours)


@pytest.mark.parametrize("change", [{"split": True}, {"std": True}], ids=str)
def test_what_it_lacks_is_refused(change):
    with pytest.raises(ValueError, match="split=False and std=False"):
        PlainUniFormer(replace(NANO, **change))


# --- Blocks alone ---------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", ["local", "naive", "sdpa"])
def test_a_block_alone_equals_ours(kind, training):
    if kind == "local":
        want_block, got_block = LocalBlock(NANO, 64, 0.0), PlainLocalBlock(NANO, 64, 0.0)
    else:
        want_block = GlobalBlock(NANO, 64, 0.0)
        got_block = PlainGlobalBlock(NANO, 64, 0.0, sdpa=kind == "sdpa")
    got_block.load_state_dict(fill(want_block).state_dict())
    want_block.double().train(training)
    got_block.double().train(training)

    x = torch.randn(2, 64, 3, 5, 4, dtype=torch.float64)
    leaf = x.permute(0, 2, 3, 4, 1).contiguous().requires_grad_()
    plain_leaf = x.clone().requires_grad_()
    want, got = want_block(leaf).permute(0, 4, 1, 2, 3), got_block(plain_leaf)
    dy = torch.randn_like(x)
    want.backward(dy)
    got.backward(dy)
    assert_same(got, want, "y")
    assert_same(plain_leaf.grad, leaf.grad.permute(0, 4, 1, 2, 3), "gradient of x")
    assert_training_alike(got_block, want_block)


def test_stochastic_depth_drops_whole_samples_at_our_rates():
    x = torch.rand(400, 3, 2, 1, 1) + 0.5
    y = DropPath(0.25).train()(x)
    dropped = (y == 0).flatten(1).all(1)
    assert 0.15 < dropped.float().mean() < 0.35
    torch.testing.assert_close(y[~dropped], x[~dropped] / 0.75)
    assert torch.equal(DropPath(0.25).eval()(x), x)

    cfg = replace(NANO, drop_path_rate=0.3)
    rates = [
        [m.drop_path.rate for m in model.modules() if hasattr(m, "drop_path")]
        for model in (UniFormer(cfg), PlainUniFormer(cfg))
    ]
    assert rates[0] == rates[1]
    assert rates[1][0] == 0
    assert rates[1][-1] == pytest.approx(0.3)


# --- Memory format --------------------------------------------------------------------


@formats
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_callers_memory_format_is_kept(memory_format, training, device):
    """In float32, 16 clips: PyTorch's CPU answers in NCTHW in float64, and for few small clips."""
    model = PlainUniFormer(NANO).to(device, memory_format=memory_format).train(training)
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, y, name=name: seen.update({name: y}))
    x = torch.randn(16, 3, 4, 32, 32, device=device).contiguous(memory_format=memory_format)
    with torch.no_grad():
        model(x)
    maps = {name: y for name, y in seen.items() if y.ndim == 5}
    assert {"patch_embed1", "blocks1.0.attn", "blocks2.1.mlp.fc1", "blocks4", "norm"} <= maps.keys()
    other = next(f for f in FORMATS.values() if f != memory_format)
    for name, y in maps.items():
        assert y.is_contiguous(memory_format=memory_format), name
        assert not y.is_contiguous(memory_format=other), name

"""Blocks made of official ones compute what those did; the truth of each is the one it was."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.official import CBlock, DropPath, Recognizer, SABlock, SplitSABlock, Uniformer
from uniformer import kernelize
from uniformer.official_blocks import GlobalBlockNCTHW, LocalBlockNCTHW, SplitBlockNCTHW

# --- Whole networks -------------------------------------------------------------------

NETWORKS = {
    "official": Uniformer,
    "split": lambda: Uniformer(split=True),
    "mmaction2": Recognizer,
}
CLIP = (2, 3, 3, 64, 96)  # grids of 2 frames, from 16 x 24 tokens down to 2 x 3
SMALL_CLIP = (2, 3, 1, 72, 104)  # one frame; 18 x 26, 9 x 13, 4 x 6, 2 x 3

networks = pytest.mark.parametrize("made", NETWORKS.values(), ids=NETWORKS)
modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def drawn(model: nn.Module) -> nn.Module:
    """With statistics and norms that are not ones and zeros."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
        if isinstance(module, nn.BatchNorm3d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(kernelized in place, as it was)."""
    before = copy.deepcopy(drawn(model))
    report = kernelize(model)
    assert not report.left, report
    assert report.blocks
    return model, before


def outcome(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, every gradient and every buffer of one pass."""
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    torch.manual_seed(3)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(y.dtype))
    found = {"y": y.detach(), "gradient of x": leaf.grad}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return found | dict(model.named_buffers())


def assert_alike(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float) -> None:
    """All values within `rtol` of the largest wanted one; below 0.01 it counts as 0.01.

    Gradients of biases before a norm are zero but for rounding.
    """
    assert list(got) == list(want)
    for name in want:
        error = (got[name].double() - want[name].double()).abs().max().item()
        scale = max(want[name].abs().max().item(), 0.01)
        assert error <= rtol * scale, f"{name}: error {error:.1e} at scale {scale:.1e}"


@networks
@modes
@pytest.mark.parametrize("shape", [CLIP, SMALL_CLIP], ids=str)
def test_a_network_computes_what_it_did(made, training, shape):
    ours, theirs = pair(made().double())
    x = torch.randn(shape, dtype=torch.float64)
    want = outcome(theirs.train(training), x)
    assert_alike(outcome(ours.train(training), x), want, 1e-9)


@networks
@modes
def test_and_in_fp32(made, training):
    """As near to the truth as it was, times four: sums are taken in other orders."""
    ours, theirs = pair(made())
    x = torch.randn(CLIP)
    true = outcome(copy.deepcopy(theirs).double().train(training), x.double())
    assert_alike(outcome(ours.train(training), x), true, 1e-4)


def test_clips_may_come_in_a_list():
    ours, theirs = pair(Uniformer().eval())
    x = torch.randn(CLIP)
    torch.testing.assert_close(ours([x]), theirs([x]), rtol=1e-4, atol=1e-5)


# --- Blocks alone ---------------------------------------------------------------------

C = 16
KINDS = {
    "local": (lambda *args: CBlock(C, *args), LocalBlockNCTHW),
    "global": (lambda *args: SABlock(C, 2, *args), GlobalBlockNCTHW),
    "split": (lambda *args: SplitSABlock(C, 2, *args), SplitBlockNCTHW),
}
kinds = pytest.mark.parametrize(("made", "kind"), KINDS.values(), ids=KINDS)


@kinds
@modes
@pytest.mark.parametrize("shape", [(2, C, 3, 5, 7), (1, C, 1, 3, 1), (3, C, 2, 1, 1)], ids=str)
def test_a_block_computes_what_it_did(made, kind, training, shape):
    ours, theirs = pair(made().double())
    assert type(ours) is kind
    x = torch.randn(shape, dtype=torch.float64)
    want = outcome(theirs.train(training), x)
    assert_alike(outcome(ours.train(training), x), want, 1e-9)


def test_norms_that_are_frozen_or_average_stay_so():
    block = CBlock(C).double()
    block.norm2.momentum = None
    ours, theirs = pair(block)
    for model in (ours, theirs):
        model.train().norm1.eval()
    x = torch.randn(2, C, 2, 3, 4, dtype=torch.float64)
    for _ in range(2):
        assert_alike(outcome(ours, x), outcome(theirs, x), 1e-9)


@torch.no_grad()
@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits(made, kind, dtype):
    """No worse, times four, than the block was: what is rounded on the way is not the same."""
    ours, theirs = pair(made().eval())
    x = torch.randn(2, C, 2, 3, 4).to(dtype)
    for model in (ours, theirs):
        model.to(dtype)
    got, near = ours(x), theirs(x)
    want = theirs.double()(x.double())
    assert got.dtype == dtype
    bound = 4 * (near - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
    assert (got - want).abs().max() <= bound


@kinds
def test_between_blocks_nothing_is_copied(made, kind):
    """Memory stays channels_last_3d, whatever it was before the first block."""
    blocks = nn.Sequential(made(), made())
    assert len(kernelize(blocks).blocks) == 2
    seen = []
    for block in blocks:
        block.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    blocks(torch.randn(2, C, 3, 5, 7))
    (_, first), (second_in, second) = seen
    assert first.data_ptr() == second_in.data_ptr()
    for y in (first, second):
        assert y.permute(0, 2, 3, 4, 1).is_contiguous()
        assert y.is_contiguous(memory_format=torch.channels_last_3d)


@kinds
def test_weights_may_be_channels_last(made, kind):
    ours, theirs = pair(made().to(memory_format=torch.channels_last_3d))
    x = torch.randn(2, C, 3, 5, 7).contiguous(memory_format=torch.channels_last_3d)
    true = outcome(copy.deepcopy(theirs).double(), x.double())
    assert_alike(outcome(ours, x), true, 1e-4)


def test_they_compile_whole():
    ours, theirs = pair(CBlock(C).eval())
    x = torch.randn(2, C, 2, 3, 4)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_a_wrong_rank_is_refused():
    block = CBlock(C)
    kernelize(block)
    with pytest.raises(ValueError, match=r"x must be \(B, C, T, H, W\), got shape \(16, 2, 3, 4\)"):
        block(torch.randn(C, 2, 3, 4))


# --- Stochastic depth and dropout -----------------------------------------------------


@torch.no_grad()
@kinds
@pytest.mark.parametrize("branch", ["aggregation", "mlp"])
def test_stochastic_depth_drops_what_it_did(made, kind, branch):
    """Clips, but whole frames of the aggregation in divided attention; scaled up in the others."""
    ours, theirs = pair(made(0.25).double())
    theirs.drop_path = nn.Identity()
    for block in (ours, theirs):
        block.train()
        silenced = [block.mlp.fc2]
        if branch == "mlp":
            silenced = [block.conv2 if kind is LocalBlockNCTHW else block.attn.proj]
        if kind is SplitBlockNCTHW:
            silenced.append(block.t_attn.proj)
        for layer in silenced:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    x = torch.randn(200, C, 2, 2, 3, dtype=torch.float64)
    trunk = x + theirs.pos_embed(x)
    want, got = theirs(x) - trunk, ours(x) - trunk
    frames = (got.abs() > 1e-12).transpose(1, 2).flatten(2)  # (B, T, C*H*W)
    kept = frames.all(2)
    assert torch.equal(kept, frames.any(2))
    torch.testing.assert_close(got, want * kept[:, None, :, None, None] / 0.75)
    assert 0.65 < kept.double().mean() < 0.85
    of_frames = kind is SplitBlockNCTHW and branch == "aggregation"
    assert torch.equal(kept[:, 0], kept[:, 1]) is not of_frames


def test_its_rate_is_kept():
    model = Uniformer(drop_path=0.7)
    kernelize(model)
    rates = [m.drop_path.rate for m in model.modules() if hasattr(m, "drop_path")]
    assert rates == pytest.approx([i / 10 for i in range(8)])
    assert not any(isinstance(m, DropPath) for m in model.modules())


@torch.no_grad()
@kinds
def test_dropout_is_kept(made, kind):
    ours, theirs = pair(made(0.0, 0.3))
    x = torch.randn(2, C, 2, 3, 4)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)
    ours.train()
    assert not torch.equal(ours(x), ours(x))
    assert ours.mlp.drop.p == 0.3
    if kind is not LocalBlockNCTHW:
        assert (ours.attn.attn_drop, ours.attn.proj_drop.p) == (0.3, 0.3)

"""The fused global block against its parts: numbers, memory, layout, and when it steps back."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import uniformer.global_block
from benchmarks.plain import PlainGlobalBlock
from tests.test_local_block import assert_same, both, kept_for_backward
from uniformer import create_model
from uniformer.configs import UniFormerConfig
from uniformer.global_block import GlobalBlock, SplitBlock
from uniformer_kernels import backend

C = 32


def block(drop_path=0.0, **cfg):
    made = GlobalBlock(UniFormerConfig(head_dim=16, drop_path_rate=0.0, **cfg), C, drop_path)
    for p in made.parameters():  # anything but ones and zeros
        nn.init.normal_(p, std=0.3)
    return made


def split(drop_path=0.0, **cfg):
    made = SplitBlock(UniFormerConfig(head_dim=16, drop_path_rate=0.0, **cfg), C, drop_path)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return made


def clip(*shape, dtype=torch.float32):
    return torch.randn(*(shape or (3, 2, 5, 7)), C, dtype=dtype)


# --- Numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "cfg", [{}, {"dpe": False}, {"qkv_bias": False}, {"qk_scale": 0.7}, {"mlp_ratio": 3.0}], ids=str
)
def test_fused_equals_its_parts(cfg, mode):
    made = getattr(block(**cfg).double(), mode)()
    assert_same(made, clip(dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(2, 1, 3, 7), (1, 1, 1, 1)], ids=["one kernel", "two"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_dpe_makes_the_first_norm_in_triton(shape, autocast, monkeypatch):
    made, x = block().train(), clip(*shape)
    seen = []
    counted = uniformer.global_block.dwconv3d_norm
    monkeypatch.setattr(
        uniformer.global_block, "dwconv3d_norm", lambda *a, **k: seen.append(a) or counted(*a, **k)
    )
    with backend("triton"), torch.autocast("cpu", torch.float16, enabled=autocast):
        assert_same(made, x, rtol=1e-2 if autocast else 1e-3, atol=2e-2 if autocast else 1e-4)
    assert seen
    made.pos_embed.register_forward_hook(lambda *_: seen.clear())  # and is called where it matters
    with backend("triton"), torch.no_grad():
        made(x)
    assert not seen


def test_drop_path_and_dropped_affinities_draw_the_same():
    made = block(drop_path=0.5, attn_drop_rate=0.3).double().train()
    x = clip(6, 2, 3, 3, dtype=torch.float64)
    assert_same(made, x, rtol=1e-9, atol=1e-9)
    (y, *_), (want, *_) = both(made.eval(), x)
    torch.testing.assert_close(y, want)
    assert not torch.allclose(made.train()(x), y)


def test_the_norms_eps_counts():
    """mmaction2's is not the official code's."""
    made, x = block().double().eval(), 1e-3 * clip(dtype=torch.float64)
    before = made(x)
    made.norm1.eps = made.norm2.eps = 1e-5
    assert not torch.allclose(before, made(x))
    assert_same(made, x, rtol=1e-9, atol=1e-9)


def test_norms_without_weight_or_bias():
    made = block().double()
    made.norm1 = nn.LayerNorm(C, elementwise_affine=False, eps=1e-6)
    made.norm2 = nn.LayerNorm(C, bias=False, eps=1e-6).double()
    assert_same(made, clip(dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("under", ["autocast", "cast"])
def test_sixteen_bits_err_no_more_than_the_plain_block(dtype, under):
    cfg = UniFormerConfig(head_dim=16, drop_path_rate=0.0)
    made, plain = block(), PlainGlobalBlock(cfg, C, 0.0, sdpa=False)
    plain.load_state_dict(made.state_dict())
    x, dy = clip(), clip()
    truth = copy.deepcopy(made).double()
    want = truth.part_by_part(x.double())
    want.backward(dy.double())
    if under == "cast":
        made, plain, x, dy = made.to(dtype), plain.to(dtype), x.to(dtype), dy.to(dtype)
    with torch.autocast("cpu", dtype, enabled=under == "autocast"):
        y = made(x)
        near = plain(x.permute(0, 4, 1, 2, 3).contiguous()).permute(0, 2, 3, 4, 1)
    assert y.dtype == x.dtype  # under autocast the residual stream stays in fp32
    y.backward(dy)
    near.backward(dy)
    grads = [made.named_parameters(), plain.parameters(), truth.parameters()]
    rows = [("y", y, near, want)]
    rows += [(n, p.grad, q.grad, t.grad) for (n, p), q, t in zip(*grads, strict=True)]
    for name, got, near, want in rows:
        eps = torch.finfo(dtype).eps * want.abs().max().clamp_min(1e-3)
        error = (near - want).abs().max()
        if error.isnan():  # once, in PyTorch's own gradient of the DPE in bf16
            error = 4 * eps
        assert (got - want).abs().max() <= 2 * error + eps, name


# --- Divided attention ----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("cfg", [{}, {"dpe": False}, {"qkv_bias": False}], ids=str)
def test_the_split_block_equals_its_parts(cfg, mode):
    made = getattr(split(**cfg).double(), mode)()
    assert_same(made, clip(dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert_same(made.float(), clip(), rtol=1e-3, atol=1e-3)


def test_the_split_block_drops_the_same():
    made = split(drop_path=0.5, attn_drop_rate=0.3).double().train()
    assert_same(made, clip(6, 2, 3, 3, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_the_split_block_steps_back_for_what_is_its_own(caplog, monkeypatch):
    monkeypatch.setattr("uniformer_kernels._runtime._announced", set())
    for change in (
        lambda made: made.t_attn.qkv.register_forward_hook(lambda *_: None),
        lambda made: made.t_norm.register_forward_hook(lambda *_: None),
        lambda made: setattr(made.t_attn.proj_drop, "p", 0.5),
    ):
        made = split().train()
        assert made.why_not_fused() is None
        change(made)
        assert made.why_not_fused()
    x = clip()
    torch.manual_seed(0)
    y = made(x)
    torch.manual_seed(0)
    assert torch.equal(y, made.part_by_part(x))
    assert caplog.text.count("a SplitBlock runs part by part") == 1


def test_the_split_block_takes_an_empty_batch():
    assert split()(clip(0, 2, 3, 3)).shape == (0, 2, 3, 3, C)


# --- Memory and layout ----------------------------------------------------------------


def test_seven_activations_are_kept_for_backward():
    """Input, DPE's sum, q, k, v, what is aggregated, MHRA's sum, and a number a head and token."""
    made, x = block().train(), clip(2, 4, 8, 8).requires_grad_()
    assert kept_for_backward(made, x) < 7.1
    cfg, channels_first = UniFormerConfig(head_dim=16), x.detach().permute(0, 4, 1, 2, 3)
    for sdpa, activations in ((True, 17), (False, 33)):
        plain = PlainGlobalBlock(cfg, C, 0.0, sdpa=sdpa).train()
        leaf = channels_first.contiguous().requires_grad_()
        assert kept_for_backward(plain, leaf) > activations


class Large(TorchDispatchMode):
    """Operations that make or copy more than `limit` elements."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.copies, self.largest = limit, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for t in found if isinstance(found, tuple | list) else [found]:
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.itemsize)
                name = func.overloadpacket.__name__
                if (
                    name in ("clone", "copy_", "_to_copy", "cat", "stack")
                    and t.numel() > self.limit
                ):
                    self.copies.append((name, tuple(t.shape)))
        return found


@pytest.mark.parametrize("path", ["auto", "triton"])
def test_no_layout_is_copied_and_no_affinity_stored(path):
    """Of 768 tokens; the affinity of all would be 8 times as large as q, k and v."""
    made, x = block().eval(), clip(1, 2, 16, 24)
    tokens = x.numel() // C
    with torch.no_grad(), backend(path), Large(x.numel() // 2) as seen:
        made(x)
    assert not seen.copies
    assert seen.largest < tokens**2
    with torch.no_grad(), backend("reference"), Large(x.numel() // 2) as seen:
        made(x)
    assert seen.copies
    assert seen.largest >= tokens**2


# --- When it steps back ---------------------------------------------------------------


def hooked(made):
    made.attn.qkv.register_forward_hook(lambda *_: None)


def replaced(made):
    made.mlp.fc1 = nn.Sequential(made.mlp.fc1)


def dropout(made):
    made.attn.proj_drop.p = 0.5


@pytest.mark.parametrize("change", [hooked, replaced, dropout])
def test_what_it_does_not_know_runs_part_by_part_and_is_announced(change, caplog, monkeypatch):
    monkeypatch.setattr("uniformer_kernels._runtime._announced", set())
    made, x = block().train(), clip()
    change(made)
    with caplog.at_level(logging.WARNING):
        torch.manual_seed(0)
        y = made(x)
        torch.manual_seed(0)
        assert torch.equal(y, made.part_by_part(x))
    assert caplog.text.count("a GlobalBlock runs part by part") == 1


@pytest.mark.parametrize("name", ["attn.proj_drop", "mlp.drop"])
def test_dropout_follows_its_own_mode(name):
    """As for Monte Carlo dropout: a network in eval mode, but for its dropout."""
    made, x = block(drop_rate=0.5).eval(), clip()
    assert torch.equal(made(x), made(x))
    made.get_submodule(name).train()
    assert not torch.equal(made(x), made(x))


def test_the_reference_backend_runs_part_by_part(monkeypatch):
    made, x = block(), clip()
    monkeypatch.setattr(made, "fused", None)
    with backend("reference"):
        assert made(x).shape == x.shape


def test_compiles_without_graph_breaks():
    made, x = block().train(), clip(1, 2, 3, 3).requires_grad_()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), made(x))
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(made(x).square().sum(), x)[0])


def test_the_whole_network_copies_no_layout_and_stores_no_affinity():
    """The second stage is global here, and has 1,024 tokens. A clip in NCTHW is copied once."""
    model = create_model("uniformer_nano", num_classes=3, stages="LGGG").eval()
    clip = torch.randn(1, 3, 32, 64, 64)
    tokens = 16 * 8 * 8
    with torch.no_grad(), Large(tokens * 16) as seen:
        model(clip)
    assert seen.copies == [("clone", (1, 32, 64, 64, 3))]
    turned = clip.contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad(), Large(tokens * 16) as seen:
        model(turned)
    assert seen.copies == []
    assert seen.largest < tokens**2
    with torch.no_grad(), backend("reference"), Large(tokens * 16) as seen:
        model(clip)
    assert seen.copies
    assert seen.largest >= tokens**2

"""The network: the official numbers, the paper's switches, and timm's habits."""

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

from tests.reference_values import (
    assert_close,
    assert_fingerprint,
    clip,
    fill,
    generator,
    golden,
)
from uniformer import UniFormer, UniFormerConfig, create_model
from uniformer.configs import PRESETS
from uniformer.model import SplitBlock
from uniformer_kernels import backend

SMALL, BASE = PRESETS["uniformer_small"], PRESETS["uniformer_base"]
OFFICIAL = {
    "video_small": SMALL,
    "video_base": BASE,
    "video_small_split": replace(SMALL, split=True),
    "video_small_std": replace(SMALL, std=True),
}
TINY = UniFormerConfig((1, 2, 2, 1), (8, 16, 16, 24), head_dim=8, num_classes=5)


def tiny(**changes) -> UniFormer:
    return UniFormer(replace(TINY, drop_path_rate=0.0, **changes))


# --- The official numbers -------------------------------------------------------------


@pytest.mark.parametrize("name", OFFICIAL)
def test_state_dict_is_the_official_one(name):
    with torch.device("meta"):
        state = UniFormer(OFFICIAL[name]).state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == golden("video_keys")[name]


@pytest.mark.parametrize("path", ["auto", "reference"])
@pytest.mark.parametrize("name", OFFICIAL)
def test_eval_equals_the_official_code(name, path):
    model = fill(UniFormer(OFFICIAL[name])).double().eval()
    stages = {}
    for stage in (1, 2, 3, 4):
        last = model.get_submodule(f"blocks{stage}")[-1]
        last.register_forward_hook(lambda _, __, y, stage=stage: stages.update({stage: y}))
    for case in golden(f"{name}_eval"):
        with torch.no_grad(), backend(path):
            logits = model(clip(case["input"]))
        assert list(logits.shape) == case["logits_shape"]
        assert_close(logits, case["logits"], 1e-9, "logits")
        for stage, features in stages.items():
            want = case["stages"][f"stage{stage}"]
            assert_fingerprint(features.permute(0, 4, 1, 2, 3), want, 1e-9, f"stage {stage}")


def test_float32_stays_near_the_official_code():
    model = fill(UniFormer(SMALL)).eval()
    case = golden("video_small_eval")[0]
    with torch.no_grad():
        assert_close(model(clip(case["input"]).float()), case["logits"], 1e-4)


@pytest.mark.parametrize(("dtype", "tolerance", "checkpointing"), [
    (torch.float64, 1e-9, False),
    (torch.float64, 1e-9, True),
    (torch.float32, 1e-3, False),
], ids=str)  # fmt: skip
def test_training_equals_the_official_code(dtype, tolerance, checkpointing):
    want = golden("video_small_train")
    cfg = replace(SMALL, num_classes=7, drop_path_rate=0.0)
    model = fill(UniFormer(cfg)).to(dtype).train()
    model.set_grad_checkpointing(checkpointing)
    x = clip(want["input"]).to(dtype).requires_grad_()
    logits = model(x)
    (
        logits * torch.from_numpy(generator("cotangent").standard_normal(logits.shape))
    ).sum().backward()

    assert_close(logits, want["logits"], tolerance, "logits")
    assert_fingerprint(x.grad, want["input_grad"], tolerance, "input gradient")
    gradients = {k: p.grad for k, p in model.named_parameters()}
    assert gradients.keys() == want["grads"].keys()
    for key, gradient in gradients.items():
        if want["grads"][key]["rms"] > 1e-9:
            assert_fingerprint(gradient, want["grads"][key], tolerance, key)
        else:  # exactly zero but for rounding: biases before a norm
            assert gradient.abs().max() < tolerance, key
    buffers = {k: b for k, b in model.named_buffers() if "num_batches" not in k}
    assert buffers.keys() == want["buffers_after"].keys()
    for key, buffer in buffers.items():
        assert_fingerprint(buffer, want["buffers_after"][key], tolerance, key)


# --- The paper's switches -------------------------------------------------------------


@pytest.mark.parametrize("stages", ["".join(s) for s in product("LG", repeat=4)])
def test_any_stage_may_be_local_or_global(stages):
    model = tiny(stages=stages)
    kinds = ["L" if "conv1.weight" in b[0].state_dict() else "G" for b in _stages(model)]
    assert "".join(kinds) == stages
    model(torch.randn(2, 3, 2, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("tube_size", [3, 5, 7, 9])
def test_tube_size_is_that_of_the_local_affinity(tube_size):
    model = tiny(tube_size=tube_size)
    assert model.blocks1[0].attn.weight.shape == (8, 1, tube_size, tube_size, tube_size)
    assert model(torch.randn(2, 3, 2, 32, 32)).shape == (2, 5)


def test_without_dpe_the_blocks_have_none():
    model = tiny(dpe=False)
    assert not [k for k in model.state_dict() if "pos_embed" in k]
    assert model(torch.randn(2, 3, 2, 32, 32)).shape == (2, 5)


def test_divided_attention_starts_as_attention_over_space():
    model = tiny(split=True, stages="LGGG").eval()
    for block in (m for m in model.modules() if isinstance(m, SplitBlock)):
        t = torch.randn(3, 4, block.t_norm.weight.numel())
        assert block.t_attn(block.t_norm(t)).abs().max() == 0
    assert model(torch.randn(2, 3, 4, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("change", [
    {"stages": "LLG"}, {"stages": "LLGX"}, {"tube_size": 4}, {"head_dim": 7}, {"dims": (8, 16)},
    {"depths": (1, 0, 1, 1)}, {"split": True, "stages": "LLLL"}, {"drop_path_rate": 1.0},
    {"num_classes": -1},
], ids=str)  # fmt: skip
def test_impossible_networks_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(TINY, **change)


# --- Inputs and outputs ---------------------------------------------------------------


# One frame; odd frames; sizes that no stride divides; the smallest; tall and wide.
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 50, 35), (5, 33, 63), (2, 96, 32)], ids=str)
def test_any_clip_of_32_pixels_and_more(shape):
    T, H, W = shape
    features = tiny().eval().forward_features(torch.randn(2, 3, T, H, W))
    assert features.shape == (2, 24, (T + 1) // 2, H // 32, W // 32)


@pytest.mark.parametrize(("x", "complaint"), [
    (torch.zeros(3, 2, 32, 32), "must be"),
    (torch.zeros(1, 2, 3, 32, 32), "must be"),
    (torch.zeros(1, 3, 2, 31, 32), "H, W >= 32"),
    (torch.zeros(1, 3, 0, 32, 32), "T >= 1"),
    (torch.zeros(1, 3, 2, 32, 32, dtype=torch.uint8), "normalised"),
], ids=["4-D", "channels", "small", "no frames", "uint8"])  # fmt: skip
def test_bad_clips_are_refused(x, complaint):
    with pytest.raises(ValueError, match=complaint):
        tiny()(x)


def test_activations_are_contiguous_and_channels_last_between_blocks():
    model = tiny()
    seen = []
    for block in (b for stage in _stages(model) for b in stage):
        block.register_forward_hook(lambda _, x, y: seen.extend([x[0], y]))
    model(torch.randn(2, 3, 4, 64, 64))
    assert len(seen) == 12
    assert all(x.is_contiguous() and x.shape[-1] in TINY.dims for x in seen)


def test_timm_habits():
    model = tiny().eval()
    x = torch.randn(2, 3, 2, 32, 32)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features) == (2, 24)
    torch.testing.assert_close(model(x), model.get_classifier()(pooled))
    model.reset_classifier(11)
    assert model(x).shape == (2, 11)
    assert model.cfg.num_classes == 11
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    torch.testing.assert_close(model(x), pooled)
    assert model.no_weight_decay() == set()


def normed(model):
    """A model in eval mode whose last norm has something to do."""
    with torch.no_grad():
        for t in (model.norm.running_mean, model.norm.weight, model.norm.bias):
            t.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_pooling_before_the_norm_changes_no_number(dtype):
    model, x = normed(tiny()).to(dtype), torch.randn(2, 3, 3, 64, 64, dtype=dtype)
    assert model._pools_first()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    want = model.forward_head(model.forward_features(x))
    got = model(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    x.requires_grad_()
    (got,) = torch.autograd.grad(model(x).sum(), x)
    (want,) = torch.autograd.grad(model.forward_head(model.forward_features(x)).sum(), x)
    assert (got - want).norm() <= 10 * tolerance * want.norm()


def test_who_wants_the_feature_map_gets_it():
    """Hooks on the norm, and methods of one's own, of the class or of one model."""
    x, model, seen = torch.randn(1, 3, 2, 32, 32), normed(tiny()), []
    handle = model.norm.register_forward_hook(lambda _, args, y: seen.append(y.shape))
    model(x)
    assert seen == [(1, 24, 1, 1, 1)]
    handle.remove()
    model(x)
    assert len(seen) == 1

    class Mine(UniFormer):
        def forward_features(self, x):
            seen.append("mine")
            return super().forward_features(x)

    normed(Mine(TINY))(x)
    model.forward_head = lambda x: seen.append("head")
    model(x)
    assert seen[1:] == ["mine", "head"]
    model.norm = nn.GroupNorm(1, 24)
    assert not model._pools_first()
    assert not tiny().train()._pools_first()


# --- Gradient checkpointing -----------------------------------------------------------


@pytest.mark.parametrize("counts", [True, (1, 0, 2, 0)], ids=str)
def test_checkpointing_changes_no_number(counts):
    x = torch.randn(2, 3, 2, 32, 32)
    outcomes = []
    for enable in (False, counts):
        torch.manual_seed(1)
        model = UniFormer(replace(TINY, drop_path_rate=0.5, drop_rate=0.2))
        model.set_grad_checkpointing(enable)
        torch.manual_seed(2)
        model(x).sum().backward()
        outcomes.append([p.grad for p in model.parameters()] + list(model.buffers()))
    for plain, recomputed in zip(*outcomes, strict=True):
        assert torch.equal(plain, recomputed)


def test_checkpointing_recomputes_only_what_it_was_asked_to():
    model = tiny()
    calls = []
    for i, stage in enumerate(_stages(model), start=1):
        for block in stage:
            block.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    model.set_grad_checkpointing((0, 1, 2, 0))
    model(torch.randn(2, 3, 2, 32, 32)).sum().backward()
    assert [calls.count(i) for i in (1, 2, 3, 4)] == [1, 3, 4, 1]


@pytest.mark.parametrize("bad", [(1, 1), (2, 0, 0, 0), (-1, 0, 0, 0)], ids=str)
def test_checkpointing_refuses_counts_beyond_the_depth(bad):
    with pytest.raises(ValueError, match="four counts"):
        tiny().set_grad_checkpointing(bad)


# --- Initialisation -------------------------------------------------------------------


def test_initialisation_is_the_official_one():
    model = UniFormer(replace(SMALL, split=True))
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, linear in linears.items():
        assert linear.bias.abs().max() == 0, name
        if "t_attn" not in name and linear.weight.numel() > 10_000:
            assert abs(float(linear.weight.detach().std()) - 0.02) < 1e-3, name
    assert model.blocks3[0].t_attn.qkv.weight.abs().max() == 0
    assert (model.blocks3[0].t_attn.proj.weight == 1).all()
    affinity = model.blocks1[0].attn.weight  # PyTorch's own: uniform up to 1 / sqrt(125)
    assert abs(float(affinity.detach().std()) - (3 * 125) ** -0.5) < 2e-3


def test_drop_path_grows_linearly_from_0():
    model = UniFormer(replace(TINY, drop_path_rate=0.5))
    rates = [b.drop_path.rate for stage in _stages(model) for b in stage]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def _stages(model: UniFormer) -> list[nn.ModuleList]:
    return [model.blocks1, model.blocks2, model.blocks3, model.blocks4]


# --- Kernels --------------------------------------------------------------------------


def test_kernels_change_no_number_of_the_network():
    """Training in fp32 on the kernels of this device, against PyTorch's convolutions in fp64."""
    model, x = tiny(dims=(16, 32, 32, 32), head_dim=16).train(), torch.randn(2, 3, 4, 64, 64)
    truth = copy.deepcopy(model).double()
    y, want = model(x), truth(x.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    want.square().sum().backward()
    for (name, p), t in zip(model.named_parameters(), truth.parameters(), strict=True):
        error = (p.grad.double() - t.grad).norm() / t.grad.norm().clamp_min(1e-3)
        assert error < 1e-3, f"{name}: {error:.1e}"


# --- Compilers ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_network_compiles_without_graph_breaks(mode):
    model = getattr(tiny(), mode)()
    x = torch.randn(2, 3, 4, 32, 32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's, about its own graph breaks
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_checkpointed_network_compiles(mode):
    """With graph breaks: the blocks recomputed in the backward pass stay as they are."""
    plain, model = (getattr(tiny(), mode)() for _ in range(2))
    model.load_state_dict(plain.state_dict())
    model.set_grad_checkpointing(True)
    x = torch.randn(2, 3, 4, 32, 32)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x))
    compiled(x).sum().backward()
    plain(x).sum().backward()
    for (name, want), got in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, msg=name)


def test_the_network_exports():
    model, x = tiny().eval(), torch.randn(2, 3, 4, 32, 32)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(x[:1]), model(x[:1]))


def test_an_empty_batch_passes():
    model = tiny().eval()
    assert model(torch.zeros(0, 3, 4, 32, 32)).shape == (0, model.num_classes)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("batch", "device"), [(2, "meta"), (0, "cpu")])
def test_shapes_without_numbers(batch, device, split):
    """What a planner of memory asks for, and an empty batch."""
    model = create_model("uniformer_nano", num_classes=3, split=split).to(device)
    clips = torch.zeros(batch, 3, 4, 32, 32, device=device)
    for mode in (model.eval(), model.train()):
        if batch or not mode.training:
            assert mode(clips).shape == (batch, 3)

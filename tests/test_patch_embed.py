"""Strided projection and LayerNorm, of clips and of feature maps, floating point and pixels."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.check import assert_matches
from uniformer.configs import PRESETS, InputConfig
from uniformer.layers import PatchEmbed
from uniformer.model import UniFormer
from uniformer_kernels import Pixels, backend, patch_embed
from uniformer_kernels.patch_embed import _bwd, _fwd, patch_embed_ref

GPU = torch.cuda.is_available()
PIXELS = Pixels((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
STEM = {"stride": (2, 4, 4), "padding": (1, 0, 0)}
DOWN = {"stride": (1, 2, 2)}
STD = {"stride": (1, 2, 2), "padding": (1, 0, 0)}


@pytest.fixture(params=["auto", "triton"])
def chosen(request):
    with backend(request.param):
        yield request.param


def inputs(shape, N, kernel, device, dtype=torch.float32):
    """x, weight, bias, gamma, beta."""
    C = shape[-1]
    sizes = (shape, (N, C, *kernel), (N,), (N,), (N,))
    return [torch.randn(size, device=device, dtype=dtype) for size in sizes]


def nctwh(x):
    """The same in NCTHW memory."""
    return x.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)


CASES = [
    ((2, 5, 10, 13, 3), 16, (3, 4, 4), STEM),  # the stem, on sizes that fill no stride
    ((1, 1, 8, 8, 3), 16, (3, 4, 4), STEM),  # one frame, padded on both sides
    ((2, 3, 4, 7, 8), 24, (1, 2, 2), DOWN),
    ((1, 2, 6, 4, 8), 24, (3, 2, 2), STD),
    ((1, 2, 3, 3, 5), 7, (3, 3, 3), {"stride": (1, 1, 1), "padding": (1, 1, 1)}),  # every border
    ((1, 1, 2, 2, 1), 1, (1, 2, 2), DOWN),  # a channel
]


@pytest.mark.parametrize("memory", [torch.Tensor.contiguous, nctwh], ids=["channels last", "NCTHW"])
@pytest.mark.parametrize(("shape", "N", "kernel", "how"), CASES, ids=str)
def test_matches_convolution_and_layer_norm(shape, N, kernel, how, memory, device, chosen):
    x, *rest = inputs(shape, N, kernel, device)

    def run(op):
        return lambda x, *rest: op(memory(x), *rest, **how)

    assert_matches(run(patch_embed), run(patch_embed_ref), [x, *rest])


def test_the_reference_is_pytorchs(device):
    x, weight, bias, gamma, beta = inputs((2, 5, 10, 13, 3), 16, (3, 4, 4), device)
    z = F.conv3d(x.permute(0, 4, 1, 2, 3), weight, bias, **STEM).permute(0, 2, 3, 4, 1)
    want = F.layer_norm(z, (16,), gamma, beta, 1e-3)
    got = patch_embed_ref(x, weight, bias, gamma, beta, **STEM, eps=1e-3)
    torch.testing.assert_close(got, want)


def test_without_bias_and_affine(device, chosen):
    x, weight, *_ = inputs((1, 2, 4, 4, 8), 24, (1, 2, 2), device)
    run = lambda op: lambda x, w: op(x, w, None, None, None, **DOWN)  # noqa: E731
    assert_matches(run(patch_embed), run(patch_embed_ref), [x, weight])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("only", ["gamma", "beta", "both"])
def test_parameters_in_fp32(dtype, only, device):
    x, weight, _, gamma, beta = inputs((1, 2, 4, 4, 8), 24, (1, 2, 2), device)
    gamma, beta = None if only == "beta" else gamma, None if only == "gamma" else beta
    x, weight = x.to(dtype).requires_grad_(), weight.requires_grad_()
    y = patch_embed(x, weight, None, gamma, beta, **DOWN)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (dtype, dtype, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype, device, chosen):
    if chosen == "triton" and not GPU and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter gets bf16 casts wrong")
    tensors = inputs((2, 3, 4, 7, 8), 24, (1, 2, 2), device, dtype)
    run = lambda op: lambda *t: op(*t, **DOWN)  # noqa: E731
    assert_matches(run(patch_embed), run(patch_embed_ref), tensors)


@pytest.mark.parametrize("N", [128, 320, 512])
def test_the_networks_widths(N, device):
    tensors = inputs((1, 1, 4, 10, 16), N, (1, 2, 2), device)
    with backend("triton"):
        assert_matches(lambda *t: patch_embed(*t, **DOWN), lambda *t: patch_embed_ref(*t, **DOWN),
                       tensors)  # fmt: skip


# --- Pixels ---------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [torch.Tensor.contiguous, nctwh], ids=["channels last", "NCTHW"])
def test_pixels_are_normalised_and_padded_with_zeros_after_it(memory, device, chosen):
    _, weight, bias, gamma, beta = inputs((1, 1, 1, 1, 3), 16, (3, 4, 4), device)
    clip = torch.randint(0, 256, (2, 3, 8, 9, 3), dtype=torch.uint8, device=device)
    mean, std = (torch.tensor(t, dtype=torch.float64, device=device) for t in PIXELS)
    normalised = (clip.double() / 255 - mean) / std

    def run(op, x):
        pixels = PIXELS if x.dtype == torch.uint8 else None
        return lambda *rest: op(x, *rest, **STEM, pixels=pixels)

    exact = run(patch_embed_ref, normalised)
    near = run(patch_embed_ref, normalised.float())
    got = run(patch_embed, memory(clip))
    assert_matches(got, lambda *rest: (exact if rest[0].dtype == torch.float64 else near)(*rest),
                   [weight, bias, gamma, beta])  # fmt: skip


@pytest.mark.parametrize("bgr", [False, True])
def test_a_network_takes_pixels(bgr):
    torch.manual_seed(0)
    model = UniFormer(replace(PRESETS["uniformer_nano"], num_classes=5)).eval()
    clip = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"model\.input"):
        model(clip)
    model.input = InputConfig(mean=PIXELS.mean, std=PIXELS.std, bgr=bgr)
    mean, std = (torch.tensor(t).view(1, 3, 1, 1, 1) for t in PIXELS)
    normalised = (clip / 255 - mean) / std
    want = model(normalised.flip(1) if bgr else normalised)
    torch.testing.assert_close(model(clip), want)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(clip).float(), want, atol=0.1, rtol=0.1)
    model.patch_embed1.proj.register_forward_hook(lambda *_: None)  # part by part
    torch.testing.assert_close(model(clip), want)


# --- As an operator -------------------------------------------------------------------


def test_under_autocast_the_dtype_is_that_of_pytorchs_layer_norm(device, chosen):
    if chosen == "triton" and not GPU:
        pytest.skip("Triton's interpreter gets bf16 casts wrong")
    x, *rest = inputs((2, 3, 4, 6, 8), 24, (1, 2, 2), device)
    want = patch_embed_ref(x, *rest, **DOWN)
    with torch.autocast(device, torch.bfloat16):
        y = patch_embed(x, *rest, **DOWN)
        assert y.dtype == patch_embed_ref(x, *rest, **DOWN).dtype
    assert 1e-5 < (y - want).abs().max() / want.abs().max() < 5e-2


def test_opcheck_and_compile(device):
    x, *rest = (t.requires_grad_() for t in inputs((1, 2, 4, 6, 8), 24, (1, 2, 2), device))
    constants = [1e-5, [1, 2, 2], [0, 0, 0], [], [], torch.float32]
    with backend("triton"):
        torch.library.opcheck(_fwd.op, (x, *rest, *constants, torch.float32))
        weight, bias, gamma, _ = (t.detach() for t in rest)
        dy = torch.randn(1, 2, 2, 3, 24, device=device)
        for with_dx in (True, False):
            torch.library.opcheck(
                _bwd.op, (dy, x.detach(), weight, bias, gamma, *constants, with_dx)
            )
        op = lambda x: patch_embed(x, *rest, **DOWN)  # noqa: E731
        compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), op(x))
        with FlopCounterMode(display=False) as counter:
            op(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 12 * 24 * 32


def test_only_the_input_is_kept(device):
    x, *rest = (t.requires_grad_() for t in inputs((1, 2, 4, 6, 8), 24, (1, 2, 2), device))
    kept = []
    with (
        backend("triton"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        patch_embed(x, *rest, **DOWN)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, *rest[:3])}


def test_hooks_of_its_parts_are_called():
    made, called = PatchEmbed(8, 16, (1, 2, 2), (1, 2, 2)), []
    x = torch.randn(1, 2, 4, 4, 8)
    want = made(x)
    made.proj.register_forward_hook(lambda *_: called.append(True))
    torch.testing.assert_close(made(x), want)
    assert called
    made.norm = nn.Identity()
    assert not torch.allclose(made(x), want)


@pytest.mark.parametrize("change", [
    {"padding_mode": "replicate", "padding": 1}, {"dilation": 2, "padding": 2},
    {"padding": "same"}, {"groups": 2, "padding": 1},
], ids=str)  # fmt: skip
def test_a_projection_of_another_kind_is_called(change):
    made, x = PatchEmbed(4, 8, (3, 3, 3), (1, 1, 1), (1, 1, 1)), torch.randn(1, 4, 6, 6, 4)
    made.proj = nn.Conv3d(4, 8, 3, **change)
    want = made.norm(made.proj(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1))
    assert torch.equal(made(x), want)


@pytest.mark.parametrize(("change", "complaint"), [
    ({"x": torch.zeros(2, 4, 4, 8)}, "x must be"),
    ({"weight": torch.zeros(16, 7, 1, 2, 2)}, "x must be"),
    ({"weight": torch.zeros(16, 8, 1, 5, 2)}, "smaller than the kernel"),
    ({"bias": torch.zeros(8)}, "bias must be"),
    ({"stride": (1, 2)}, "stride must be"),
    ({"stride": 2}, "stride must be"),
    ({"padding": (1, -1, 2)}, "padding must be"),
    ({"x": torch.zeros(1, 2, 4, 4, 8, dtype=torch.uint8)}, "x is uint8"),
    ({"pixels": ((0.5,) * 3, (0.5,) * 3)}, "pixels must be"),
    ({"pixels": PIXELS}, "pixels are uint8 in 3 channels"),
    ({"gamma": torch.zeros(16, dtype=torch.int64)}, "gamma must be"),
], ids=str)  # fmt: skip
def test_bad_input_is_refused(change, complaint):
    good = {"x": torch.zeros(1, 2, 4, 4, 8), "weight": torch.zeros(16, 8, 1, 2, 2)}
    good |= {"stride": (1, 2, 2)} | dict.fromkeys(("bias", "gamma", "beta"), torch.zeros(16))
    with pytest.raises(ValueError, match=complaint):
        patch_embed(**(good | change))

"""A convolution and the LayerNorm of its result: in one kernel, in two, and against PyTorch."""

import logging

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests import test_dwconv3d
from tests.check import assert_matches
from uniformer_kernels import _runtime, backend, dwconv3d, dwconv3d_norm
from uniformer_kernels.dwconv3d_norm import _fwd, dwconv3d_norm_ref

op = pytest.importorskip("uniformer_kernels.dwconv3d_norm_triton")
GPU = torch.cuda.is_available()


@pytest.fixture(params=[True, False], ids=["one kernel", "two kernels"])
def one_pass(request, monkeypatch):
    monkeypatch.setattr(op, "in_one_pass", lambda *_: request.param)
    with backend("triton"):
        yield request.param


def inputs(shape, kernel, device, dtype=torch.float32, weight_dtype=None):
    """x, weight, bias, gamma and beta."""
    affine = torch.randn(2, shape[-1], device=device).to(weight_dtype or dtype)
    return [*test_dwconv3d.inputs(shape, kernel, device, dtype, weight_dtype), *affine]


def of(run, **kwargs):
    """Both results as one, for `assert_matches`."""
    return lambda *tensors: torch.cat(run(*tensors, **kwargs))


@pytest.mark.parametrize(("shape", "kernel", "residual"), [
    ((1, 2, 3, 7, 8), (3, 3, 3), True),  # the DPE, in a tile and a half
    ((2, 1, 5, 9, 68), (3, 3, 3), True),  # past a block of channels and a run of columns
    ((1, 3, 2, 3, 130), (1, 5, 3), False),  # three blocks, the last of 2 channels; unequal edges
    ((1, 1, 1, 1, 4), (3, 3, 3), False),  # a single token
], ids=str)  # fmt: skip
def test_both_kernels_match_pytorch(shape, kernel, residual, device, one_pass):
    tensors = inputs(shape, kernel, device)
    assert_matches(
        of(dwconv3d_norm, residual=residual), of(dwconv3d_norm_ref, residual=residual), tensors
    )


def test_every_backend_matches_pytorch(device, chosen):
    tensors = inputs((2, 2, 3, 7, 16), (3, 3, 3), device)
    assert_matches(of(dwconv3d_norm), of(dwconv3d_norm_ref), tensors)


@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_err_no_more_than_pytorch(dtype, weight_dtype, device, chosen):
    if chosen == "triton" and dtype == torch.bfloat16 and not GPU:
        pytest.skip("Triton's interpreter gets bf16 casts wrong")
    tensors = inputs((2, 2, 5, 7, 24), (3, 3, 3), device, dtype, weight_dtype)
    y, normed = dwconv3d_norm(*tensors, residual=True)
    assert y.dtype == normed.dtype == dtype
    assert_matches(of(dwconv3d_norm, residual=True), of(dwconv3d_norm_ref, residual=True), tensors)


def test_gamma_and_beta_may_be_missing(device, chosen):
    x, weight, _, gamma, beta = inputs((1, 2, 3, 7, 8), (3, 3, 3), device)
    ones, zeros = torch.ones_like(gamma), torch.zeros_like(beta)
    for g, b in ((None, None), (gamma, None), (None, beta)):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        same = [t.clone().requires_grad_() for t in (x, weight)]
        y, normed = dwconv3d_norm(*leaves, None, g, b)
        want = dwconv3d_norm_ref(*same, None, ones if g is None else g, zeros if b is None else b)
        torch.testing.assert_close((y, normed), want)
        dy = torch.randn_like(y)
        for got, w in zip(
            torch.autograd.grad(normed, leaves, dy), torch.autograd.grad(want[1], same, dy),
            strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(got, w, rtol=1e-4, atol=1e-4)


def test_eps_counts(device, one_pass):
    tensors = inputs((1, 2, 3, 7, 8), (3, 3, 3), device)
    for eps in (1e-6, 0.5):
        want = dwconv3d_norm_ref(*tensors, eps=eps)
        torch.testing.assert_close(dwconv3d_norm(*tensors, eps=eps), want)


def test_a_large_mean_costs_no_digits(device, one_pass):
    """The statistic is of deviations: squares alone would have lost it."""
    x, weight, bias, gamma, beta = inputs((1, 2, 4, 7, 64), (3, 3, 3), device)
    args = (x * 1e-2, weight, bias + 300, gamma, beta)
    want = dwconv3d_norm_ref(*(t.double() for t in args))[1]
    plain = dwconv3d_norm_ref(*args)[1]
    got = dwconv3d_norm(*args)[1]
    assert (got - want).abs().max() <= 2 * (plain - want).abs().max() + 1e-5


def test_the_gradient_of_either_result_may_be_missing(device, chosen):
    tensors = inputs((1, 2, 3, 7, 8), (3, 3, 3), device)
    for i in (0, 1):
        leaves = [t.clone().requires_grad_() for t in tensors]
        same = [t.clone().requires_grad_() for t in tensors]
        found, want = dwconv3d_norm(*leaves)[i], dwconv3d_norm_ref(*same)[i]
        dy = torch.randn_like(found)
        got = torch.autograd.grad(found, leaves, dy, allow_unused=True)
        want = torch.autograd.grad(want, same, dy, allow_unused=True)
        for g, w in zip(got, want, strict=True):
            assert (g is None) == (w is None)
            if g is not None:
                torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", [[0], [1], [2], [3], [4], [0, 3], [2, 4]], ids=str)
def test_any_of_the_inputs_may_be_frozen(wanted, device, chosen):
    tensors = inputs((1, 2, 3, 7, 8), (3, 3, 3), device)
    for i in wanted:
        tensors[i].requires_grad_()
    leaves = [tensors[i] for i in wanted]
    got, want = (
        torch.autograd.grad(sum(t.square().sum() for t in run(*tensors)), leaves)
        for run in (dwconv3d_norm, dwconv3d_norm_ref)
    )
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_any_strides_come_in(device, one_pass):
    x, *rest = inputs((2, 3, 4, 9, 8), (3, 3, 3), device)
    wide = torch.zeros(3, 2, 9, 4, 16, device=device)
    apart = wide.permute(1, 0, 3, 2, 4)[..., 4:12].copy_(x)
    spread = torch.zeros(2, 3, 4, 9, 16, device=device)[..., ::2].copy_(x)
    want = dwconv3d_norm(x, *rest)
    for view in (apart, spread):
        for got, w in zip(dwconv3d_norm(view, *rest), want, strict=True):
            assert torch.equal(got, w)


def test_one_kernel_where_there_are_programs_enough(device):
    """Of the two processors that the interpreter has, say."""
    n = _runtime.multiprocessors(torch.empty(0, device=device))
    few, many = (torch.empty(B, 1, 1, 1, 8, device=device) for B in (1, 64 * n))
    with backend("triton"):
        assert not op.in_one_pass(few, (3, 3, 3))
        assert op.in_one_pass(many, (3, 3, 3))
        assert not op.in_one_pass(many, (3, 7, 3))


@pytest.mark.parametrize("served_by", ["triton", "apart"])
def test_what_was_measured_goes_before_that(served_by, device, monkeypatch):
    row = {"backend": served_by, "NH": 1, "NW": 3, "BLOCK_P": 2, "BLOCK_C": 32, "warps": 2}
    keys = []
    monkeypatch.setattr(_runtime, "tuned", lambda op, key, device: keys.append(key) or row)
    x = torch.empty(1, 2, 3, 4, 8, device=device)
    assert op.in_one_pass(x, (3, 3, 3)) == (served_by == "triton")
    assert keys == [("norm", (3, 3, 3), torch.float32, 8, (2, 3, 4))]
    config = op.fwd_config(x.shape, 8, (3, 3, 3), row)
    assert [config.arguments[k] for k in ("NH", "NW", "BLOCK_P")] == [1, 3, 2]
    assert config.warps == 2


def test_the_op_is_well_formed(device, chosen):
    tensors = [t.requires_grad_() for t in inputs((1, 2, 3, 7, 8), (3, 3, 3), device)]
    torch.library.opcheck(_fwd.op, (*tensors, 1e-6, True, torch.float32))
    x, weight = (t.detach() for t in tensors[:2])
    torch.library.opcheck(_fwd.op, (x, weight, None, None, None, 1e-6, False, torch.float16))


def test_compiles_and_exports_whole(device, chosen):
    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            return dwconv3d_norm(*tensors, residual=True)

    tensors = inputs((1, 2, 3, 7, 8), (3, 3, 3), device)
    want = Layer()(*tensors)
    compiled = torch.compile(Layer(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), want)
    exported = torch.export.export(Layer(), tuple(tensors)).module()
    torch.testing.assert_close(tuple(exported(*tensors)), want)


def test_autocast_gives_the_norm_in_its_dtype_and_the_sum_in_its_own(device, chosen):
    tensors = inputs((1, 2, 3, 7, 8), (3, 3, 3), device)
    with torch.autocast(device, torch.float16):
        y, normed = dwconv3d_norm(*tensors, residual=True)
    assert (y.dtype, normed.dtype) == (torch.float32, torch.float16)
    want = dwconv3d_norm_ref(*tensors, residual=True)
    torch.testing.assert_close((y, normed.float()), want, rtol=1e-2, atol=1e-2)


def test_counts_the_products(device, chosen):
    tensors = inputs((1, 2, 3, 7, 8), (3, 3, 3), device)
    with FlopCounterMode(display=False) as counter:
        dwconv3d_norm(*tensors)
    with FlopCounterMode(display=False) as plain:
        dwconv3d(*tensors[:3])
    assert counter.get_total_flops() == plain.get_total_flops() > 0


def test_gradients_of_gradients_raise(device, one_pass):
    tensors = [t.requires_grad_() for t in inputs((1, 2, 3, 7, 8), (3, 3, 3), device)]
    loss = sum(t.square().sum() for t in dwconv3d_norm(*tensors))
    (dx,) = torch.autograd.grad(loss, tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="has none of its own"):
        dx.sum().backward()


def test_torch_func_runs_in_plain_pytorch_and_says_so(device, caplog, monkeypatch):
    monkeypatch.setattr(_runtime, "_announced", set())
    x, *rest = inputs((3, 1, 3, 7, 8), (3, 3, 3), device)
    want = dwconv3d_norm(x, *rest)
    with caplog.at_level(logging.WARNING):
        got = torch.vmap(lambda clip: dwconv3d_norm(clip[None], *rest))(x)
    torch.testing.assert_close(tuple(t.squeeze(1) for t in got), want)
    assert "torch.func" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_an_empty_batch_stays_empty(dtype, device, chosen):
    x, *rest = inputs((0, 2, 3, 7, 8), (3, 3, 3), device, dtype)
    y, normed = dwconv3d_norm(x.requires_grad_(), *(t.requires_grad_() for t in rest))
    assert y.shape == normed.shape == x.shape
    (y.sum() + normed.sum()).backward()
    assert all(not t.grad.any() for t in (x, *rest))


@pytest.mark.parametrize(("wrong", "why"), [
    ({"gamma": torch.ones(7)}, r"gamma must be \(8,\)"),
    ({"beta": torch.ones(8, 1)}, r"beta must be \(8,\)"),
    ({"gamma": torch.ones(8).half()}, "gamma must be of x's dtype or fp32"),
    ({"gamma": 1.0}, "gamma must be a tensor or None"),
    ({"x": torch.ones(2, 3, 7, 8)}, r"x must be \(B, T, H, W, C\)"),
    ({"weight": torch.ones(8, 1, 2, 3, 3)}, "the kernel must be odd"),
    ({"residual": torch.ones(1, 2, 3, 7, 8)}, "residual must be True or False"),
], ids=["shape", "axes", "dtype", "number", "x", "even", "residual"])  # fmt: skip
def test_bad_input_raises(wrong, why):
    names = ("x", "weight", "bias", "gamma", "beta")
    good = dict(zip(names, inputs((1, 2, 3, 7, 8), (3, 3, 3), "cpu"), strict=True))
    with pytest.raises(ValueError, match=why):
        dwconv3d_norm(**good | wrong)

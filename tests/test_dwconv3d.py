"""Depthwise convolution on every backend: gradients of all orders, layouts, edges, compilers."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from tests.check import assert_matches
from tests.conftest import BACKENDS
from uniformer_kernels import _runtime, backend, dwconv3d, dwconv3d_stats
from uniformer_kernels.dwconv3d import _stats, dwconv3d_ref

GPU = torch.cuda.is_available()


def inputs(shape, kernel, device, dtype=torch.float32, weight_dtype=None):
    C, weight_dtype = shape[-1], weight_dtype or dtype
    return [
        torch.randn(shape, device=device, dtype=dtype),
        torch.randn(C, 1, *kernel, device=device, dtype=weight_dtype),
        torch.randn(C, device=device, dtype=weight_dtype),
    ]


def ncthw(x, weight, bias, residual=False):
    """PyTorch's convolution in its own layout, by another path than the reference's."""
    padding = [k // 2 for k in weight.shape[2:]]
    y = F.conv3d(x.permute(0, 4, 1, 2, 3).contiguous(), weight, bias, 1, padding, 1, x.shape[-1])
    return y.permute(0, 2, 3, 4, 1) + (x if residual else 0)


def double(tensors):
    return [t.double() for t in tensors]


# --- Numbers --------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "kernel", "residual"), [
    ((2, 3, 6, 5, 8), (3, 3, 3), True),  # the DPE
    ((1, 3, 6, 9, 72), (5, 5, 5), False),  # the affinity; C and W past one tile
    ((1, 2, 5, 7, 3), (1, 3, 7), False),  # unequal edges, W a whole run
    ((1, 1, 1, 1, 4), (9, 9, 9), True),  # a single token, the largest tube
    ((2, 2, 3, 3, 1), (3, 1, 3), False),  # one channel
], ids=str)  # fmt: skip
def test_matches_a_grouped_convolution(shape, kernel, residual, device, chosen):
    def op(*tensors):
        return dwconv3d(*tensors, residual=residual)

    assert_matches(op, lambda *t: ncthw(*t, residual=residual), inputs(shape, kernel, device))


# Tiles of the C++ kernel are 8 x 28 x 64 with 16 channels a block: one more of each.
@pytest.mark.parametrize("shape", [(1, 9, 3, 2, 8), (2, 1, 29, 5, 17), (1, 2, 3, 65, 33)], ids=str)
@pytest.mark.parametrize("kernel", [(3, 5, 5), (5, 3, 1), (3, 9, 7), (1, 7, 3)], ids=str)
def test_tiles_meet_without_a_seam(shape, kernel, device, fast):
    assert_matches(dwconv3d, dwconv3d_ref, inputs(shape, kernel, device))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype, weight_dtype, residual, device, chosen):
    """The interpreter truncates bf16; see design notes of Triton itself."""
    if chosen == "triton" and not GPU and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter gets bf16 casts wrong")

    def op(*tensors):
        return dwconv3d(*tensors, residual=residual)

    def ref(x, weight, bias):
        return dwconv3d_ref(x, weight.to(x.dtype), bias.to(x.dtype), residual=residual)

    assert_matches(op, ref, inputs((2, 3, 5, 7, 20), (3, 3, 3), device, dtype, weight_dtype))


def test_fp64_is_exact(device):
    x, weight, bias = double(inputs((1, 2, 3, 4, 5), (3, 3, 3), device))
    torch.testing.assert_close(dwconv3d(x, weight, bias), ncthw(x, weight, bias))


def test_the_weight_gradient_does_not_drift(device, fast):
    """A long sum of equal signs, which a single fp32 sum would get wrong in the last digits."""
    x = torch.rand(2, 8, 56, 56, 16, device=device)
    weight = torch.zeros(16, 1, 3, 3, 3, device=device, requires_grad=True)
    dwconv3d(x, weight).backward(torch.ones_like(x))
    middle = x.double().sum((0, 1, 2, 3))
    assert ((weight.grad[:, 0, 1, 1, 1] - middle) / middle).abs().max() < 1e-6


def test_gradients_of_gradients(device, chosen):
    """Through both gradients of both inputs, in fp32 against fp64 by PyTorch."""

    def twice(fn, tensors):
        x, weight, bias = (t.detach().requires_grad_() for t in tensors)
        dx, dw, db = torch.autograd.grad(
            fn(x, weight, bias).sin().sum(), (x, weight, bias), create_graph=True
        )
        return torch.autograd.grad((dx**2).sum() + (dw**3).sum() + (db**2).sum(), (x, weight, bias))

    tensors = inputs((1, 2, 3, 4, 8), (3, 3, 3), device)
    want = twice(lambda *t: ncthw(*t, residual=True), double(tensors))
    got = twice(lambda *t: dwconv3d(*t, residual=True), tensors)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4 * float(w.abs().max()))


def test_repeats_are_equal_to_the_bit(device, fast):
    tensors = inputs((2, 3, 30, 20, 40), (5, 5, 5), device)
    leaves = [t.requires_grad_() for t in tensors]
    first = torch.autograd.grad(dwconv3d(*leaves).square().sum(), leaves)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # tiles are what is summed, whatever thread has them
        again = torch.autograd.grad(dwconv3d(*leaves).square().sum(), leaves)
    finally:
        torch.set_num_threads(threads)
    if fast != "reference":
        assert torch.equal(first[1], again[1])
        assert torch.equal(first[2], again[2])


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_spreads_as_far_as_its_tube(bad, device, chosen):
    x, weight, _ = inputs((1, 5, 9, 9, 8), (3, 3, 3), device)
    x[0, 2, 4, 4, 3] = bad
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    y = dwconv3d(*leaves)
    lost = ~torch.isfinite(y)
    assert lost[0, 1:4, 3:6, 3:6, 3].all()
    assert lost.sum() == 27
    y.nan_to_num(0, 0, 0).sum().backward()
    assert not torch.isfinite(weight.grad[3]).any()
    assert torch.isfinite(weight.grad[[0, 1, 2, 4, 5, 6, 7]]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_statistics_of_the_output_come_with_it(dtype, device, chosen):
    """As stored: of the rounded values, which are what the BatchNorm after it reads."""
    x, weight, bias = inputs((2, 3, 5, 9, 72), (3, 3, 3), device, dtype)
    y, stats = dwconv3d_stats(x, weight, bias, residual=True)
    assert torch.equal(y, dwconv3d(x, weight, bias, residual=True))
    var, mean = torch.var_mean(y.double(), (0, 1, 2, 3), correction=0)
    torch.testing.assert_close(stats.double(), torch.stack([mean, var]), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="must have elements"):
        dwconv3d_stats(x[:0], weight, bias)


def test_statistics_survive_a_large_mean(device, chosen):
    """Variance 1e-4 beside a mean of 1,000: a difference of squares would leave nothing of it."""
    x, weight, _ = inputs((2, 3, 5, 9, 24), (3, 3, 3), device)
    y, stats = dwconv3d_stats(1000 + 0.01 * x, weight * 0, residual=True)
    var, mean = torch.var_mean(y.double(), (0, 1, 2, 3), correction=0)
    torch.testing.assert_close(stats[0].double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats[1].double(), var, rtol=1e-2, atol=0)  # the mean is fp32


def test_gradients_with_statistics_are_those_without(device, chosen):
    tensors = inputs((2, 2, 4, 5, 8), (3, 3, 3), device)
    assert_matches(lambda *t: dwconv3d_stats(*t)[0], dwconv3d_ref, tensors)
    torch.library.opcheck(_stats.op, (*[t.requires_grad_() for t in tensors], True))


# --- Memory ---------------------------------------------------------------------------


def test_any_strides_come_in(device, chosen):
    x = torch.randn(2, 8, 3, 6, 7, device=device)
    weight = torch.randn(8, 1, 3, 3, 3, device=device)
    want = dwconv3d_ref(x.permute(0, 2, 3, 4, 1), weight)
    layouts = [
        x.permute(0, 2, 3, 4, 1),
        x.contiguous(memory_format=torch.channels_last_3d).permute(0, 2, 3, 4, 1),
        torch.randn(2, 3, 6, 14, 16, device=device)[:, :, :, ::2, 4:12].copy_(
            x.permute(0, 2, 3, 4, 1)
        ),
    ]
    for laid in layouts:
        leaf = laid.detach().requires_grad_()
        y = dwconv3d(leaf, weight)
        assert y.is_contiguous()
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        want_dx = dwconv3d_ref(dy, weight.flip(2, 3, 4))
        torch.testing.assert_close(dx, want_dx, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(GPU, reason="the sparse file is the CPU's memory")
def test_addresses_beyond_31_bits(tmp_path, chosen):
    """Two clips 2^31 elements apart, in a file that is all hole but for them."""
    apart = 2**31
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=apart + 4096)
    x = memory.as_strided((2, 1, 2, 3, 8), (apart, 48, 24, 8, 1)).copy_(torch.randn(2, 1, 2, 3, 8))
    weight = torch.randn(8, 1, 3, 3, 3, requires_grad=True)
    dy = torch.randn(2, 1, 2, 3, 8)
    far, near = dwconv3d(x, weight), dwconv3d(x.clone(), weight)
    assert torch.equal(far, near)
    grads = [torch.autograd.grad(y, weight, dy)[0] for y in (far, near)]
    assert torch.equal(*grads)


def test_gradients_without_strides_come_back(device, chosen):
    """`sum().backward()` sends one number, expanded."""
    tensors = inputs((1, 2, 3, 7, 8), (3, 3, 3), device)
    leaves = [t.clone().requires_grad_() for t in tensors]
    truth = [t.double().requires_grad_() for t in tensors]
    dwconv3d(*leaves).sum().backward()
    ncthw(*truth).sum().backward()
    for leaf, want in zip(leaves, truth, strict=True):
        torch.testing.assert_close(leaf.grad.double(), want.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 8), (2, 0, 3, 4, 8)], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_in_nothing_out(shape, device, name):
    leaves = [t.requires_grad_() for t in inputs(shape, (3, 3, 3), device)]
    with backend(name):
        y = dwconv3d(*leaves)
        assert y.shape == shape
        y.sum().backward()
    assert all(not t.grad.any() for t in leaves)


def test_only_wanted_gradients_are_computed(device, fast):
    x, weight, bias = inputs((1, 2, 3, 4, 8), (3, 3, 3), device)
    for wanted in ([x], [weight], [bias], [x, bias], [weight, bias]):
        leaves = [t.requires_grad_() for t in wanted]
        grads = torch.autograd.grad(dwconv3d(x, weight, bias).sum(), leaves)
        assert [g.shape for g in grads] == [t.shape for t in wanted]
        for t in wanted:
            t.requires_grad_(False)


# --- Choosing a backend ---------------------------------------------------------------


def test_backends_that_cannot_run_say_why(monkeypatch):
    with pytest.raises(ValueError, match="must be one of auto, reference"):
        backend("metal").__enter__()
    monkeypatch.setattr(_runtime, "why_not", lambda name: "it is Sunday")
    with pytest.raises(RuntimeError, match="'native' cannot run here: it is Sunday"):
        backend("native").__enter__()


def test_a_backend_of_the_other_device_is_refused(device):
    name = "native" if device == "cuda" else "triton"
    _runtime.register("test", {"cuda" if name == "triton" else "cpu": (name,)})
    with backend(name), pytest.raises(ValueError, match=f"'{name}' does not run test on"):
        _runtime.serving("test", torch.device(device))
    del _runtime._SERVES["test"]


@pytest.mark.skipif(GPU, reason="there the backend runs")
def test_an_impossible_backend_is_refused_with_and_without_gradients(monkeypatch, capsys):
    monkeypatch.setattr(_runtime, "_current", "cuda")  # as UNIFORMER_BACKEND sets it
    x, weight, _ = inputs((1, 2, 3, 4, 8), (3, 3, 3), "cpu")
    for needs in (False, True):
        with pytest.raises(ValueError, match="'cuda' does not run dwconv3d on cpu"):
            dwconv3d(x, weight.requires_grad_(needs))
    rows = {op: served_by for op, _, served_by, _ in _runtime.report()}
    assert rows["dwconv3d"].startswith("nothing: backend 'cuda' does not run")


@pytest.mark.parametrize("name", BACKENDS[1:2])
def test_one_channel_of_sixteen_bits_is_right(device, name):
    """PyTorch's own convolution was seen to return uninitialised memory here."""
    x, weight, bias = inputs((2, 1, 7, 7, 1), (5, 5, 5), device, torch.bfloat16)
    want = ncthw(*double([x, weight, bias]))
    with backend(name):
        torch.testing.assert_close(dwconv3d(x, weight, bias).double(), want, rtol=2e-2, atol=2e-2)


def test_the_slow_path_is_announced_once(monkeypatch, device, caplog):
    monkeypatch.setattr(_runtime, "why_not", lambda name: f"no {name} today")
    monkeypatch.setattr(_runtime, "_announced", set())
    leaves = [t.requires_grad_() for t in inputs((1, 2, 3, 4, 8), (3, 3, 3), device)]
    for _ in range(2):
        dwconv3d(*leaves).sum().backward()
    (record,) = caplog.records
    assert "PyTorch's own operators, slower than it could" in record.message
    assert "today" in record.message


def test_everything_works_where_triton_is_not_installed():
    """As on macOS and Windows."""
    program = """
import sys
sys.modules["triton"] = None
import torch, uniformer, uniformer_kernels
model = uniformer.create_model("uniformer_nano", 3)
model(torch.randn(2, 3, 2, 32, 32)).sum().backward()
try:
    uniformer_kernels.backend("triton").__enter__()
except RuntimeError as error:
    assert "triton is not installed" in str(error)
    print("fine")
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "fine\n", done.stderr


# --- Mistakes -------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "weight", "bias", "complaint"), [
    ((2, 3, 4, 8), (8, 1, 3, 3, 3), (8,), "x must be"),
    ((2, 3, 4, 4, 8), (4, 1, 3, 3, 3), (8,), "weight must be"),
    ((2, 3, 4, 4, 8), (8, 1, 3, 4, 3), (8,), "odd"),
    ((2, 3, 4, 4, 8), (8, 1, 11, 3, 3), (8,), "at most 9"),
    ((2, 3, 4, 4, 8), (8, 1, 3, 3, 3), (4,), "bias must be"),
], ids=str)  # fmt: skip
def test_wrong_shapes_are_refused(shape, weight, bias, complaint):
    with pytest.raises(ValueError, match=complaint):
        dwconv3d(torch.zeros(shape), torch.zeros(weight), torch.zeros(bias))


@pytest.mark.parametrize(("dtypes", "complaint"), [
    ((torch.int32, torch.float32), "fp32, fp16, bf16 or fp64, got torch.int32"),
    ((torch.float32, torch.float16), "weight must be of x's dtype or fp32"),
    ((torch.float16, torch.bfloat16), "weight must be of x's dtype or fp32"),
], ids=str)  # fmt: skip
def test_wrong_dtypes_are_refused(dtypes, complaint):
    x, weight = torch.zeros(1, 1, 1, 1, 2, dtype=dtypes[0]), torch.zeros(2, 1, 1, 1, 1)
    with pytest.raises(ValueError, match=complaint):
        dwconv3d(x, weight.to(dtypes[1]))


@pytest.mark.parametrize("C", [16, 32])
def test_the_reference_in_bf16_has_the_right_gradients(C):
    """PyTorch 2.13's own, on a CPU, is wrong by many orders of magnitude."""
    x, weight = torch.randn(1, 4, 6, 6, C), torch.randn(C, 1, 5, 5, 5) / 11
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        leaf = weight.to(dtype).requires_grad_()
        with backend("reference"):
            dwconv3d(x.to(dtype), leaf).square().sum().backward()
        found.append(leaf.grad.double())
    torch.testing.assert_close(
        found[1], found[0], rtol=0.05, atol=0.02 * float(found[0].abs().max())
    )

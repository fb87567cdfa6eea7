"""Depthwise convolution under autocast, compilers, torch.func and counters, on every backend."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.test_dwconv3d import inputs
from uniformer_kernels import _runtime, dwconv3d, dwconv3d_stats
from uniformer_kernels.dwconv3d import _fwd, conv_bwd, dwconv3d_ref

GPU = torch.cuda.is_available()


def test_ops_are_well_formed(device, chosen):
    x, weight, bias = inputs((1, 2, 3, 4, 8), (3, 3, 3), device)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(_fwd.op, (*leaves, True))
    torch.library.opcheck(_fwd.op, (x, weight, None, False))
    dy = torch.randn_like(x)
    for wanted in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(conv_bwd.op, (dy.requires_grad_(), x, weight, True, *wanted))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_casts_as_for_convolutions(dtype, device, fast):
    x, weight, bias = inputs((1, 2, 3, 4, 8), (3, 3, 3), device)
    with torch.autocast(device, dtype):
        y = dwconv3d(x.requires_grad_(), weight.requires_grad_(), bias)
        embedded = dwconv3d(x, weight, bias, residual=True)
    assert y.dtype == dtype
    assert embedded.dtype == torch.float32  # as x + conv(x) is
    torch.testing.assert_close(y.float(), dwconv3d_ref(x, weight, bias), rtol=2e-2, atol=1e-1)
    y.float().sum().backward()
    assert (x.grad.dtype, weight.grad.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("residual", [False, True])
def test_bf16_autocast_has_gradients_on_every_path(residual, device, fast):
    """PyTorch's own in bf16 on a CPU are garbage: neither the reference nor torch.func may be."""
    x, weight, bias = inputs((2, 2, 3, 7, 24), (3, 3, 3), device)
    dy = torch.randn_like(x)

    def loss(weight):
        with torch.autocast(device, torch.bfloat16):
            y = dwconv3d(x, weight, bias, residual=residual)
        assert y.dtype == (torch.float32 if residual else torch.bfloat16)
        return (y.float() * dy).sum()

    want = torch.func.grad(lambda w: (dwconv3d_ref(x, w, bias, residual=residual) * dy).sum())
    (got,) = torch.autograd.grad(loss(weight.requires_grad_()), weight)
    want = want(weight.detach())
    torch.testing.assert_close(got, want, rtol=3e-2, atol=0.2)
    torch.testing.assert_close(torch.func.grad(loss)(weight.detach()), want, rtol=3e-2, atol=0.2)


@pytest.mark.parametrize("C", [16, 24])
@pytest.mark.parametrize("k", [3, 7])
@pytest.mark.parametrize("op", [dwconv3d, lambda *a: dwconv3d_stats(*a)[0]], ids=["y", "stats"])
def test_a_result_may_be_changed_in_place(op, k, C, device, chosen):
    x, weight, _ = inputs((1, 2, 3, 4, C), (k, 3, k), device)
    weight.requires_grad_()
    y = op(x, weight)
    want = y.detach().clone().relu()
    y = y.relu_()
    torch.testing.assert_close(y, want)
    y.sum().backward()
    assert weight.grad is not None


def test_compiles_and_exports_whole(device, fast):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(8, 1, 3, 3, 3, device=device))

        def forward(self, x):
            return dwconv3d(x, self.weight, residual=True)

    layer, x = Layer(), torch.randn(1, 2, 3, 4, 8, device=device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert layer.weight.grad is not None
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


def test_torch_func_runs_in_plain_pytorch_and_says_so(device, fast, caplog, monkeypatch):
    monkeypatch.setattr(_runtime, "_announced", set())
    x, weight, bias = inputs((3, 2, 3, 4, 5), (3, 3, 3), device)

    def loss(weight, sample):
        return dwconv3d(sample.unsqueeze(0), weight, bias, residual=True).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x)
    for i in range(3):
        leaf = weight.clone().requires_grad_()
        (want,) = torch.autograd.grad(loss(leaf, x[i]), leaf)
        torch.testing.assert_close(grads[i], want, rtol=1e-4, atol=1e-4)
    assert ("torch.func" in caplog.text) == (fast != "reference")


@pytest.mark.skipif(GPU, reason="complex views and zero tensors are the CPU's here")
def test_tensors_whose_memory_is_not_what_they_hold(fast):
    x, weight, bias = inputs((1, 2, 4, 8, 16), (3, 3, 3), "cpu")
    want = dwconv3d_ref(-x, -weight, -bias)
    negated = [torch._neg_view(t) for t in (x, weight, bias)]
    torch.testing.assert_close(dwconv3d(*negated), want, rtol=1e-4, atol=1e-4)
    leaf = weight.clone().requires_grad_()
    dy = torch._neg_view(torch.randn_like(x))
    (dw,) = torch.autograd.grad(dwconv3d(x, leaf), leaf, dy)
    (want,) = torch.autograd.grad(dwconv3d_ref(x, leaf), leaf, dy.clone())
    torch.testing.assert_close(dw, want, rtol=1e-4, atol=1e-3)
    zero = torch._efficientzerotensor(1, 2, 4, 8, 16)
    assert torch.equal(dwconv3d(zero, weight), torch.zeros(x.shape))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, within
def test_forward_mode_differentiation_runs_in_plain_pytorch(device, fast):
    x, weight, bias = inputs((1, 2, 3, 8, 16), (3, 3, 3), device)
    tangent = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        y = dwconv3d(torch.autograd.forward_ad.make_dual(x, tangent), weight, bias)
        got = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(got, dwconv3d_ref(tangent, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_by_torch_jit_it_is_pytorchs(device, fast):
    x, weight, bias = inputs((1, 2, 3, 8, 16), (3, 3, 3), device)

    class Module(torch.nn.Module):
        def forward(self, x):
            return dwconv3d(x, weight, bias)

    traced = torch.jit.trace(Module(), x)
    other = torch.randn_like(x)
    torch.testing.assert_close(traced(other), dwconv3d_ref(other, weight, bias))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batches_of_gradients(device, fast):
    """As of `jacobian(vectorize=True)`: vmap over the backward pass."""
    leaves = [t.requires_grad_() for t in inputs((1, 2, 3, 8, 16), (3, 3, 3), device)]
    y = dwconv3d(*leaves, residual=True)
    several = torch.randn(3, *y.shape, device=device)
    batched = torch.autograd.grad(y, leaves, several, retain_graph=True, is_grads_batched=True)
    for i, dy in enumerate(several):
        one = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        for got, want in zip(batched, one, strict=True):
            torch.testing.assert_close(got[i], want, rtol=1e-4, atol=1e-3)


def test_operations_are_counted(device, fast):
    x, weight, bias = inputs((1, 2, 3, 4, 8), (3, 5, 3), device)
    with FlopCounterMode(display=False) as counter:
        dwconv3d(x.requires_grad_(), weight.requires_grad_(), bias).sum().backward()
    if fast != "reference":  # PyTorch counts its own backward many times over
        assert counter.get_total_flops() == 3 * 2 * x.numel() * 45

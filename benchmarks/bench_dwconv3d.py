"""Depthwise convolution against PyTorch's in both layouts, at the shapes of UniFormer-S.

    make bench      # writes benchmarks/results/dwconv3d_cpu.json, prints the ratios

Rounds of the providers of a case follow one another; the least time of each is compared, since
other jobs only ever add. Every provider is checked against fp64 before it is timed.
"""

import pytest
import torch
import torch.nn.functional as F

from uniformer_kernels import dwconv3d

# Channels, T, H = W, kernel: the DPE of all four stages, the affinity of the local ones.
CASES = [
    (64, 8, 56, 5), (128, 8, 28, 5),
    (64, 8, 56, 3), (128, 8, 28, 3), (320, 8, 14, 3), (512, 8, 7, 3),
]  # fmt: skip
GPU = torch.cuda.is_available()
DEVICE, BATCH = ("cuda", 32) if GPU else ("cpu", 1)
PROVIDERS = ["PyTorch NCTHW", "PyTorch channels_last_3d", "uniformer"]


def arguments(case, dtype, provider):
    """x and dy in the layout of the provider, and its function."""
    C, T, H, k = case
    torch.manual_seed(0)
    shape = (BATCH, T, H, H, C)
    x, dy = (torch.randn(shape, device=DEVICE, dtype=dtype) for _ in range(2))
    weight = torch.randn(C, 1, k, k, k, device=DEVICE, dtype=dtype)
    bias = torch.randn(C, device=DEVICE, dtype=dtype)

    def pytorch(x, weight, bias):
        return F.conv3d(x, weight, bias, padding=k // 2, groups=C)

    if provider == "uniformer":
        return dwconv3d, [x, weight, bias], dy
    x, dy = x.permute(0, 4, 1, 2, 3), dy.permute(0, 4, 1, 2, 3)
    if provider == "PyTorch NCTHW":
        x, dy = x.contiguous(), dy.contiguous()
    return pytorch, [x, weight, bias], dy


def check(fn, tensors, dy, provider):
    """The provider's gradient of the weight against fp64: a wrong one is not worth timing."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    (dw,) = torch.autograd.grad(fn(*leaves), leaves[1], dy)
    truth = [t.detach().double().requires_grad_() for t in tensors]
    (want,) = torch.autograd.grad(fn(*truth), truth[1], dy.double())
    error = (dw.double() - want).norm() / want.norm()
    assert error < 0.02, f"{provider}: relative error {error:.1e}"


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[3]}x{c[3]}x{c[3]} C={c[0]} {c[2]}")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_dwconv3d(benchmark, direction, case, dtype, provider):
    compare(benchmark, direction, case, dtype, provider)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_backward_on_one_thread(benchmark, provider):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        compare(benchmark, "backward on one thread", CASES[0], torch.float32, provider)
    finally:
        torch.set_num_threads(threads)


def compare(benchmark, direction, case, dtype, provider):
    C, T, H, k = case
    benchmark.group = f"{direction} B={BATCH} {k}x{k}x{k} C={C} {T}x{H}x{H} {str(dtype)[6:]}"
    fn, tensors, dy = arguments(case, dtype, provider)
    check(fn, tensors, dy, provider)
    if direction == "forward":
        benchmark.pedantic(finished(fn), tensors, rounds=30, warmup_rounds=3)
        return
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = fn(*leaves)
    backward = finished(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True))
    benchmark.pedantic(backward, rounds=8, warmup_rounds=1)


def finished(fn):
    """A call that returns when the device is done with it."""

    def run(*tensors):
        fn(*tensors)
        if GPU:
            torch.cuda.synchronize()

    return run

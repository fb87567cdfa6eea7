"""The C++ forward of the CPU: every kind of run, every dtype, and where it is chosen."""

import math

import pytest
import torch

from uniformer_kernels import dwconv3d_native
from uniformer_kernels.dwconv3d import dwconv3d_ref

SERVED = [  # in fp32 with AVX-512 alone
    d for d in dwconv3d_native.DTYPES
    if dwconv3d_native.serves_cpu(torch.empty(1, 1, 1, 1, 16, dtype=d), (3, 3, 3))
]  # fmt: skip


@pytest.mark.parametrize("dtype", SERVED, ids=str)
@pytest.mark.parametrize(("shape", "kernel"), [
    ((2, 3, 4, 5, 16), (3, 3, 3)),  # a row is one run: both its ends are borders
    ((1, 2, 9, 14, 32), (1, 5, 5)),  # more rows than one thread takes in one go
    ((1, 6, 2, 42, 16), (5, 3, 5)),  # a run with neighbours on both sides
    ((1, 3, 3, 20, 48), (9, 9, 3)),  # tubes larger than the clip
    ((1, 1, 1, 16, 16), (3, 3, 5)),
], ids=str)  # fmt: skip
def test_runs_of_the_cpu_forward_meet_without_a_seam(shape, kernel, dtype):
    C = shape[-1]
    x, weight, bias = (torch.randn(s).to(dtype) for s in (shape, (C, 1, *kernel), (C,)))
    wide = torch.randn(*shape[:3], 2 * shape[3], shape[4]).to(dtype)[:, :, :, ::2].copy_(x)
    for residual in (False, True):
        want = dwconv3d_ref(x.double(), weight.double(), bias.double(), residual=residual)
        summed = dwconv3d_ref(x.float(), weight.float(), bias.float(), residual=residual) - want
        bound = float(2 * summed.abs().max() + torch.finfo(dtype).eps * want.abs().max())
        for source in (x, wide):
            got = dwconv3d_native.fwd_cpu(source, weight, bias, residual)
            torch.testing.assert_close(got.double(), want, rtol=0, atol=bound)
    mirrored = dwconv3d_native.fwd_cpu(x, weight.float(), None, False, mirror=True)
    want = dwconv3d_ref(x.double(), weight.double().flip(2, 3, 4))
    torch.testing.assert_close(mirrored.double(), want, rtol=0, atol=bound)


@pytest.mark.parametrize("C", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_cpu_forward_rounds_as_pytorch_does(dtype, C):
    """One tap, so that y is x + bias in fp32, rounded once; ties among them."""
    x = torch.randn(1, 1, 8, 7, C).to(dtype)
    x[0, 0, 0, 0, :4] = torch.tensor([math.nan, math.inf, -math.inf, 3.3e38])
    weight = torch.zeros(C, 1, 1, 1, 3)
    weight[..., 1] = 1
    bias = torch.finfo(dtype).eps / 2 * torch.arange(C)
    got = dwconv3d_native.fwd_cpu(x, weight, bias, False)
    want = (x.float() + bias).to(dtype)
    nothing = x.new_zeros(()) * x[0, 0, 0, 0]  # the taps of zero next to what is no number
    want[0, 0, 0, 1] += nothing
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", SERVED, ids=str)
@pytest.mark.parametrize("kw", [3, 5])
def test_rows_of_every_width(kw, dtype):
    """Whole rows, runs side by side, and runs that overlap at the end; channels one by one and, in
    bf16, in pairs of taps."""
    for width in (*range(1, 26), 28, 29, 43, 56):
        for C in (16, 32):
            x, weight = torch.randn(1, 1, 2, width, C).to(dtype), torch.randn(C, 1, 1, 3, kw)
            got = dwconv3d_native.fwd_cpu(x, weight.to(dtype), None, False)
            want = dwconv3d_ref(x.double(), weight.to(dtype).double())
            bound = 2e-6 * want.abs().max() + torch.finfo(dtype).eps * want.abs()
            assert ((got - want).abs() <= bound).all(), (width, C)


def test_what_the_cpu_forward_serves():
    def serves(shape, k, dtype=torch.float32):
        x = torch.empty(shape, dtype=dtype)
        return bool(dwconv3d_native.serves_cpu(x, (k, k, k)))

    for dtype in (torch.bfloat16, torch.float16):
        assert serves((1, 8, 56, 56, 64), 5, dtype)
        assert serves((1, 8, 11, 1, 64), 3, dtype)
    assert serves((1, 8, 56, 56, 64), 5) == serves((1, 8, 14, 14, 320), 3)  # with AVX-512
    assert not serves((1, 8, 7, 7, 64), 7, torch.bfloat16)
    assert not serves((1, 2, 7, 7, 20), 3, torch.bfloat16)  # no whole number of vectors
    across = torch.empty(1, 64, 8, 7, 7, dtype=torch.bfloat16).permute(0, 2, 3, 4, 1)
    assert not dwconv3d_native.serves_cpu(across, (3, 3, 3))

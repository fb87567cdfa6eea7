"""What only a GPU can show; `make gpu` runs it."""

import pytest
import torch

from tests.check import assert_matches
from uniformer.configs import UniFormerConfig
from uniformer.local_block import LocalBlock
from uniformer_kernels import attention, backend, dwconv3d
from uniformer_kernels.attention import attention_ref

dwconv3d_norm_triton = pytest.importorskip("uniformer_kernels.dwconv3d_norm_triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize(("k", "C", "size"), [(5, 64, 56), (5, 128, 28), (3, 320, 14), (3, 512, 7)])
def test_a_thousand_repetitions_are_equal_to_the_bit(name, k, C, size):
    """A race shows as a difference now and then."""
    x = torch.randn(2, 8, size, size, C, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(C, 1, k, k, k, device="cuda", requires_grad=True)
    dy = torch.randn_like(x)
    with backend(name):

        def once():
            y = dwconv3d(x, weight, residual=True)
            return [y, *torch.autograd.grad(y, (x, weight), dy)]

        first = once()
        different = torch.zeros((), device="cuda", dtype=torch.int64)
        for _ in range(1000):
            for now, then in zip(once(), first, strict=True):
                different += (now != then).sum()
    assert int(different) == 0


@pytest.mark.parametrize(("C", "size"), [(320, 14), (512, 7)])
def test_convolution_and_norm_are_equal_to_the_bit(C, size):
    """Its threads read what others of the program have stored."""
    x = torch.randn(32, 8, size, size, C, device="cuda", dtype=torch.bfloat16)
    weight, *rest = (torch.randn(s, device="cuda") for s in ((C, 1, 3, 3, 3), (C,), (C,), (C,)))
    assert dwconv3d_norm_triton.in_one_pass(x, (3, 3, 3))
    args = (x, weight, rest[0], True, rest[1], rest[2], 1e-6, x.dtype)
    first, different = dwconv3d_norm_triton.fwd(*args), torch.zeros((), device="cuda").long()
    for _ in range(1000):
        for now, then in zip(dwconv3d_norm_triton.fwd(*args), first, strict=True):
            different += (now != then).sum()
    assert int(different) == 0


@pytest.mark.parametrize(("C", "size"), [(64, 56), (128, 28)])
def test_local_blocks_are_equal_to_the_bit(C, size):
    """All of its kernels, at the network's widths, 200 times over."""
    block = LocalBlock(UniFormerConfig(), C, 0.0).cuda().eval()
    for norm in (block.norm1, block.norm2):
        norm.running_mean = norm.running_var = None  # statistics of the batch, and none kept
    x = torch.randn(2, 8, size, size, C, device="cuda", requires_grad=True)
    dy = torch.randn_like(x)

    def once():
        with torch.autocast("cuda", torch.bfloat16):
            y = block(x)
        return [y, *torch.autograd.grad(y, (x, *block.parameters()), dy)]

    first, different = once(), torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(200):
        for now, then in zip(once(), first, strict=True):
            different += (now != then).sum()
    assert int(different) == 0


@pytest.mark.parametrize(("N", "h", "d"), [(1568, 5, 64), (392, 8, 64), (1568, 8, 28)])
def test_attention_is_equal_to_the_bit(N, h, d):
    qkv = torch.randn(4, N, 3 * h * d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dout = torch.randn(4, N, h * d, device="cuda", dtype=torch.bfloat16)
    with backend("triton"):

        def once():
            out = attention(qkv, h)
            return [out, *torch.autograd.grad(out, qkv, dout)]

        first, different = once(), torch.zeros((), device="cuda", dtype=torch.int64)
        for _ in range(1000):
            for now, then in zip(once(), first, strict=True):
                different += (now != then).sum()
    assert int(different) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "d"), [(49, 64), (196, 28), (392, 64), (784, 32), (1568, 64)])
def test_attention_in_16_bits_errs_no_more_than_the_formula(N, d, dtype):
    qkv = torch.randn(2, N, 3 * 2 * d, device="cuda", dtype=dtype)
    with backend("triton"):
        assert_matches(lambda x: attention(x, 2), lambda x: attention_ref(x, 2), [qkv])


def test_attention_over_25088_tokens():
    """All tokens of the first stage, of the paper's GGGG ablation: no N x N tensor would fit."""
    qkv = torch.randn(1, 25088, 3 * 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    with backend("triton"):
        attention(qkv, 1).sum().backward()
    assert torch.cuda.max_memory_allocated() < 2 * 2**30
    want = attention_ref(qkv[:, :].detach().float()[:, ::49], 1)  # and a part of it is right
    got = attention(qkv.detach()[:, ::49], 1)
    torch.testing.assert_close(got.float(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("k", [3, 5])
def test_more_elements_than_31_bits_count(name, k):
    """The last clip of a batch beyond 2^31 elements is what it is alone, and so are gradients."""
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free memory")
    B, C, size = 85, 64, 224  # 85 x 8 x 224 x 224 x 64 = 2.18e9
    x = torch.zeros(B, 8, size, size, C, device="cuda", dtype=torch.bfloat16)
    x[-1].normal_()
    weight = torch.randn(C, 1, k, k, k, device="cuda", requires_grad=True)

    def results(x):
        y = dwconv3d(x.requires_grad_(), weight)
        return y[-1:], *torch.autograd.grad(y, (x, weight), x.detach())

    with backend(name):
        y, dx, dw = results(x)
        alone_y, alone_dx, alone_dw = results(x.detach()[-1:].clone())
    torch.testing.assert_close(y, alone_y)
    torch.testing.assert_close(dx[-1:], alone_dx)
    torch.testing.assert_close(dw, alone_dw, rtol=1e-3, atol=1e-3 * float(alone_dw.abs().max()))

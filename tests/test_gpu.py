"""What only a GPU can show; `make gpu` runs it."""

import pytest
import torch

from uniformer.configs import UniFormerConfig
from uniformer.local_block import LocalBlock
from uniformer_kernels import backend, dwconv3d

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


@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("k", [3, 5])
def test_more_elements_than_31_bits_count(name, k):
    """The last clip of a batch beyond 2^31 elements is what it is alone."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free memory")
    B, C, size = 85, 64, 224  # 85 x 8 x 224 x 224 x 64 = 2.18e9
    x = torch.zeros(B, 8, size, size, C, device="cuda", dtype=torch.bfloat16)
    x[-1].normal_()
    weight = torch.randn(C, 1, k, k, k, device="cuda")
    with backend(name), torch.no_grad():
        torch.testing.assert_close(dwconv3d(x, weight)[-1:], dwconv3d(x[-1:].clone(), weight))

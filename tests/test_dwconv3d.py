import pytest
import torch
import torch.nn.functional as F

from tests.check import assert_matches
from uniformer_kernels import dwconv3d


def as_ncthw(x, weight, bias):
    padding = [k // 2 for k in weight.shape[2:]]
    y = F.conv3d(x.permute(0, 4, 1, 2, 3).contiguous(), weight, bias, 1, padding, 1, x.shape[-1])
    return y.permute(0, 2, 3, 4, 1)


# The DPE; the affinity; unequal edges; a single token; one channel.
@pytest.mark.parametrize(("shape", "kernel"), [
    ((2, 4, 6, 5, 8), (3, 3, 3)),
    ((1, 3, 7, 6, 16), (5, 5, 5)),
    ((2, 3, 5, 4, 3), (1, 3, 7)),
    ((1, 1, 1, 1, 4), (9, 9, 9)),
    ((2, 2, 3, 3, 1), (3, 1, 3)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("residual", [False, True])
def test_matches_a_grouped_convolution(shape, kernel, residual, device):
    C = shape[-1]
    inputs = [torch.randn(s, device=device) for s in (shape, (C, 1, *kernel), (C,))]

    def expected(x, weight, bias):
        return as_ncthw(x, weight, bias) + (x if residual else 0)

    assert_matches(lambda *a: dwconv3d(*a, residual=residual), expected, inputs)


def test_channels_last_in_and_out_without_a_copy(device):
    y = dwconv3d(torch.randn(2, 3, 4, 5, 8, device=device), torch.randn(8, 1, 3, 3, 3))
    assert y.is_contiguous()


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

"""The kernels of both gradients agree with PyTorch and with one another, whichever serves."""

import pytest
import torch

from tests.check import assert_matches
from uniformer_kernels import backend
from uniformer_kernels.dwconv3d import dwconv3d, dwconv3d_ref

op = pytest.importorskip("uniformer_kernels.dwconv3d_bwd_triton")
GPU = torch.cuda.is_available()
TILES = {"NH": 2}  # asks for the kernel of tiles


def inputs(shape, kernel, device):
    """dy, x and weight."""
    dy, x = torch.randn(2, *shape, device=device)
    return dy, x, torch.randn(shape[-1], 1, *kernel, device=device)


def truth(dy, x, weight, residual):
    """dx, and gradients as (taps + 1, C), in fp64."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    bias = weight.new_zeros(len(weight)).requires_grad_()
    y = dwconv3d_ref(x, weight, bias, residual=residual)
    dx, dw, db = torch.autograd.grad(y, (x, weight, bias), dy.double())
    return dx, torch.cat([dw.flatten(1).t(), db[None]])


def assert_close(got, want):
    scale = float(want.abs().max())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6 * scale)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 5, 5), (5, 1, 1), (3, 1, 5)], ids=str)
@pytest.mark.parametrize("shape", [
    (1, 1, 1, 1, 1),  # a single number
    (2, 2, 3, 9, 5),  # fewer frames than the ring; W past a run
    (1, 7, 2, 14, 9),  # two whole runs
    (3, 3, 11, 3, 68),  # C past a block, more rows than lanes
], ids=str)  # fmt: skip
@pytest.mark.parametrize("residual", [False, True])
def test_one_pass_makes_both_gradients(shape, kernel, residual, device):
    dy, x, weight = inputs(shape, kernel, device)
    for got, want in zip(
        op.bwd(dy, x, weight, residual), truth(dy, x, weight, residual), strict=True
    ):
        assert_close(got, want)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (5, 5, 5), (7, 3, 5)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 4, 9, 5), (1, 5, 9, 7, 36)], ids=str)
def test_the_weights_gradient_is_the_same_in_a_walk_and_in_tiles(shape, kernel, device):
    assert op.walks(kernel, shape[3])
    dy, x, weight = inputs(shape, kernel, device)
    want = truth(dy, x, weight, False)[1]
    assert_close(op.bwd_weight(dy, x, weight), want)
    assert_close(op.bwd_weight(dy, x, weight, tuned=TILES), want)


def test_which_kernel_serves():
    """Those of the network in a walk; of its ablation only what has room for its sums."""
    assert [op.in_one_pass((k,) * 3, 56) for k in (1, 3, 5)] == [True, True, False]
    assert [op.walks((k,) * 3, 56) for k in (3, 5, 7, 9)] == [True, True, False, False]


def test_shares_of_several_programs_add_up(device, monkeypatch):
    """On one processor of a GPU and on many; each share is of several groups of tiles."""
    dy, x, weight = inputs((5, 2, 9, 9, 8), (3, 3, 3), device)
    want = truth(dy, x, weight, True)
    for processors in (1, 3):
        monkeypatch.setattr(op._runtime, "multiprocessors", lambda x, n=processors: n)
        config = op.bwd_config(x.shape, 8, 8, (3, 3, 3), processors)
        lanes = config.arguments["BLOCK_P"]
        assert config.grid[1] > 1
        assert config.arguments["tiles"] > config.grid[1] * lanes or processors == 3
        for got, w in zip(op.bwd(dy, x, weight, True), want, strict=True):
            assert_close(got, w)


def test_any_strides_come_in(device):
    """Columns, rows, frames and clips anywhere, dy without strides, channels apart."""
    dy, x, weight = inputs((2, 3, 4, 9, 8), (3, 3, 3), device)
    apart = torch.zeros(3, 3, 9, 8, 16, device=device).permute(1, 0, 3, 2, 4)[:2, :, :4, :, 4:12]
    apart.copy_(x)
    spread = torch.zeros(2, 3, 4, 9, 16, device=device)[..., ::2].copy_(dy)
    want = op.bwd(dy, x, weight, True)
    for got, w in zip(op.bwd(spread, apart, weight, True), want, strict=True):
        assert torch.equal(got, w)
    one = torch.ones((), device=device).expand(x.shape)
    want = op.bwd(one.contiguous(), x, weight, True)
    for got, w in zip(op.bwd(one, x, weight, True), want, strict=True):
        assert torch.equal(got, w)


@pytest.mark.skipif(GPU, reason="the sparse file is the CPU's memory")
@pytest.mark.parametrize("axis", [0, 1], ids=["clips", "frames"])
def test_addresses_beyond_31_bits(axis, tmp_path):
    """Clips or frames 2^30 elements apart, three of them."""
    far, shape = 2**30, [1, 1, 2, 3, 8]
    shape[axis] = 3
    strides = [48, 48, 24, 8, 1]
    strides[axis] = far
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * far + 4096)
    dy, x, weight = inputs(shape, (3, 3, 3), "cpu")
    distant = memory.as_strided(shape, strides).copy_(x)
    for got, want in zip(
        op.bwd(dy, distant, weight, True), op.bwd(dy, x, weight, True), strict=True
    ):
        assert torch.equal(got, want)
    distant.copy_(dy)
    for got, want in zip(
        op.bwd(distant, x, weight, True), op.bwd(dy, x, weight, True), strict=True
    ):
        assert torch.equal(got, want)


def test_what_a_launch_leaves_out_would_be_seen(device):
    """Memory is NaN before (`conftest.py`); every element of dx and of the sums is written."""
    dy, x, weight = inputs((2, 3, 5, 10, 20), (3, 3, 3), device)
    for got in op.bwd(dy, x, weight, True):
        assert torch.isfinite(got).all()


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_is_frozen_is_not_made(frozen, device, monkeypatch):
    dy, x, weight = inputs((1, 2, 3, 7, 8), (3, 3, 3), device)
    monkeypatch.setattr(op, "bwd", None)  # that would make both
    leaf = (weight if frozen == "x" else x).requires_grad_()
    with backend("triton"):
        (got,) = torch.autograd.grad(dwconv3d(x, weight), leaf, dy)
    dx, grads = truth(dy, x.detach(), weight.detach(), False)
    assert_close(got, grads[:-1].t().view_as(weight) if frozen == "x" else dx)


def test_half_precision_errs_no_more_than_pytorch(device):
    tensors = [t.half() for t in inputs((2, 3, 5, 7, 8), (3, 3, 3), device)[1:]]
    with backend("triton"):
        assert_matches(
            lambda x, w: dwconv3d(x, w, residual=True),
            lambda x, w: dwconv3d_ref(x, w, residual=True), tensors,
        )  # fmt: skip

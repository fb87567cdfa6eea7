"""The C++ attention of the CPU: numbers, extremes, strides, and what it leaves to PyTorch."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tests.check import run
from tests.test_attention import matches
from uniformer_kernels import attention, attention_native, backend
from uniformer_kernels.attention import _bwd, _fwd, attention_ref

SERVED = {
    dtype: attention_native.why_not(torch.zeros(1, 1, 1, 48, dtype=dtype)) is None
    for dtype in (torch.bfloat16, torch.float32)
}
NATIVE = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(dtype, marks=pytest.mark.skipif(not served, reason="not served here"))
        for dtype, served in SERVED.items()
    ],
    ids=str,
)


# A token; queries and keys beyond a tile, a step, a block, in one group of keys and in several;
# heads of all widths, and more of them than are taken at a time.
@NATIVE
@pytest.mark.parametrize(
    ("B", "N", "h", "d"),
    [
        (1, 1, 1, 16),
        (2, 7, 3, 32),
        (1, 57, 2, 48),
        (2, 65, 2, 64),
        (1, 196, 5, 64),
        (1, 600, 1, 32),
        (3, 131, 1, 16),
        (1, 263, 3, 48),
        (9, 151, 2, 64),
        (13, 17, 5, 16),
    ],
)
def test_native_matches_the_formula(dtype, B, N, h, d):
    qkv = torch.randn(B, N, 3 * h * d).to(dtype)
    matches(lambda x: attention(x, h), lambda x: attention_ref(x, h), [qkv])


@pytest.mark.parametrize(
    ("shape", "dtype", "why"),
    [
        ((1, 8, 2, 24), torch.float32, "channels"),
        ((1, 49, 2, 32), torch.float32, "33 to 55 tokens"),
        ((1, 8, 2, 32), torch.float16, "bf16 and fp32"),
        ((0, 8, 2, 32), torch.float32, "bf16 and fp32"),
    ],
)
def test_what_is_left_to_pytorch(shape, dtype, why):
    assert why in attention_native.why_not(torch.zeros(shape, dtype=dtype))


@NATIVE
@pytest.mark.parametrize("N", [392, 784, 1568])
def test_as_exact_as_pytorchs_fused_attention_at_the_networks_sizes(dtype, N):
    def fused(qkv):
        q, k, v = qkv.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def results(fn, computed_in):
        y, dqkv = run(fn, [qkv.to(computed_in)], dout.to(computed_in))
        return y, *dqkv.chunk(3, dim=-1)  # y, dq, dk, dv

    qkv, dout = torch.randn(1, N, 3 * 128).to(dtype), torch.randn(1, N, 128).to(dtype)
    ours = results(lambda x: attention(x, 2), dtype)
    true = results(lambda x: attention_ref(x, 2), torch.float64)
    for got, want, theirs in zip(ours, true, results(fused, dtype), strict=True):
        assert (got - want).abs().max() <= 1.5 * (theirs - want).abs().max()


@NATIVE
@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale(scale, dtype):
    qkv = torch.randn(2, 83, 3 * 64).to(dtype)
    matches(lambda x: attention(x, 2, scale=scale), lambda x: attention_ref(x, 2, scale), [qkv])


@NATIVE
def test_a_backward_pass_outside_of_the_forwards_backend(dtype):
    qkv = torch.randn(1, 20, 96).to(dtype).requires_grad_()
    (want,) = torch.autograd.grad(attention(qkv, 2).sum(), qkv)
    out = attention(qkv, 2).sum()
    with backend("reference"):
        (got,) = torch.autograd.grad(out, qkv)
    assert torch.equal(got, want)


@NATIVE
@pytest.mark.parametrize("value", [1e4, -1e4, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("part", [0, 1, 2], ids=["q", "k", "v"])
def test_extreme_values(part, value, dtype):
    """Large scores stay finite; what is not a number shows, and only where it belongs."""
    qkv = torch.randn(2, 70, 3, 2, 32).to(dtype)
    qkv[:, :, 0] = qkv[:, :, 0].abs()  # keys of -inf have scores of -inf: no weight, and no NaN
    qkv[0, 3, part, 1] = value
    qkv, dout = qkv.flatten(2), torch.randn(2, 70, 64).to(dtype)
    got = run(lambda x: attention(x, 2), [qkv], dout)
    want = run(lambda x: attention_ref(x, 2), [qkv.double()], dout.double())
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g.isnan(), w.isnan())
        atol = 0.02 * w[w.isfinite()].abs().max().item()
        torch.testing.assert_close(g.double(), w, rtol=0.02, atol=atol, equal_nan=True)


@NATIVE
def test_scores_far_below_0(dtype):
    """A key that is not there, with a score of 0, would have a weight of e^1000."""
    qkv = torch.randn(1, 70, 3 * 32).to(dtype)
    qkv[..., :32] += 20
    qkv[..., 32:64] -= 20
    matches(lambda x: attention(x, 1), lambda x: attention_ref(x, 1), [qkv])


@NATIVE
def test_a_score_beyond_all_others_keeps_its_gradient(dtype):
    """Rounded otherwise than in forward, it would differ from its own logarithm of the sum."""
    qkv = torch.randn(1, 70, 3 * 32).to(dtype)
    qkv[0, :, :32] *= 1e30
    dout = torch.randn(1, 70, 32).to(dtype)
    _, got = run(lambda x: attention(x, 1, 0.3), [qkv], dout)
    _, want = run(lambda x: attention_ref(x, 1, 0.3), [qkv.double()], dout.double())
    torch.testing.assert_close(got[..., 64:].double(), want[..., 64:], rtol=0.02, atol=0.02)


@NATIVE
def test_gradients_are_the_same_every_time(dtype):
    """On any number of threads, and with nothing left of the call before."""
    sizes = [(1, 300, 2, 64), (3, 65, 7, 32)]
    inputs = [(torch.randn(B, N, 3 * h * d).to(dtype), h) for B, N, h, d in sizes]
    douts = [torch.randn(B, N, h * d).to(dtype) for B, N, h, d in sizes]
    first = [_gradient(x, h, dout) for (x, h), dout in zip(inputs, douts, strict=True)]
    _gradient(torch.full((2, 400, 3 * 320), float("nan")).to(dtype), 5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        again = [_gradient(x, h, dout) for (x, h), dout in zip(inputs, douts, strict=True)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def _gradient(qkv, h, dout=None):
    out, lse = attention_native.fwd(qkv, h, 0.2)
    return attention_native.bwd(out if dout is None else dout, qkv, out, lse, h, 0.2)


@NATIVE
def test_strides_of_what_backward_reads_do_not_matter(dtype):
    wide = torch.randn(3, 20, 3 * 2 * 64).to(dtype)
    for qkv in (wide[:, 1::2, 192:], wide.transpose(0, 1)[..., :192], wide[..., ::2]):
        B, N, _ = qkv.shape
        for dout in (
            torch.randn(N, B, 100).to(dtype).transpose(0, 1)[..., 36:],
            torch.randn(B, N, 128).to(dtype)[..., ::2],
            torch.randn(B, 1, 64).to(dtype).expand(B, N, 64),
            torch.randn(64).to(dtype).expand(B, N, 64),
            torch.ones(()).to(dtype).expand(B, N, 64),
        ):
            assert not dout.is_contiguous()
            got = _gradient(qkv, 2, dout)
            assert torch.equal(got, _gradient(qkv.contiguous(), 2, dout.contiguous()))


@NATIVE
def test_no_memory_is_an_error(monkeypatch, dtype):
    qkv, dout, lse = torch.zeros(1, 2, 48).to(dtype), torch.zeros(1, 2, 16), torch.zeros(1, 2, 1)
    monkeypatch.setattr(attention_native, "native", lambda *_: lambda *_: 1)
    with pytest.raises(MemoryError, match="keys and values"):
        attention_native.fwd(qkv, 1, 0.2)
    with pytest.raises(MemoryError, match="gradient"):
        attention_native.bwd(dout, qkv, dout, lse, 1, 0.2)


@NATIVE
def test_slices_and_expanded_gradients(dtype):
    qkv = torch.randn(2, 12, 2 * 3 * 64).to(dtype)
    for view in (qkv[:, ::2, :192], qkv[:, 3:, 192:], qkv.transpose(0, 1)[..., :192]):
        leaf, other = (view.detach().requires_grad_() for _ in range(2))
        attention(leaf, 2).sum().backward()
        attention_ref(other, 2).sum().backward()
        torch.testing.assert_close(leaf.grad, other.grad, rtol=0.05, atol=0.05)


@NATIVE
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of vmap
def test_opcheck_and_compile(dtype):
    qkv = torch.randn(2, 9, 3 * 64).to(dtype).requires_grad_()
    torch.library.opcheck(_fwd.op, (qkv, 2, 0.2))
    out, lse = _fwd(qkv.detach(), 2, 0.2)
    torch.library.opcheck(_bwd.op, (torch.randn_like(out), qkv.detach(), out, lse, 2, 0.2))
    eager = partial(attention, num_heads=2)
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(qkv), eager(qkv))
    assert torch.equal(*(torch.autograd.grad(fn(qkv).sum(), qkv)[0] for fn in (compiled, eager)))
    mapped = torch.func.vmap(lambda x: attention(x, 2))(qkv.detach()[None])
    torch.testing.assert_close(mapped[0], attention(qkv, 2).detach(), rtol=0.05, atol=0.05)

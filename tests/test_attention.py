from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.check import assert_matches, run
from uniformer_kernels import _runtime, attention, attention_native, attention_qkv, backend
from uniformer_kernels.attention import (
    _bwd,
    _fwd,
    _measured_faster,
    _qkv,
    _qkv_ref,
    attention_ref,
)

# dout * out - dp is a difference of sums that the formula makes in one order and a fused kernel, of
# PyTorch or ours, in two. 3 times the formula's error, as FlashAttention allows its own.
matches = partial(assert_matches, slack=3.0)


# Triton's interpreter computes with numpy, which warns of what GPUs do silently.
WITHOUT_WARNINGS = pytest.mark.filterwarnings(
    "ignore:All-NaN slice", "ignore:invalid value", "ignore:overflow", "ignore:divide by zero"
)


@pytest.fixture(params=["auto", "triton"])
def chosen(request):
    with backend(request.param):
        yield request.param


SHAPES = [
    (1, 3, 1, 8),  # fewer channels than a product takes
    (2, 7, 3, 16),  # fewer tokens than channels
    (1, 49, 8, 64),  # stage 4 of a frame: past one tile
    (3, 8, 2, 32),  # short sequences, as of attention over time
    (1, 70, 2, 28),  # the light models' channels: no power of 2
    (1, 33, 1, 128),  # the widest, and one token in the last tile
]


@pytest.mark.parametrize(("B", "N", "h", "d"), SHAPES)
def test_matches_the_formula(B, N, h, d, device, chosen):
    qkv = torch.randn(B, N, 3 * h * d, device=device)
    matches(lambda x: attention(x, h), lambda x: attention_ref(x, h), [qkv])


def test_one_token_attends_to_itself(device, chosen):
    """The gradients of q and k are then differences of equal sums, made in two orders."""
    qkv = torch.randn(2, 1, 3 * 8, device=device, requires_grad=True)
    out, dout = attention(qkv, 1), torch.randn(2, 1, 8, device=device)
    (grad,) = torch.autograd.grad(out, qkv, dout)
    torch.testing.assert_close(out, qkv[..., 16:])
    torch.testing.assert_close(grad[..., 16:], dout)
    assert grad[..., :16].abs().max() < 1e-5


@pytest.mark.parametrize(("N", "M"), [(5, 40), (70, 3)])
def test_apart_matches_the_formula(N, M, device, chosen):
    """q, k and v in tensors of their own, with more or fewer keys than queries."""
    q, k, v = (torch.randn(2, n, 3, 16, device=device) for n in (N, M, M))
    matches(attention_qkv, lambda *qkv: _qkv_ref(*qkv, None, 0.0), [q, k, v])


def test_fp16(device, chosen):
    qkv = torch.randn(2, 50, 3 * 2 * 32, device=device, dtype=torch.float16)
    matches(lambda x: attention(x, 2), lambda x: attention_ref(x, 2), [qkv])


# The tokens of UniFormer's stages at 224 x 224, 8 to 16 frames; the interpreter takes too long.
@pytest.mark.parametrize("N", [7, 49, 196, 392, 784, 1568])
def test_matches_the_formula_at_the_networks_sizes(N, device):
    qkv = torch.randn(1, N, 3 * 64, device=device)
    matches(lambda x: attention(x, 1), lambda x: attention_ref(x, 1), [qkv])


def test_the_formula_is_the_papers():
    """Equation 7, written out with loops over heads and tokens."""
    h, d, N = 2, 4, 5
    qkv = torch.randn(1, N, 3 * h * d, dtype=torch.float64)
    q, k, v = qkv[0].view(N, 3, h, d).unbind(1)
    want = torch.zeros(N, h * d, dtype=torch.float64)
    for n in range(h):
        for i in range(N):
            scores = torch.stack([q[i, n] @ k[j, n] * d**-0.5 for j in range(N)])
            affinity = scores.exp() / scores.exp().sum()
            want[i, n * d : (n + 1) * d] = sum(affinity[j] * v[j, n] for j in range(N))
    torch.testing.assert_close(attention(qkv, h)[0], want)
    with backend("reference"):
        torch.testing.assert_close(attention(qkv, h)[0], want)


def test_scale_and_dropout_are_honoured(device, chosen):
    qkv = torch.randn(1, 6, 24, device=device)
    for scale in (1.0, -0.5, 0.0):
        want = attention_ref(qkv, 2, scale)
        torch.testing.assert_close(attention(qkv, 2, scale=scale), want)
        assert not torch.allclose(want, attention(qkv, 2))
    dropped = attention(qkv.expand(4000, -1, -1), 2, dropout=0.5)
    assert not torch.allclose(dropped[0], dropped[1])
    torch.testing.assert_close(dropped.mean(0), attention(qkv, 2)[0], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scores_that_overflow_16_bits_stay_finite(dtype, device, chosen):
    """The official code scales after the product: 300 * 300 * 16 is past fp16's largest."""
    qkv = torch.randn(1, 20, 3 * 16, device=device)
    qkv[:, :, :32] *= 300
    qkv = qkv.to(dtype).requires_grad_()
    out = attention(qkv, 1)
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    want = attention_ref(qkv.double(), 1)
    torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=1e-2)
    assert grad.isfinite().all()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@WITHOUT_WARNINGS
def test_what_is_not_a_number_shows_where_it_belongs(value, device):
    qkv = torch.randn(2, 40, 3 * 16, device=device)
    qkv[0, 3, :16] = value  # a query
    with backend("triton"):
        got = attention(qkv, 1)
    assert got[0, 3].isnan().all()
    assert got.isnan().sum() == 16


@WITHOUT_WARNINGS
def test_gradients_where_all_scores_are_far_below_0(device, chosen):
    """exp(-lse) overflows then, and must not meet the keys beyond the last."""
    qkv = torch.randn(1, 5, 3 * 16, device=device)
    qkv[..., 0], qkv[..., 16] = 15.0, -15.0
    leaf, other = (qkv.clone().requires_grad_() for _ in range(2))
    attention(leaf, 1, 1.0).square().sum().backward()
    attention_ref(other, 1, 1.0).square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-3, atol=1e-3)


@WITHOUT_WARNINGS
def test_keys_that_no_query_attends_to(device, chosen):
    """A score of minus infinity for all of a tile's keys is a weight of 0, not NaN."""
    qkv = torch.randn(1, 50, 3 * 16, device=device)
    qkv[..., :16] = torch.eye(16, device=device)[0]
    qkv[:, :40, 16] = -float("inf")
    torch.testing.assert_close(attention(qkv, 1), attention_ref(qkv, 1))


def test_strides_and_expanded_gradients(device, chosen):
    qkv = torch.randn(2, 12, 2 * 3 * 32, device=device)
    for view in (qkv[:, ::2, :96], qkv[:, 3:, 96:], qkv.transpose(0, 1)[..., :96], qkv[:1, :, ::2]):
        leaf, other = (view.detach().requires_grad_() for _ in range(2))
        attention(leaf, 2).sum().backward()
        attention_ref(other, 2).sum().backward()
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-5)
    q, k, v = (torch.randn(2, 3, 9, 16, device=device).transpose(1, 2) for _ in range(3))
    torch.testing.assert_close(attention_qkv(q, k, v), _qkv_ref(q, k, v, None, 0.0))
    k = k.contiguous()  # of other strides than v
    torch.testing.assert_close(attention_qkv(q, k, v), _qkv_ref(q, k, v, None, 0.0))


def test_nothing_of_size_n_squared_is_kept_and_dqkv_is_packed(device):
    qkv = torch.randn(1, 80, 3 * 2 * 16, device=device, requires_grad=True)
    kept = []
    with (
        backend("triton"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        out = attention(qkv, 2)
    assert sorted(t.numel() for t in kept) == sorted([qkv.numel(), out.numel(), 80 * 2])


def test_twice_gives_the_same_bits(device, chosen):
    def run():
        torch.manual_seed(0)
        qkv = torch.randn(2, 75, 3 * 2 * 16, device=device, requires_grad=True)
        out = attention(qkv, 2)
        return out, *torch.autograd.grad(out.square().sum(), qkv)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_operators_pass_opcheck_and_compile(device):
    qkv = torch.randn(2, 9, 3 * 2 * 16, device=device, requires_grad=True)
    q, k, v = (torch.randn(2, 9, 2, 16, device=device, requires_grad=True) for _ in range(3))
    with backend("triton"):
        torch.library.opcheck(_fwd.op, (qkv, 2, 0.2))
        torch.library.opcheck(_qkv.op, (q, k, v, 0.2))
        with torch.no_grad():
            out, lse = _fwd(qkv, 2, 0.2)
            torch.library.opcheck(_bwd.op, (out, qkv.detach(), out, lse, 2, 0.2))
        compiled = torch.compile(lambda x: attention(x, 2), backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(qkv), attention(qkv, 2))
        got = torch.autograd.grad(compiled(qkv).sum(), qkv)
        assert torch.equal(got[0], torch.autograd.grad(attention(qkv, 2).sum(), qkv)[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own use of it
def test_forward_mode_runs_on_the_formula(device):
    qkv, tangent = (torch.randn(1, 5, 3 * 16, device=device) for _ in range(2))
    got = torch.func.jvp(lambda x: attention(x, 1), (qkv,), (tangent,))
    want = torch.func.jvp(lambda x: attention_ref(x, 1), (qkv,), (tangent,))
    torch.testing.assert_close(got, want)


def test_operations_are_counted(device):
    qkv = torch.randn(2, 10, 3 * 2 * 16, device=device, requires_grad=True)
    with backend("triton"), FlopCounterMode(display=False) as counter:
        attention(qkv, 2).sum().backward()
    assert counter.get_total_flops() == (4 + 10) * 2 * 10 * 10 * 32


def test_a_table_decides_on_a_gpu(monkeypatch):
    """Ours where it was measured to be the faster one, by direction."""
    q = torch.empty(1, 49, 2, 16, device="meta").requires_grad_()
    row = {"backend": "triton", "ms": 1.0}
    table = {("attention", ("fwd", torch.float32, 49, 16)): row}
    monkeypatch.setattr(_runtime, "_tuned_on", lambda device: table)
    assert not _measured_faster(q, q)
    with torch.no_grad():
        assert _measured_faster(q, q)
        assert not _measured_faster(q, q[:, :5])


def test_what_triton_does_not_serve_is_announced(device, caplog):
    with backend("triton"):
        attention(torch.randn(1, 3, 3 * 18, device=device), 1)
        attention(torch.randn(1, 3, 3 * 16, device=device), 1, dropout=0.25)
    assert "heads of 18 channels" in caplog.text
    assert "probability 0.25" in caplog.text


# --- C++ on a CPU ---------------------------------------------------------------------

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
    class Full:
        uniformer_attention_bwd = uniformer_attention_fwd = staticmethod(lambda *_: 1)

    qkv, dout, lse = torch.zeros(1, 2, 48).to(dtype), torch.zeros(1, 2, 16), torch.zeros(1, 2, 1)
    monkeypatch.setattr(attention_native, "library", lambda name: Full)
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


@pytest.mark.parametrize("shape", [(2, 4, 25), (2, 4, 3, 8), (2, 4, 0)], ids=str)
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="qkv must be"):
        attention(torch.zeros(shape), 2)


@pytest.mark.parametrize(("change", "complaint"), [
    ({"q": torch.zeros(2, 4, 16)}, "q must be"),
    ({"k": torch.zeros(2, 5, 2, 8)}, "k must be"),
    ({"v": torch.zeros(2, 5, 1, 16)}, "v must be"),
    ({"k": torch.zeros(2, 5, 1, 16), "v": torch.zeros(1, 5, 1, 16)}, "k must be"),
    ({"v": torch.zeros(2, 4, 1, 16, dtype=torch.float64)}, "v must be"),
    ({"q": torch.zeros(2, 4, 1, 16, dtype=torch.int64)}, "floating point"),
    ({"dropout": 1.5}, "dropout must be"),
], ids=str)  # fmt: skip
def test_bad_input_apart_is_refused(change, complaint):
    good = {name: torch.zeros(2, 4, 1, 16) for name in "qkv"}
    if "k" in change and change["k"].shape[-1] == 16:
        good["q"] = torch.zeros(1, 4, 1, 16)
    with pytest.raises(ValueError, match=complaint):
        attention_qkv(**(good | change))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="auto, reference"), backend("fastest"):
        pass

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.check import assert_matches
from uniformer_kernels import _runtime, attention, attention_qkv, backend
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


# --- What comes in --------------------------------------------------------------------


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

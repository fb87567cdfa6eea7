import pytest
import torch
import torch.nn.functional as F

from tests.check import assert_matches
from uniformer_kernels import attention, attention_native, backend
from uniformer_kernels.attention import _fwd, attention_ref


# One token; fewer tokens than channels; a stage-4 width with an odd number of tokens.
@pytest.mark.parametrize(("B", "N", "h", "d"), [(1, 1, 1, 8), (2, 7, 3, 16), (1, 49, 8, 64)])
def test_matches_the_formula(B, N, h, d, device):
    qkv = torch.randn(B, N, 3 * h * d, device=device)
    assert_matches(lambda x: attention(x, h), lambda x: attention_ref(x, h), [qkv])


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


def test_scale_and_dropout_are_honoured():
    qkv = torch.randn(1, 6, 24)
    assert not torch.allclose(attention(qkv, 2, scale=1.0), attention(qkv, 2))
    for path in ("auto", "reference"):
        with backend(path):
            assert not torch.allclose(attention(qkv, 2, dropout=0.5), attention(qkv, 2))


# --- C++ on a CPU ---------------------------------------------------------------------

NATIVE = pytest.mark.skipif(
    attention_native.why_not(torch.zeros(1, 1, 48, dtype=torch.bfloat16), 1) is not None,
    reason="this processor has no AVX512_BF16, or there is no compiler",
)


# A token; queries and keys beyond a tile, a step of keys, a block; heads of all widths.
@NATIVE
@pytest.mark.parametrize(
    ("B", "N", "h", "d"),
    [
        (1, 1, 1, 16),
        (2, 7, 3, 32),
        (1, 49, 2, 48),
        (2, 65, 2, 64),
        (1, 196, 5, 64),
        (1, 600, 1, 32),
    ],
)
def test_bf16_on_a_cpu(B, N, h, d):
    qkv = torch.randn(B, N, 3 * h * d).bfloat16()
    assert_matches(lambda x: attention(x, h), lambda x: attention_ref(x, h), [qkv])


@NATIVE
@pytest.mark.parametrize("N", [392, 784, 1568])
def test_bf16_at_the_networks_sizes_is_as_exact_as_pytorchs_fused_attention(N):
    qkv = torch.randn(1, N, 3 * 128).bfloat16()
    want = attention_ref(qkv.double(), 2)
    q, k, v = qkv.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    theirs = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    bound = 1.5 * (theirs - want).abs().max()
    assert (attention(qkv, 2) - want).abs().max() <= bound


@NATIVE
@pytest.mark.parametrize("value", [1e4, -1e4, float("inf"), float("nan")])
def test_extreme_scores(value):
    """Large scores stay finite; what is not a number shows, and only where it belongs."""
    qkv = torch.randn(2, 70, 3 * 32).bfloat16()
    qkv[0, 3, :32] = value  # a query
    got, want = attention(qkv, 1), attention_ref(qkv.double(), 1)
    assert torch.equal(got.isnan(), want.isnan())
    assert got.isnan().any() == (abs(value) != 1e4)
    torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.05, equal_nan=True)


@NATIVE
def test_slices_and_expanded_gradients():
    qkv = torch.randn(2, 12, 2 * 3 * 64).bfloat16()
    for view in (qkv[:, ::2, :192], qkv[:, 3:, 192:], qkv.transpose(0, 1)[..., :192]):
        leaf, other = (view.detach().requires_grad_() for _ in range(2))
        attention(leaf, 2).sum().backward()
        attention_ref(other, 2).sum().backward()
        torch.testing.assert_close(leaf.grad, other.grad, rtol=0.05, atol=0.05)


@NATIVE
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of vmap
def test_opcheck_and_compile():
    qkv = torch.randn(2, 9, 3 * 64).bfloat16().requires_grad_()
    torch.library.opcheck(_fwd.op, (qkv, 2, 0.2))
    compiled = torch.compile(lambda x: attention(x, 2), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(qkv), attention(qkv, 2))
    mapped = torch.func.vmap(lambda x: attention(x, 2))(qkv.detach()[None])
    torch.testing.assert_close(mapped[0], attention(qkv, 2).detach(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("shape", [(2, 4, 25), (2, 4, 3, 8)], ids=str)
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="qkv must be"):
        attention(torch.zeros(shape), 2)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="auto, reference"), backend("fastest"):
        pass

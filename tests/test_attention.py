import pytest
import torch

from tests.check import assert_matches
from uniformer_kernels import attention, backend
from uniformer_kernels.attention import attention_ref


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


@pytest.mark.parametrize("shape", [(2, 4, 25), (2, 4, 3, 8)], ids=str)
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="qkv must be"):
        attention(torch.zeros(shape), 2)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="auto, reference"), backend("fastest"):
        pass

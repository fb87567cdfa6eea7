"""The C++ forwards of pointwise and ffn: every tile, dtype, norm and way to share the work."""

import pytest
import torch
import torch.nn.functional as F

from uniformer_kernels import Norm, channel_stats, ffn, pointwise, products_native
from uniformer_kernels.ffn import ffn_ref
from uniformer_kernels.pointwise import pointwise_ref

DTYPES = (torch.float32, torch.bfloat16)
NONE = (None, None, None, 0.0, False)  # no norm


def served(dtype):
    x = torch.zeros(4, 8, dtype=dtype)
    return products_native.serves(x, dtype, x.new_zeros(8, 8))


NATIVE = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(d, marks=pytest.mark.skipif(not served(d), reason="not served here"))
        for d in DTYPES
    ],
    ids=str,
)


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Calls of the C++: what is tested here must not run elsewhere unseen."""
    calls = []
    for op in (products_native.pointwise, products_native.ffn):
        name = op.__name__

        def run(*args, op=op, name=name):
            calls.append(name)
            return op(*args)

        monkeypatch.setattr(products_native, name, run)
    return calls


def norms(x):
    """No norm, a BatchNorm and a LayerNorm of x."""
    C, like = x.shape[-1], {"dtype": x.dtype}
    gamma, beta = torch.randn(C, **like), torch.randn(C, **like)
    batch = Norm(channel_stats(x), gamma, beta, 1e-5, of_batch=False)
    return None, batch, Norm(None, gamma, beta, 1e-6, per_row=True)


def close(got, ref, *tensors):
    """As `check.assert_matches`, forward alone: twice plain PyTorch's error and one eps."""
    near, true = ref(*tensors), ref(*(t.double() for t in tensors))
    assert (got.shape, got.dtype) == (near.shape, near.dtype)
    bound = 2 * (near - true).abs().max() + torch.finfo(got.dtype).eps * true.abs().max()
    assert (got - true).abs().max() <= bound


def wide(norm):
    return norm and norm._replace(
        stats=None if norm.stats is None else norm.stats.double(),
        weight=norm.weight.double(), bias=norm.bias.double(),
    )  # fmt: skip


# Tokens: one, a vector and one more, a tile and one more, several chunks, a short last one. K: less
# than a vector, no whole vector, several chains, rows at distances that oust each other. N: a tile.
@NATIVE
@pytest.mark.parametrize(("clips", "tokens", "K", "N"), [
    (1, 1, 8, 8), (1, 17, 24, 16), (3, 16, 40, 8), (1, 49, 64, 72), (2, 33, 136, 24),
    (1, 97, 16, 960), (5, 101, 264, 8), (1, 57, 1024, 16), (1, 50, 2048, 8), (2, 700, 56, 64),
])  # fmt: skip
def test_pointwise_matches_the_formula(dtype, clips, tokens, K, N, counted):
    x = torch.randn(clips, tokens, K).to(dtype)
    weight, bias = (torch.randn(N, K) / K**0.5).to(dtype), torch.randn(N).to(dtype)
    residual, scale = torch.randn(clips, tokens, N).to(dtype), torch.arange(clips).float()
    for norm in norms(x):
        for b, s, r in ((bias, None, None), (None, scale, residual)):
            got = pointwise(x, weight, b, norm=norm, scale=s, residual=r)

            def formula(x, weight, bias, residual, norm=norm, s=s, with_bias=b is not None):
                norm = wide(norm) if x.dtype == torch.float64 else norm
                b = bias if with_bias else None
                r = None if with_bias else residual
                return pointwise_ref(x, weight, b, norm=norm, scale=s, residual=r)

            close(got, formula, x, weight, bias, residual)
    assert counted == ["pointwise"] * 6


@NATIVE
@pytest.mark.parametrize(("clips", "tokens", "C", "hidden"), [
    (1, 1, 8, 16), (2, 20, 24, 72), (1, 49, 40, 8), (1, 130, 64, 256), (3, 77, 128, 384),
    (1, 64, 512, 1024), (1, 801, 56, 168),
])  # fmt: skip
def test_ffn_matches_the_formula(dtype, clips, tokens, C, hidden, counted):
    x = torch.randn(clips, tokens, C).to(dtype)
    w1, w2 = (torch.randn(hidden, C) / C**0.5).to(dtype), torch.randn(C, hidden) / hidden**0.5
    b1, b2, scale = torch.randn(hidden), torch.randn(C), torch.arange(clips).float() + 0.5
    parameters = [w1, b1.to(dtype), w2.to(dtype), b2.to(dtype)]
    for norm in norms(x):
        for residual in (True, False):
            got = ffn(x, *parameters, norm=norm, scale=scale, residual=residual)

            def formula(x, *parameters, norm=norm, residual=residual):
                norm = wide(norm) if x.dtype == torch.float64 else norm
                return ffn_ref(x, *parameters, norm=norm, scale=scale, residual=residual)

            close(got, formula, x, *parameters)
    assert counted == ["ffn"] * 6


@pytest.mark.skipif(not served(torch.bfloat16), reason="not served here")
def test_autocast_rounds_what_is_multiplied_alone(counted):
    """The stream stays in fp32: x, norm, residual and result."""
    x, weight, residual = torch.randn(2, 30, 64), torch.randn(72, 64) / 8, torch.randn(2, 30, 72)
    w1, b1, w2, b2 = torch.randn(256, 64) / 8, torch.randn(256), torch.randn(64, 256) / 16, None
    for norm in norms(x):
        with torch.autocast("cpu", torch.bfloat16):
            plain = pointwise(x, weight, norm=norm)
            added = pointwise(x, weight, norm=norm, residual=residual)
            through = ffn(x, w1, b1, w2, b2, norm=norm, residual=True)
        assert (plain.dtype, added.dtype, through.dtype) == (torch.bfloat16, x.dtype, x.dtype)
        for got, want in (
            (plain, pointwise_ref(x, weight, norm=norm)),
            (added, pointwise_ref(x, weight, norm=norm, residual=residual)),
            (through, ffn_ref(x, w1, b1, w2, b2, norm=norm, residual=True)),
        ):
            torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=4e-2)
    assert len(counted) == 9


@NATIVE
def test_rows_far_apart_and_weights_turned_round(dtype, counted):
    """Rows of a wider tensor are read where they lie; what else is not contiguous is copied."""
    x = torch.randn(70, 100).to(dtype)[:, 3:43]
    weight, bias = torch.randn(40, 24).to(dtype).t(), torch.randn(48).to(dtype)[::2]
    residual = torch.randn(24, 70).to(dtype).t()
    got = products_native.pointwise(x, weight, bias, NONE, None, residual, dtype)
    close(got, lambda x, w, b, r: pointwise_ref(x, w, b, residual=r), x, weight, bias, residual)


def test_equal_channels_are_normalised_to_nothing(counted):
    """Their variance is that of the mean's rounding, of which eps leaves a thousandfold."""
    x = torch.linspace(1, 9, 50)[:, None].expand(50, 136)
    got = pointwise(x, torch.eye(136), norm=Norm(None, eps=1e-6, per_row=True))
    assert got.abs().max() < 1e-5


@NATIVE
def test_no_number_stays_in_its_row(dtype, counted):
    x = torch.randn(90, 64).to(dtype)
    x[7, 3], x[50, 9] = torch.nan, torch.inf
    w1, w2 = torch.randn(128, 64).to(dtype), torch.randn(64, 128).to(dtype)
    clean = torch.arange(90).remainder(43) != 7
    for norm in (None, norms(x[:5])[2]):
        for y in (pointwise(x, w1, norm=norm), ffn(x, w1, None, w2, None, norm=norm)):
            assert y[clean].isfinite().all()
            assert not y[~clean].isfinite().any()


@NATIVE
def test_gelu_from_end_to_end(dtype, counted):
    """One channel is the argument; identities around it."""
    h = torch.cat([torch.linspace(-9, 9, 3001), torch.tensor([-1e30, -40.0, 40.0, 1e30, 0.0])])
    x = torch.zeros(len(h), 8)
    x[:, 0] = h
    x, eye = x.to(dtype), torch.eye(8).to(dtype)
    y = ffn(x, eye, None, eye, None)[:, 0]
    want = F.gelu(x[:, 0].double())
    bound = 1e-6 + torch.finfo(dtype).eps * want.abs()
    assert ((y - want).abs() <= bound).all()
    assert (y[x[:, 0] < -6] == 0).all()
    torch.testing.assert_close(y[x[:, 0] > 6], x[x[:, 0] > 6, 0], rtol=0, atol=0)


@NATIVE
def test_the_slope_of_gelu(dtype):
    """More elements than a thread has in one go, the last of them no whole vector."""
    h = torch.cat([torch.linspace(-9, 9, 9001), torch.tensor([-1e30, -40.0, 40.0, 1e30, 0.0, 1.0])])
    h, dy = h.to(dtype), torch.randn(len(h)).to(dtype)
    wide = h.double().requires_grad_()
    want_y = F.gelu(wide)
    (want,) = torch.autograd.grad(want_y, wide, dy.double())
    y, dh = h.clone(), dy.clone()
    assert products_native.gelu_bwd_(y, dh)
    eps = torch.finfo(dtype).eps
    assert ((y - want_y).abs() <= 1e-6 + eps * want_y.abs()).all()
    assert ((dh - want).abs() <= 1e-6 * dy.abs() + eps * want.abs()).all()


@pytest.mark.skipif(not served(torch.bfloat16), reason="not served here")
@pytest.mark.parametrize(("M", "N"), [(0, 8), (1, 1), (5, 67), (403, 200)], ids=str)
def test_columns_are_added_up_in_fp32(M, N):
    """Fewer rows and columns than it takes at a time, and one more."""
    x = torch.randn(M, N).bfloat16() + 300
    got, want = products_native.column_sums(x), x.double().sum(0)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    assert got.dtype == torch.float32
    apart = x.new_zeros(M, 2 * N)[:, ::2].copy_(x)
    for left in (x.float(), x.half(), apart if M > 1 else x.double()):
        assert products_native.column_sums(left) is None


@NATIVE
@pytest.mark.parametrize("tokens", [40, 500])
def test_threads_do_not_change_a_bit(dtype, tokens, counted):
    x, weight = torch.randn(tokens, 320).to(dtype), torch.randn(640, 320).to(dtype)
    back, norm = torch.randn(320, 640).to(dtype), norms(x)[2]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((pointwise(x, weight, norm=norm), ffn(x, weight, None, back, None)))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(found[0] * 2, found[1] + found[2], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(("x", "weight", "dtype"), [
    ((9, 12), (8, 12), torch.float32),  # no multiples of 8
    ((9, 16), (12, 16), torch.float32),
    ((9, 16), (8, 16), torch.float16),
    ((9, 16), (8, 16), torch.float64),
], ids=str)  # fmt: skip
def test_what_is_left_to_the_library(x, weight, dtype, counted):
    x, weight = torch.randn(x).to(dtype), torch.randn(weight).to(dtype)
    got = pointwise(x, weight)
    torch.testing.assert_close(got, pointwise_ref(x, weight), rtol=1e-2, atol=1e-2)
    assert not counted


@pytest.mark.skipif(not served(torch.float32), reason="not served here")
def test_a_residual_in_sixteen_bits_is_added_to_products_in_fp32(counted):
    x, weight, residual = torch.randn(20, 16), torch.randn(24, 16), torch.randn(20, 24)
    residual = residual.bfloat16()
    got = products_native.pointwise(x, weight, None, NONE, None, residual, torch.float32)
    want = (residual.double() + x.double() @ weight.double().t()).bfloat16()
    torch.testing.assert_close(got, want, rtol=8e-3, atol=1e-6)

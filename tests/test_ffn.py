"""The FFN whose hidden layer is never stored: norm, drop path and residual within."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.check import assert_matches
from uniformer_kernels import Norm, backend, channel_stats, ffn, products_native
from uniformer_kernels.ffn import _bwd, _fwd, ffn_ref

GPU = torch.cuda.is_available()


@pytest.fixture(params=["auto", "chunked", "triton"])
def chosen(request, monkeypatch):
    if request.param == "chunked":  # as where there is no compiler
        monkeypatch.setattr(products_native, "serves", lambda *_: False)
    with backend("triton" if request.param == "triton" else "auto"):
        yield request.param


def inputs(shape, F, device, dtype=torch.float32, weight_dtype=None):
    """x, w1, b1, w2, b2, gamma, beta."""
    C, like = shape[-1], {"device": device, "dtype": weight_dtype or dtype}
    return [
        torch.randn(shape, device=device, dtype=dtype),
        torch.randn(F, C, **like) / C**0.5,
        torch.randn(F, **like),
        torch.randn(C, F, **like) / F**0.5,
        torch.randn(C, **like),
        torch.randn(C, **like),
        torch.randn(C, **like),
    ]


def drop(x):
    return torch.tensor([0.0, 1.25, 1.25], device=x.device)[: len(x)]


def everything(op):
    def run(x, w1, b1, w2, b2, gamma, beta):
        norm = Norm(channel_stats(x), gamma, beta)
        return op(x, w1, b1, w2, b2, norm=norm, scale=drop(x), residual=True)

    return run


# --- Numbers --------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "F"), [
    ((3, 2, 5, 7, 24), 72),  # no size a multiple of a tile
    ((2, 1, 3, 3, 72), 288),  # channels past 64: the larger tiles
    ((3, 2, 10, 10, 16), 64),  # rows past one tile
], ids=str)  # fmt: skip
def test_matches_plain_layers(shape, F, device, chosen):
    assert_matches(everything(ffn), everything(ffn_ref), inputs(shape, F, device))


@pytest.mark.parametrize(("shape", "F"), [
    ((3, 2, 5, 7, 24), 72),
    ((2, 1, 1, 1, 1), 1),  # a channel, and one hidden
    ((3, 40), 96),  # no axes in between
], ids=str)  # fmt: skip
def test_matches_plain_layers_without_a_norm(shape, F, device, chosen):
    bare = inputs(shape, F, device)[:5]
    assert_matches(ffn, ffn_ref, bare)
    x, w1, _, w2, _ = bare
    assert_matches(
        lambda x, w1, w2: ffn(x, w1, None, w2, None),
        lambda x, w1, w2: ffn_ref(x, w1, None, w2, None),
        [x, w1, w2],
    )


@pytest.mark.parametrize("residual", [True, False])
def test_matches_plain_layers_with_a_layer_norm(residual, device, chosen):
    def run(op):
        def full(x, w1, b1, w2, b2, gamma, beta):
            norm = Norm(None, gamma, beta, 1e-6, per_row=True)
            return op(x, w1, b1, w2, b2, norm=norm, scale=drop(x), residual=residual)

        return full

    assert_matches(run(ffn), run(ffn_ref), inputs((3, 2, 5, 7, 24), 72, device))


@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype, weight_dtype, device, chosen):
    if chosen == "triton" and not GPU and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter gets bf16 casts wrong")
    tensors = inputs((3, 2, 5, 7, 24), 72, device, dtype, weight_dtype)
    assert_matches(everything(ffn), everything(ffn_ref), tensors)


def test_many_rows_go_in_chunks(device):
    tensors = inputs((3, 1, 25, 40, 8), 32, device)
    assert_matches(everything(ffn), everything(ffn_ref), tensors)


def test_channels_that_the_kernels_do_not_serve(device):
    tensors = inputs((3, 1, 3, 3, 160), 320, device)
    assert_matches(everything(ffn), everything(ffn_ref), tensors)


def test_under_autocast_the_stream_stays_in_fp32(device):
    x, w1, b1, w2, b2, gamma, beta = inputs((3, 2, 5, 7, 24), 72, device)
    norm = Norm(channel_stats(x), gamma, beta)
    with torch.autocast(device, torch.bfloat16):
        assert ffn(x, w1, b1, w2, b2).dtype == torch.bfloat16
        y = ffn(x, w1, b1, w2, b2, norm=norm, residual=True)
    assert y.dtype == torch.float32
    want = ffn_ref(x, w1, b1, w2, b2, norm=norm, residual=True)
    assert 1e-5 < (y - want).abs().max() / want.abs().max() < 2e-2


@pytest.mark.parametrize("h", [-30.0, -6.0, 6.0, 30.0])
def test_the_tails_of_gelu(h, device, chosen):
    """exp and erf at their ends give no NaN: there GELU is 0 or the identity."""
    one, zero = torch.ones(1, 1, device=device), torch.zeros(1, device=device)
    x = torch.full((2, 1), h, device=device, requires_grad=True)
    y = ffn(x, one, zero, one, zero)
    y.sum().backward()
    assert torch.allclose(y, torch.full_like(y, max(h, 0.0)), atol=1e-6)
    assert torch.allclose(x.grad, torch.full_like(y, float(h > 0)), atol=1e-6)


# --- Gradients ------------------------------------------------------------------------


def test_nothing_of_the_hidden_layer_is_kept(device):
    leaves = [t.requires_grad_() for t in inputs((2, 2, 8, 8, 16), 64, device)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        everything(ffn)(*leaves)
    rows = [t for t in kept if t.numel() >= leaves[0].numel()]
    assert {t.data_ptr() for t in rows} == {leaves[0].data_ptr()}


def test_only_what_is_wanted_is_computed(device):
    x, w1, b1, w2, b2, *_ = inputs((2, 1, 4, 4, 8), 32, device)
    products = 4 * x.numel() * 32
    for leaf in (x, w1, b2):
        leaf.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            ffn(x, w1, b1, w2, b2).sum().backward()
        leaf.requires_grad_(False)
        assert counter.get_total_flops() == 2 * products
        assert leaf.grad.shape == leaf.shape


def test_expanded_and_sliced_tensors(device, chosen):
    x, w1, b1, w2, b2, *_ = inputs((2, 2, 4, 6, 16), 32, device)
    w1.requires_grad_()
    for view in (x[:, :, :, ::2], x.transpose(1, 2), x[:1].expand(3, -1, -1, -1, -1)):
        y, want = ffn(view, w1, b1, w2, b2), ffn_ref(view, w1, b1, w2, b2)
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
        (got,) = torch.autograd.grad(y.sum(), w1)
        (grad,) = torch.autograd.grad(want.sum(), w1)
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-4)


def test_twice_gives_the_same_bits(device, chosen):
    def run():
        torch.manual_seed(0)
        leaves = [t.requires_grad_() for t in inputs((3, 2, 5, 7, 24), 72, device)]
        y = everything(ffn)(*leaves)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_gradients_of_gradients_raise(device):
    x, *rest = inputs((2, 1, 2, 2, 8), 16, device)[:5]
    y = ffn(x.requires_grad_(), *rest)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients under"):
        grad.sum().backward()


def test_gradients_of_gradients_raise_behind_a_constant(device):
    """A sum's gradient needs none; that of ffn still depends on x."""
    x, *rest = inputs((2, 1, 2, 2, 8), 16, device)[:5]
    y = ffn(x.requires_grad_(), *rest).sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    assert not grad.isnan().any()
    with pytest.raises(RuntimeError, match="gradients of gradients under"):
        (y + grad.square().sum()).backward()


# --- Compilers ------------------------------------------------------------------------


def test_opcheck(device):
    x, w1, b1, w2, b2, gamma, beta = inputs((2, 2, 3, 5, 8), 16, device)
    stats, scale, dtype = channel_stats(x), drop(x), torch.float32
    for t in (x, w1, b1, w2, b2, gamma, beta):
        t.requires_grad_()
    norm, none = (
        (stats, gamma, beta, 1e-5, True, "", False),
        (None, None, None, 0.0, True, "", False),
    )
    torch.library.opcheck(_fwd.op, (x, w1, b1, w2, b2, *norm, scale, True, dtype))
    torch.library.opcheck(_fwd.op, (x, w1, None, w2, None, *none, None, False, dtype))
    plain = [t.detach() for t in (torch.randn_like(x), x, w1, b1, w2)]
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(_bwd.op, (*plain, *none, scale, True, dtype, *wanted))


def test_compiles_without_graph_breaks(device):
    op = everything(ffn)
    leaves = [t.requires_grad_() for t in inputs((3, 2, 3, 5, 8), 16, device)]
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*leaves), op(*leaves))
    got = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    want = torch.autograd.grad(op(*leaves).square().sum(), leaves)
    # Compiled, `channel_stats` is made of other operators, and rounded otherwise.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


# --- What comes in --------------------------------------------------------------------


@pytest.mark.parametrize(("change", "complaint"), [
    ({"x": torch.zeros(8)}, "x must be"),
    ({"w1": torch.zeros(16, 7)}, "w1 must be"),
    ({"w2": torch.zeros(16, 8)}, "w2 must be"),
    ({"b1": torch.zeros(8)}, "b1 must be"),
    ({"b2": torch.zeros(16)}, "b2 must be"),
    ({"x": torch.zeros(2, 8, dtype=torch.int64)}, "fp32, fp16"),
    ({"scale": torch.zeros(3)}, "scale must be"),
    ({"norm": Norm(torch.zeros(2, 4))}, "norm.stats must be"),
    ({"residual": torch.zeros(2, 8)}, "residual must be"),
], ids=str)  # fmt: skip
def test_bad_input_is_refused(change, complaint):
    good = {"x": torch.zeros(2, 8), "w1": torch.zeros(16, 8), "w2": torch.zeros(8, 16)}
    good |= {"b1": torch.zeros(16), "b2": torch.zeros(8)}
    with pytest.raises(ValueError, match=complaint):
        ffn(**(good | change))


def test_nothing_comes_out_of_nothing():
    x, *rest = inputs((0, 3, 8), 16, "cpu")[:5]
    assert ffn(x, *rest).shape == x.shape

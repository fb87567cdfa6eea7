"""The products around the local affinity: norm, drop path, residual and statistics within."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.check import assert_matches
from uniformer_kernels import (
    Norm,
    backend,
    channel_stats,
    pointwise,
    pointwise_fork,
    pointwise_stats,
    products_native,
)
from uniformer_kernels.pointwise import _bwd, _fwd, pointwise_ref

GPU = torch.cuda.is_available()


@pytest.fixture(params=["auto", "chunked", "triton"])
def chosen(request, monkeypatch):
    if request.param == "chunked":  # as where there is no compiler
        monkeypatch.setattr(products_native, "serves", lambda *_: False)
    with backend("triton" if request.param == "triton" else "auto"):
        yield request.param


def inputs(shape, N, device, dtype=torch.float32, weight_dtype=None):
    """x, weight, bias, gamma, beta, residual."""
    K, weight_dtype = shape[-1], weight_dtype or dtype
    like = {"device": device, "dtype": weight_dtype}
    return [
        torch.randn(shape, device=device, dtype=dtype),
        torch.randn(N, K, **like) / K**0.5,
        torch.randn(N, **like),
        torch.randn(K, **like),
        torch.randn(K, **like),
        torch.randn(*shape[:-1], N, device=device, dtype=dtype),
    ]


def drop(x):
    """Drop path: some clips dropped, the others scaled."""
    return torch.tensor([0.0, 1.25, 1.25], device=x.device)[: len(x)]


def everything(op):
    """`op` with all that may surround the product."""

    def run(x, weight, bias, gamma, beta, residual):
        norm = Norm(channel_stats(x), gamma, beta)
        return op(x, weight, bias, norm=norm, scale=drop(x), residual=residual)

    return run


# --- Numbers --------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "N"), [
    ((3, 2, 5, 7, 24), 40),  # no size a multiple of a tile
    ((2, 1, 3, 3, 72), 130),  # channels past one tile, in and out
    ((3, 2, 10, 10, 16), 16),  # rows past one tile
], ids=str)  # fmt: skip
def test_matches_batch_norm_and_linear(shape, N, device, chosen):
    assert_matches(everything(pointwise), everything(pointwise_ref), inputs(shape, N, device))


@pytest.mark.parametrize(("shape", "N"), [
    ((3, 2, 5, 7, 24), 40),
    ((2, 1, 1, 1, 1), 1),  # a channel
    ((2, 3), 5),  # no axes in between
], ids=str)  # fmt: skip
def test_matches_a_linear(shape, N, device, chosen):
    bare = inputs(shape, N, device)[:3]
    assert_matches(pointwise, pointwise_ref, bare)
    assert_matches(lambda x, w: pointwise(x, w), lambda x, w: pointwise_ref(x, w), bare[:2])


@pytest.mark.parametrize("shape", [(3, 2, 5, 7, 24), (2, 1, 1), (2, 1100, 8)], ids=str)
def test_matches_layer_norm_and_linear(shape, device, chosen):
    """Odd sizes; one channel, whose xhat is 0; rows past a chunk."""

    def run(op):
        def full(x, weight, bias, gamma, beta, residual):
            norm = Norm(None, gamma, beta, 1e-6, per_row=True)
            return op(x, weight, bias, norm=norm, scale=drop(x), residual=residual)

        return full

    x = torch.randn(shape, device=device)
    C = shape[-1]
    tensors = [torch.randn(s, device=device) for s in ((40, C), (40,), (C,), (C,))]
    tensors.append(torch.randn(*shape[:-1], 40, device=device))
    assert_matches(run(pointwise), run(pointwise_ref), [x, *tensors])


def test_a_layer_norm_leaves_its_statistics_to_the_product(device):
    x, weight = torch.randn(2, 5, 8, device=device), torch.randn(4, 8, device=device)
    want = torch.nn.functional.layer_norm(x, (8,)) @ weight.t()
    torch.testing.assert_close(pointwise(x, weight, norm=Norm(None, per_row=True)), want)
    for norm in (Norm(None), Norm(channel_stats(x), per_row=True)):
        with pytest.raises(ValueError, match="and not both"):
            pointwise(x, weight, norm=norm)


@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype, weight_dtype, device, chosen):
    if chosen == "triton" and not GPU and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter gets bf16 casts wrong")
    tensors = inputs((3, 2, 5, 7, 24), 40, device, dtype, weight_dtype)
    assert_matches(everything(pointwise), everything(pointwise_ref), tensors)


def test_many_rows_go_in_chunks(device):
    """More than a chunk, and a last one that is not full."""
    tensors = inputs((3, 1, 25, 40, 8), 8, device)
    assert_matches(everything(pointwise), everything(pointwise_ref), tensors)


def test_under_autocast_only_the_product_is_rounded(device):
    """As in the official code: BatchNorm in fp32, and a residual stream that stays so."""
    x, weight, bias, gamma, beta, residual = inputs((3, 2, 5, 7, 24), 24, device)
    norm = Norm(channel_stats(x), gamma, beta)
    with torch.autocast(device, torch.bfloat16):
        assert pointwise(x, weight, bias, norm=norm).dtype == torch.bfloat16
        y = pointwise(x, weight, bias, norm=norm, residual=residual)
    assert y.dtype == torch.float32
    want = pointwise_ref(x, weight, bias, norm=norm)
    error = ((y - residual) - want).abs().max() / want.abs().max()
    assert 1e-5 < error < 2e-2  # the product's, not the residual's
    assert torch.equal(pointwise(x, weight * 0, norm=norm, residual=residual), residual)


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_statistics_survive_a_large_mean(mean, device, chosen):
    """Variance 1e-4 beside a mean of 1,000: a difference of squares would leave nothing of it."""
    x = torch.zeros(2, 1, 20, 20, 8, device=device)
    residual = mean + 1e-2 * torch.randn(2, 1, 20, 20, 24, device=device)
    y, stats = pointwise_stats(x, torch.zeros(24, 8, device=device), residual=residual)
    assert torch.equal(y, residual)
    var, of_y = torch.var_mean(y.double(), (0, 1, 2, 3), correction=0)
    torch.testing.assert_close(stats[0].double(), of_y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats[1].double(), var, rtol=1e-2, atol=0)  # the mean is fp32


def test_a_large_mean_costs_no_more_than_in_plain_pytorch(device, chosen):
    tensors = inputs((3, 2, 5, 7, 24), 40, device)
    tensors[0] = 100 + 0.1 * tensors[0]
    assert_matches(everything(pointwise), everything(pointwise_ref), tensors)


@pytest.mark.parametrize("threads", [1, 2])
def test_statistics_of_many_rows_do_not_drift(threads):
    """PyTorch's sums for BatchNorm do: of 60,000 rows its variance came out as 4.4 instead of 1."""
    x = 1e4 + torch.randn(60_000, 4)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    _, var = channel_stats(x)
    torch.set_num_threads(before)
    torch.testing.assert_close(var.double(), x.double().var(0, correction=0), rtol=1e-2, atol=0)


def test_constant_statistics_are_those_of_eval_mode(device, chosen):
    *tensors, _ = inputs((3, 2, 5, 7, 24), 40, device)
    running = torch.stack([torch.randn(24, device=device), torch.rand(24, device=device) + 0.5])

    def run(op):
        return lambda x, w, b, gamma, beta: op(
            x, w, b, norm=Norm(running.to(x.dtype), gamma, beta, of_batch=False)
        )

    assert_matches(run(pointwise), run(pointwise_ref), tensors)


def test_strides_of_scale_and_statistics(device, chosen):
    x, weight, bias, gamma, beta, _ = inputs((3, 2, 3, 24), 40, device)
    stats = channel_stats(x)
    for scale in (torch.rand(3, 2, device=device)[:, 0], torch.rand(1, device=device).expand(3)):
        for of_x in (stats, stats.t().contiguous().t()):
            got = pointwise(x, weight, bias, norm=Norm(of_x, gamma, beta), scale=scale)
            want = pointwise_ref(x, weight, bias, norm=Norm(stats, gamma, beta), scale=scale)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# --- Gradients ------------------------------------------------------------------------


def test_only_what_is_wanted_is_computed(device):
    x, weight, bias, *_ = inputs((2, 1, 4, 4, 8), 8, device)
    products = 2 * x.numel() * 8
    for leaf, count in ((x, products), (weight, products), (bias, products)):
        leaf.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            pointwise(x, weight, bias).sum().backward()
        leaf.requires_grad_(False)
        assert counter.get_total_flops() == products + count
        assert leaf.grad.shape == leaf.shape
    residual = torch.zeros_like(x).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        pointwise(x, weight, bias, residual=residual).sum().backward()
    assert counter.get_total_flops() == products
    assert torch.equal(residual.grad, torch.ones_like(x))


def test_expanded_and_sliced_tensors(device, chosen):
    """A sum's gradient has strides of 0; views come in from everywhere."""
    x, weight, bias, *_ = inputs((2, 2, 4, 6, 16), 8, device)
    weight.requires_grad_()
    views = [x[:, :, :, ::2], x.transpose(1, 2), x[..., 4:12], x[:1].expand(3, -1, -1, -1, -1)]
    for view in views:
        matrix = weight[:, : view.shape[-1]]
        y = pointwise(view, matrix, bias)
        torch.testing.assert_close(y, pointwise_ref(view, matrix, bias), rtol=1e-5, atol=1e-5)
        (got,) = torch.autograd.grad(y.sum(), weight)
        (want,) = torch.autograd.grad(pointwise_ref(view, matrix, bias).sum(), weight)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_twice_gives_the_same_bits(device, chosen):
    def run():
        torch.manual_seed(0)
        leaves = [t.requires_grad_() for t in inputs((3, 2, 5, 7, 24), 40, device)]
        y = everything(pointwise)(*leaves)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_gradients_of_gradients_raise(device):
    x, weight, bias, *_ = inputs((2, 1, 2, 2, 8), 8, device)
    (grad,) = torch.autograd.grad(
        pointwise(x.requires_grad_(), weight, bias).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="gradients of gradients under"):
        grad.sum().backward()


def test_batched_gradients_and_the_transforms_run(device):
    x, weight, bias, *_ = inputs((2, 1, 2, 2, 8), 8, device)
    y = pointwise(x.requires_grad_(), weight, bias)
    dys = torch.randn(3, *y.shape, device=device)
    (got,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    want = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys]
    torch.testing.assert_close(got, torch.stack(want))
    mapped = torch.func.vmap(pointwise, (0, None, None))(x.detach(), weight, bias)
    torch.testing.assert_close(mapped, y.detach())


# --- A branch and its residual --------------------------------------------------------


def branch(fork, of_rows=False):
    """x plus a product of it: as `pointwise_fork` has it, or as autograd adds it up."""

    def run(x, weight, bias, gamma, beta):
        stats = None if of_rows else channel_stats(x)
        norm = Norm(stats, gamma, beta, per_row=of_rows)
        op = pointwise_fork if fork else lambda *args, **kwargs: (pointwise(*args, **kwargs), x)
        y, kept = op(x, weight, bias, norm=norm, scale=drop(x))
        return kept.sin() + y.cos()

    return run


@pytest.mark.parametrize("of_rows", [False, True], ids=["batch norm", "layer norm"])
def test_a_fork_adds_what_comes_back(of_rows, device, chosen):
    tensors = inputs((3, 2, 5, 7, 24), 24, device)[:5]
    assert_matches(branch(True, of_rows), branch(False, of_rows), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fork_without_a_norm(dtype, device, chosen):
    if chosen == "triton" and not GPU and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter gets bf16 wrong")

    def run(x, weight):
        y, kept = pointwise_fork(x, weight)
        return torch.cat([y, kept * 2], -1)

    def ref(x, weight):
        return torch.cat([pointwise_ref(x, weight), x * 2], -1)

    assert_matches(run, ref, inputs((2, 1, 5, 7, 16), 8, device, dtype)[:2])


def test_a_fork_is_one_node_and_copies_nothing(device):
    x, weight, *_ = inputs((2, 1, 4, 4, 8), 8, device)
    y, kept = pointwise_fork(x.requires_grad_(), weight.requires_grad_())
    assert kept.grad_fn is y.grad_fn
    assert kept.data_ptr() == x.data_ptr()
    (alone,) = torch.autograd.grad(kept.sum(), x, retain_graph=True)  # y is not used
    assert torch.equal(alone, torch.ones_like(x))
    (dx,) = torch.autograd.grad(y.sum(), x)  # nor is x
    want = torch.autograd.grad(pointwise(x, weight).sum(), x)[0]
    assert torch.equal(dx, want)


@pytest.mark.parametrize("used", [0, 1], ids=["y", "x"])
def test_a_fork_may_be_used_by_half(used, device, chosen):
    x, weight = torch.randn(4, 8, device=device), torch.randn(16, 8, device=device)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    dy = torch.randn(4, (16, 8)[used], device=device)
    got = torch.autograd.grad(pointwise_fork(*leaves)[used], leaves, dy, allow_unused=True)
    plain = (pointwise_ref(*leaves), x * 1)[used]
    want = torch.autograd.grad(plain, leaves, dy, allow_unused=True)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    assert (got[1] is None) == (want[1] is None) == bool(used)


def test_a_fork_of_what_needs_no_gradient_needs_none(device):
    x, weight, *_ = inputs((2, 1, 4, 4, 8), 8, device)
    y, kept = pointwise_fork(x, weight.requires_grad_())
    assert kept is x
    y.sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert pointwise_fork(x.requires_grad_(), weight)[1] is x


def test_a_fork_compiles(device):
    leaves = [t.requires_grad_() for t in inputs((3, 2, 3, 5, 8), 8, device)[:5]]
    compiled = torch.compile(branch(True), backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(*leaves).sum(), leaves)
    want = torch.autograd.grad(branch(False)(*leaves).sum(), leaves)
    torch.testing.assert_close(got, want)


def test_second_derivatives_raise_whichever_leaf_is_asked_for(device):
    """Of W alone, by way of the gradient of x, which depends on it."""
    x, weight = (torch.randn(8, 8, device=device, requires_grad=True) for _ in range(2))
    loss = pointwise(x, weight).pow(3).sum()
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    for leaf in (x, weight):
        with pytest.raises(RuntimeError, match="has none of its own"):
            torch.autograd.grad(loss + g.square().sum(), leaf, retain_graph=True)


# --- Compilers ------------------------------------------------------------------------


def test_opcheck(device):
    x, weight, bias, gamma, beta, residual = inputs((2, 2, 3, 5, 8), 6, device)
    stats, scale, dtype = channel_stats(x), drop(x), torch.float32
    leaves = [t.requires_grad_() for t in (x, weight, bias, gamma, beta, residual)]
    x, weight, bias, gamma, beta, residual = leaves
    norm = (stats, gamma, beta, 1e-5, True, "", False)
    torch.library.opcheck(_fwd.op, (x, weight, bias, *norm, scale, residual, True, dtype))
    none = (None, None, None, 0.0, True, "", False)
    torch.library.opcheck(_fwd.op, (x, weight, None, *none, None, None, False, dtype))
    dy = torch.randn(2, 2, 3, 5, 6, device=device)
    plain = [t.detach() for t in (x, weight)]
    for wanted in ((True, True), (True, False), (False, True)):
        for more in (None, torch.randn_like(plain[0])):
            torch.library.opcheck(_bwd.op, (dy, *plain, *none, scale, more, dtype, *wanted))


def test_compiles_without_graph_breaks(device):
    op = everything(pointwise)
    leaves = [t.requires_grad_() for t in inputs((3, 2, 3, 5, 8), 6, device)]
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*leaves), op(*leaves))
    got = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    want = torch.autograd.grad(op(*leaves).square().sum(), leaves)
    torch.testing.assert_close(got, want)


# --- What comes in --------------------------------------------------------------------


@pytest.mark.parametrize(("change", "complaint"), [
    ({"x": torch.zeros(8)}, "x must be"),
    ({"weight": torch.zeros(4, 7)}, "weight must be"),
    ({"weight": torch.zeros(4, 8, 3, 3, 3)}, "weight must be"),
    ({"weight": torch.zeros(4, 8, dtype=torch.float64)}, "dtype"),
    ({"x": torch.zeros(2, 3, 8, dtype=torch.int32)}, "fp32, fp16"),
    ({"bias": torch.zeros(8)}, "bias must be"),
    ({"scale": torch.zeros(3)}, "scale must be"),
    ({"residual": torch.zeros(2, 3, 8)}, "residual must be"),
    ({"weight": torch.zeros(0, 8)}, "weight must be"),
    ({"norm": Norm(torch.zeros(2, 4))}, "norm.stats must be"),
    ({"norm": torch.nn.BatchNorm3d(8)}, "norm must be"),
    ({"norm": Norm(torch.zeros(2, 8).requires_grad_())}, "detach"),
    ({"residual": True}, "residual must be a tensor"),
    ({"residual": torch.zeros(2, 3, 4, dtype=torch.int64)}, "residual must be of"),
    ({"scale": torch.ones(2, requires_grad=True)}, "detach"),
    ({"weight": torch.zeros(4, 8, device="meta")}, "device"),
    ({"norm": Norm(torch.zeros(2, 8), torch.zeros(4))}, "norm.weight must be"),
], ids=str)  # fmt: skip
def test_bad_input_is_refused(change, complaint):
    good = {"x": torch.zeros(2, 3, 8), "weight": torch.zeros(4, 8)}
    with pytest.raises(ValueError, match=complaint):
        pointwise(**(good | change))


def test_nothing_comes_out_of_nothing():
    x, weight = torch.zeros(0, 3, 8, requires_grad=True), torch.zeros(4, 8)
    y = pointwise(x, weight)
    assert y.shape == (0, 3, 4)
    y.sum().backward()
    assert x.grad.shape == x.shape
    with pytest.raises(ValueError, match="must have elements"):
        pointwise_stats(x, weight)

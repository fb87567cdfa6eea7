"""A whole block in one call of C++: the bits of its operators, and when it leaves it to them."""

import copy
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import uniformer.global_block
import uniformer.local_block
from tests.test_attention_native import SERVED
from uniformer.configs import UniFormerConfig
from uniformer.factory import create_model
from uniformer.global_block import GlobalBlock
from uniformer.local_block import LocalBlock
from uniformer_kernels import backend
from uniformer_kernels.block_native import infer_block

C = 32
DTYPES = [
    pytest.param(dtype, marks=pytest.mark.skipif(not served, reason="not served here"))
    for dtype, served in SERVED.items()
]
HERE = pytest.mark.skipif(not SERVED[torch.float32], reason="not served here")


def block(kind, dim=C, **cfg):
    made = kind(UniFormerConfig(head_dim=16, drop_path_rate=0.0, **cfg), dim, 0.1).eval()
    for t in made.parameters():  # anything but ones and zeros
        nn.init.normal_(t, std=0.3)
    for name, t in made.named_buffers():
        if "running" in name:
            nn.init.uniform_(t, 0.5, 2.0)
    return made


def at_once(made, x):
    """What a module makes of x, and how many blocks of it one call each."""
    calls = []

    def counted(*args):
        calls.append(infer_block(*args))
        return calls[-1]

    with (
        torch.no_grad(),
        patch.object(uniformer.global_block, "infer_block", counted),
        patch.object(uniformer.local_block, "infer_block", counted),
    ):
        return made(x), sum(call is not None for call in calls)


@contextmanager
def by_operators():
    with (
        patch.object(uniformer.global_block, "infer_block", lambda *_: None),
        patch.object(uniformer.local_block, "infer_block", lambda *_: None),
        torch.no_grad(),
    ):
        yield


def assert_same_bits(made, x, blocks=1):
    got, served = at_once(made, x)
    assert served == blocks
    with by_operators():
        assert torch.equal(got, made(x))


# --- Numbers --------------------------------------------------------------------------

KINDS = pytest.mark.parametrize("kind", [LocalBlock, GlobalBlock])


# One token, few, tiles that are not full, and clips for three rounds of which the last is smaller.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 1, 3, 7), (3, 2, 5, 7), (5, 4, 15, 15)], ids=str
)
@KINDS
def test_the_bits_are_those_of_the_operators(kind, shape, dtype):
    made, x = block(kind), torch.randn(*shape, C).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert_same_bits(made, x)
    assert_same_bits(made.to(dtype), x)


@HERE
@pytest.mark.parametrize("cfg", [
    {"dpe": False}, {"qkv_bias": False}, {"qk_scale": 0.7}, {"mlp_ratio": 3.0}, {"tube_size": 3},
], ids=str)  # fmt: skip
@KINDS
def test_blocks_of_all_kinds(kind, cfg):
    assert_same_bits(block(kind, **cfg), torch.randn(2, 3, 5, 4, C))


@HERE
@KINDS
def test_without_affine_norms(kind):
    made = block(kind)
    if kind is LocalBlock:
        made.norm1, made.norm2 = (nn.BatchNorm3d(C, affine=False).eval() for _ in range(2))
    else:
        made.norm1, made.norm2 = (nn.LayerNorm(C, elementwise_affine=False) for _ in range(2))
    assert_same_bits(made, torch.randn(2, 3, 5, 4, C))


@HERE
@KINDS
def test_the_norms_eps_count(kind):
    made, x = block(kind), torch.randn(2, 3, 5, 4, C)
    before = at_once(made, x)[0]
    made.norm1.eps, made.norm2.eps = 0.5, 2.0
    assert_same_bits(made, x)
    assert not torch.allclose(at_once(made, x)[0], before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_blocks_of_a_network(dtype):
    made, x = create_model("uniformer_nano", num_classes=5).eval(), torch.randn(2, 3, 4, 64, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert_same_bits(made, x, sum(made.cfg.depths))


# --- What changes between calls -------------------------------------------------------


@HERE
@KINDS
def test_changed_parameters_count(kind):
    made, x = block(kind), torch.randn(2, 3, 5, 4, C)
    assert_same_bits(made, x)
    with torch.no_grad():
        for t in (*made.parameters(), *made.buffers()):  # in place
            t.add_(1 if t.dtype == torch.int64 else 0.1)
    assert_same_bits(made, x)
    made.load_state_dict(block(kind).state_dict())
    assert_same_bits(made, x)
    for t in made.parameters():  # other memory
        t.data = torch.rand_like(t)
    assert_same_bits(made, x)
    made.mlp.fc1.weight = nn.Parameter(torch.rand_like(made.mlp.fc1.weight))
    assert_same_bits(made, x)
    hidden = made.mlp.fc1.bias.data
    made.mlp.fc1.bias = None
    assert_same_bits(made, x)
    made.mlp.fc1.bias = nn.Parameter(hidden.bfloat16().float())
    assert_same_bits(copy.deepcopy(made), x)


@HERE
@KINDS
def test_threads_do_not_meet(kind):
    """Each has memory of its own for what passes between kernels."""
    made = block(kind)
    clips = [torch.randn(1, 2, 9, 9 + i % 3, C) for i in range(24)]
    want = [at_once(made, x)[0] for x in clips]

    def run(x):
        with torch.no_grad():
            return made(x)

    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(run, clips), want))


# --- When it steps back ---------------------------------------------------------------


@HERE
@KINDS
def test_gradients_and_statistics_are_left_to_the_operators(kind):
    made, x = block(kind), torch.randn(2, 2, 4, 4, C, requires_grad=True)
    made(x).sum().backward()
    assert x.grad is not None
    _, served = at_once(made.train(), x.detach())
    assert not served


@HERE
def test_what_draws_is_left_to_the_operators():
    made, x = block(GlobalBlock, attn_drop_rate=0.3), torch.randn(6, 2, 4, 4, C)
    assert at_once(made, x)[1]
    made.attn.train()
    y, served = at_once(made, x)
    assert not served
    assert not torch.equal(y, at_once(made, x)[0])
    made.attn.eval()
    made.drop_path.train()
    assert not at_once(made, x)[1]


@HERE
@pytest.mark.parametrize("how", [
    "strided", "fp16", "channels", "convolution", "heads", "mixed biases", "strided weight",
    "backend", "counter", "hook",
])  # fmt: skip
@KINDS
def test_what_is_left_to_the_operators(kind, how):
    made, x = block(kind), torch.randn(2, 2, 4, 6, C)
    context = torch.no_grad()
    if how == "strided":
        x = torch.randn(2, 2, 4, 6, 2 * C)[..., ::2]
    elif how == "fp16":
        made, x = made.half(), x.half()
    elif how == "channels":  # of the depthwise convolution: multiples of 16
        made, x = block(kind, 24), torch.randn(2, 2, 4, 6, 24)
    elif how == "convolution":
        made.pos_embed.weight = nn.Parameter(torch.randn(C, 1, 7, 7, 7))
    elif how == "heads":
        if kind is LocalBlock:
            pytest.skip("it has none")
        made.attn.num_heads = 4
    elif how == "mixed biases":
        made.pos_embed.bias = nn.Parameter(made.pos_embed.bias.detach().bfloat16())
        x = x.bfloat16()
    elif how == "strided weight":
        weight = made.mlp.fc1.weight.detach()
        made.mlp.fc1.weight = nn.Parameter(weight.transpose(0, 1).contiguous().transpose(0, 1))
    elif how == "backend":
        context = backend("triton")
    elif how == "counter":
        context = FlopCounterMode(display=False)
    elif how == "hook":
        made.mlp.register_forward_hook(lambda *_: None)
    with context:
        y, served = at_once(made, x)
    assert not served
    with by_operators():
        torch.testing.assert_close(y, made(x), atol=1e-3, rtol=1e-3)


@HERE
@pytest.mark.parametrize("shape", [(C, 1, 3, 3, 3), (C + 8, 1, 3, 3, 3)], ids=str)
def test_a_parameter_of_another_shape_is_refused_by_its_operator(shape):
    """And never read past its end."""
    made, x = block(LocalBlock), torch.randn(2, 2, 4, 6, C)
    made.conv1.weight = nn.Parameter(torch.randn(C, C + 8, 1, 1, 1))
    made.attn.weight = nn.Parameter(torch.randn(shape))
    with torch.no_grad(), pytest.raises(ValueError, match="weight must be"):
        made(x)


def without(name, part):
    def change(made):
        setattr(made.get_submodule(name), part, None)

    return change


def parameter(name, *shape):
    def change(made):
        made.get_submodule(name).weight = nn.Parameter(torch.randn(shape))

    return change


@HERE
@pytest.mark.parametrize(("kind", "change"), [
    (LocalBlock, without("norm1", "running_var")),
    (LocalBlock, without("pos_embed", "weight")), (GlobalBlock, without("pos_embed", "weight")),
    (LocalBlock, without("conv1", "weight")), (GlobalBlock, without("mlp.fc2", "weight")),
    (LocalBlock, without("attn", "weight")), (LocalBlock, parameter("attn", C, 1, 11, 3, 3)),
    (GlobalBlock, parameter("mlp.fc1")), (GlobalBlock, parameter("mlp.fc1", 0, C)),
    (GlobalBlock, lambda made: setattr(made.attn, "num_heads", 2.0)),
])  # fmt: skip
def test_what_no_operator_takes_is_refused_as_they_do(kind, change):
    """And nothing is read that is not there."""
    made, x = block(kind), torch.randn(2, 2, 4, 6, C)
    with torch.no_grad():
        made(x)
    change(made)
    with by_operators(), pytest.raises(Exception) as want:  # noqa: PT011
        made(x)
    with torch.no_grad(), pytest.raises(type(want.value), match=re.escape(str(want.value))):
        made(x)


@HERE
@pytest.mark.parametrize("lazy", [torch._neg_view, lambda t: torch._efficientzerotensor(t.shape)])
@KINDS
def test_tensors_that_are_not_what_their_memory_says(kind, lazy):
    made, x = block(kind), lazy(torch.randn(2, 2, 4, 6, C))
    y, served = at_once(made, x)
    assert not served
    torch.testing.assert_close(y, at_once(made, x + torch.zeros(x.shape))[0])
    made.mlp.fc1.bias = nn.Parameter(torch._neg_view(torch.randn(made.mlp.fc1.bias.shape)))
    assert not at_once(made, torch.randn(x.shape))[1]


@HERE
@KINDS
def test_compilers_see_the_operators(kind):
    made, x = block(kind), torch.randn(2, 2, 4, 6, C)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), made(x))

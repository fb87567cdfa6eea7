"""The fused local block against its parts: numbers, statistics, memory, and when it steps back."""

import copy
import logging
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.plain import PlainLocalBlock
from uniformer.configs import PRESETS, UniFormerConfig
from uniformer.local_block import LocalBlock
from uniformer.model import UniFormer
from uniformer_kernels import backend

C = 16


def block(drop_path=0.0, **cfg):
    made = LocalBlock(UniFormerConfig(drop_path_rate=0.0, **cfg), C, drop_path)
    for norm in (made.norm1, made.norm2):  # anything but ones and zeros
        for t in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(t)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return made


def clip(*shape, dtype=torch.float32):
    return torch.randn(*(shape or (3, 2, 5, 7)), C, dtype=dtype)


def both(made, x, dy=None):
    """(output, gradients, buffers) fused and part by part, from the same state and seed."""
    results = []
    for method in ("fused", "part_by_part"):
        of = copy.deepcopy(made)
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        y = getattr(of, method)(leaf)
        y.backward(torch.ones_like(y) if dy is None else dy)
        grads = {"x": leaf.grad} | {n: p.grad for n, p in of.named_parameters()}
        results.append((y.detach(), grads, dict(of.named_buffers())))
    return results


def assert_same(made, x, **tolerance):
    (y, grads, buffers), (want, want_grads, want_buffers) = both(made, x, torch.randn_like(x))
    torch.testing.assert_close(y, want, **tolerance)
    for name in want_grads:
        torch.testing.assert_close(grads[name], want_grads[name], msg=name, **tolerance)
    for name in want_buffers:
        torch.testing.assert_close(buffers[name], want_buffers[name], msg=name, **tolerance)


# --- Numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("cfg", [{}, {"dpe": False}, {"tube_size": 3}, {"mlp_ratio": 3.0}], ids=str)
def test_fused_equals_its_parts(cfg, mode):
    made = getattr(block(**cfg).double(), mode)()
    assert_same(made, clip(dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_drop_path_draws_the_same_clips():
    made = block(drop_path=0.5).double().train()
    x = clip(6, 2, 3, 3, dtype=torch.float64)
    torch.manual_seed(1)
    dropped = (made.drop_path.draw(x) == 0).sum()
    assert 0 < dropped < 6
    assert_same(made, x, rtol=1e-9, atol=1e-9)


def cumulative(norm):
    norm.momentum = None


def without_running(norm):
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    norm.track_running_stats = False


def frozen(norm):
    norm.eval()


def without_affine(norm):
    norm.weight = norm.bias = None
    norm.affine = False


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("change", [cumulative, without_running, frozen, without_affine])
def test_every_kind_of_batch_norm(change, mode):
    made = getattr(block().double(), mode)()
    change(made.norm1)
    change(made.norm2)
    for _ in range(2):
        assert_same(made, clip(dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_one_value_a_channel_is_refused_as_by_pytorch():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block().train()(clip(1, 1, 1, 1))
    assert block().eval()(clip(1, 1, 1, 1)).shape == (1, 1, 1, 1, C)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_sixteen_bits_err_no_more_than_the_plain_block(dtype, mode):
    made = getattr(block(), mode)()
    plain = copy.deepcopy(
        made
    )  # its operators in PyTorch's, but for a gradient that has none right
    x, dy = clip(), clip()
    truth = copy.deepcopy(made).double()
    want = truth.part_by_part(x.double())
    want.backward(dy.double())
    with torch.autocast("cpu", dtype):
        y = made(x)
        with backend("reference"):
            near = plain(x)
    assert y.dtype == torch.float32  # the residual stream
    y.backward(dy)
    near.backward(dy)

    def assert_near(name, got, near, want):
        eps = torch.finfo(dtype).eps
        bound = 2 * (near - want).abs().max() + eps * want.abs().max().clamp_min(1e-3)
        assert (got - want).abs().max() <= bound, name

    assert_near("y", y, near, want)
    of_plain = dict(plain.named_parameters())
    for (name, p), t in zip(made.named_parameters(), truth.parameters(), strict=True):
        # A bias before a norm has no gradient but rounding: its scale is that of the weight's.
        if mode == "train" and name == "conv2.bias":
            continue
        assert_near(name, p.grad, of_plain[name].grad, t.grad)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_fifty_steps_follow_the_reference(autocast):
    """Same seeds, fused and in plain PyTorch: losses fall alike, running statistics agree."""
    cfg = replace(PRESETS["uniformer_nano"], num_classes=4, drop_path_rate=0.1)  # the demo's
    means = torch.randn(4, 3, 1, 1, 1)

    def train(name):
        torch.manual_seed(0)
        model = UniFormer(cfg).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(50):
            labels = torch.randint(4, (8,))
            x = means[labels] + torch.randn(8, 3, 4, 32, 32)
            with backend(name), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = nn.functional.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses), dict(model.named_buffers())

    (fused, stats), (plain, plain_stats) = train("auto"), train("reference")
    assert plain[-10:].mean() < 0.5 * plain[:5].mean()  # it learns
    close = 0.1 if autocast else 0.02
    assert (fused[:10] - plain[:10]).abs().max() < close
    assert (fused[-10:].mean() - plain[-10:].mean()).abs() < 0.15 * plain[:5].mean()
    for name in ("blocks1.0.norm1.running_mean", "blocks1.0.norm1.running_var"):
        apart = (stats[name] - plain_stats[name]).norm() / plain_stats[name].norm()
        assert apart < (0.2 if autocast else 0.02), name


# --- Memory ---------------------------------------------------------------------------


def kept_for_backward(made, x):
    """In numbers of x: each memory that autograd keeps, once, parameters aside."""
    memory = {}
    own = {p.data_ptr() for p in made.parameters()}

    def pack(t):
        if t.data_ptr() not in own:
            memory[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        made(x)
    return sum(memory.values()) / (x.numel() * x.element_size())


def test_five_activations_are_kept_for_backward():
    """Input, DPE's output, values, context, and the FFN's input; plain PyTorch keeps three times
    as many."""
    made, x = block().train(), clip(2, 4, 14, 14).requires_grad_()
    kept = kept_for_backward(made, x)
    assert kept < 5.1
    plain = PlainLocalBlock(UniFormerConfig(drop_path_rate=0.0), C, 0.0).train()
    channels_first = x.detach().permute(0, 4, 1, 2, 3).contiguous().requires_grad_()
    assert kept_for_backward(plain, channels_first) > 14.9


# --- Folded weights -------------------------------------------------------------------


@torch.no_grad()
def test_eval_follows_the_parameters_however_they_are_written():
    made, x = block().eval(), clip()

    def assert_current():
        torch.testing.assert_close(made(x), made.part_by_part(x), rtol=1e-4, atol=1e-4)

    assert_current()
    made.conv1.weight.mul_(2.0)
    assert_current()
    made.norm2.running_var.add_(1.0)
    assert_current()
    made.norm1.eps = 1.0
    assert_current()
    made.load_state_dict(block().state_dict())
    assert_current()
    made.mlp.fc1.weight.data.mul_(3.0)  # which leaves no trace
    assert_current()
    made.conv1.weight.detach().numpy()[:] *= 0.5
    assert_current()
    made.conv1.bias = None
    assert_current()
    with torch.autocast("cpu", torch.bfloat16):
        made(x)


@torch.no_grad()
@pytest.mark.parametrize("mean", [0.0, 10.0, 100.0])
def test_running_statistics_far_from_0_cost_no_digits_in_16_bits(mean):
    made, x = block().eval(), mean + clip()
    for norm in (made.norm1, made.norm2):
        norm.running_mean.fill_(mean)
        norm.running_var.fill_(1.0)
    made.pos_embed.weight.zero_()
    want = copy.deepcopy(made).double().part_by_part(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        fused, plain = made(x), made.part_by_part(x)
    bound = (
        2 * (plain - want).abs().max() + torch.finfo(torch.bfloat16).eps * (want - x).abs().max()
    )
    assert (fused - want).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_through_constant_statistics(dtype):
    """Frozen norms in 16 bits are applied, not folded: the same gradients."""
    made, x = block().eval(), clip()
    results = []
    for method in ("fused", "part_by_part"):
        leaf = x.clone().requires_grad_()
        made.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = getattr(made, method)(leaf)
        y.square().sum().backward()
        results.append([leaf.grad, *(p.grad for p in made.parameters())])
    for got, want in zip(*results, strict=True):
        apart = (got - want).norm() / want.norm()
        assert apart < (0.05 if dtype == torch.bfloat16 else 1e-4)


def test_its_output_may_be_changed_in_place():
    y = block().train()(clip().requires_grad_())
    y += 1
    y.sum().backward()


@torch.no_grad()
def test_folded_weights_are_not_rounded_by_autocast():
    made, x = block().eval(), clip()
    want = made(x)
    with torch.autocast("cpu", torch.bfloat16):
        made(x)
    assert torch.equal(made(x), want)


def test_the_transforms_run_in_eval_mode():
    """Parameters that torch.func wraps have no memory to remember."""
    made, x = block().eval(), clip()

    def loss(parameters, x):
        return torch.func.functional_call(made, parameters, (x[None],)).square().sum()

    parameters = dict(made.named_parameters())
    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(len(x)):
        made.zero_grad()
        made(x[i : i + 1]).square().sum().backward()
        want = made.conv1.weight.grad
        torch.testing.assert_close(grads["conv1.weight"][i], want, rtol=1e-3, atol=1e-3)


def test_folding_is_differentiable_where_something_trains():
    made = block().eval()
    made.requires_grad_(False)
    made.norm1.weight.requires_grad_()
    made(clip()).sum().backward()
    assert made.norm1.weight.grad.abs().sum() > 0


# --- Stepping back --------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def hooked(made):
    made.called = []
    made.conv1.register_forward_hook(lambda *_: made.called.append("conv1"))


def replaced(made):
    made.conv2 = Twice(made.conv2)


def overridden(made):
    inner = made.norm1.forward
    made.norm1.forward = lambda x: 2 * inner(x)


def dropping(made):
    made.mlp.drop.p = 0.5


@pytest.mark.parametrize("change", [hooked, replaced, overridden, dropping])
def test_what_it_does_not_know_runs_part_by_part_and_is_announced_once(change, caplog):
    made, x = block().train(), clip()
    change(made)
    with caplog.at_level(logging.WARNING, logger="uniformer.kernels"):
        torch.manual_seed(1)
        y = made(x)
        made(x)
    assert len([r for r in caplog.records if "part by part" in r.message]) <= 1
    if change is hooked:
        assert made.called == ["conv1", "conv1"]
    torch.manual_seed(1)
    torch.testing.assert_close(y, made.part_by_part(x))


def test_the_reference_backend_runs_part_by_part():
    made, x = block().train(), clip()
    calls = []
    made.conv1.forward = lambda x: calls.append(1) or x
    with backend("reference"):
        made(x)
    assert calls


# --- Several processes ----------------------------------------------------------------

PROGRAM = """
import sys
import torch, torch.distributed as dist
from torch import nn
from uniformer.configs import PRESETS, UniFormerConfig
from uniformer.local_block import LocalBlock
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/sync", rank=rank, world_size=2)
torch.manual_seed(0)
block = nn.SyncBatchNorm.convert_sync_batchnorm(LocalBlock(UniFormerConfig(), 8, 0.0)).double()
x = torch.randn(3, 2, 3, 4, 8, dtype=torch.float64)
dy = torch.randn_like(x)
share = slice(0, 1) if rank == 0 else slice(1, 3)  # unequal on purpose
leaf = x[share].clone().requires_grad_()
y = block.train()(leaf)
y.backward(dy[share])
for p in block.parameters():
    dist.all_reduce(p.grad)
torch.save([y.detach(), leaf.grad, [p.grad for p in block.parameters()],
            block.norm1.running_var, block.norm2.running_mean], f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_statistics_are_shared_by_all_ranks(tmp_path):
    """Two processes with one clip and two are as one process with three."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(tmp_path)],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), errors
    torch.manual_seed(0)
    made = LocalBlock(UniFormerConfig(), 8, 0.0).double().train()
    x = torch.randn(3, 2, 3, 4, 8, dtype=torch.float64)
    dy = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    y = made.part_by_part(leaf)
    y.backward(dy)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.testing.assert_close(torch.cat([one[0], two[0]]), y.detach())
    torch.testing.assert_close(torch.cat([one[1], two[1]]), leaf.grad)
    for a, b, p in zip(one[2], two[2], made.parameters(), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, p.grad)
    for rank in (one, two):
        torch.testing.assert_close(rank[3], made.norm1.running_var)
        torch.testing.assert_close(rank[4], made.norm2.running_mean)

"""`kernelize`: what it replaces, what it leaves and why, and what stays as it was."""

import copy
import io
import threading

import pytest
import torch
from torch import nn

from tests.official import Attention, CBlock, DropPath, Recognizer, SABlock, SplitSABlock, Uniformer
from uniformer import DepthwiseConv3d, UniFormer, kernelize
from uniformer.configs import PRESETS
from uniformer.official_blocks import LocalBlockNCTHW
from uniformer_kernels import current_backend

# --- Convolutions ---------------------------------------------------------------------


class Sub(nn.Conv3d):
    pass


def network():
    """Strides, dilations, groups and paddings of all kinds around depthwise convolutions."""
    return nn.Sequential(
        nn.Conv3d(3, 8, 3, padding=1),
        nn.Conv3d(8, 8, 3, padding=1, groups=8),
        nn.BatchNorm3d(8),
        nn.Conv3d(8, 8, 3, stride=(1, 2, 2), padding=1, groups=8),
        nn.Conv3d(8, 8, 3, padding=2, dilation=2, groups=8),
        nn.Conv3d(8, 8, 3, padding=1, groups=4),
        nn.Conv3d(8, 16, 3, padding=1, groups=8),
        nn.Sequential(nn.Conv3d(16, 16, (1, 5, 5), padding="same", groups=16, bias=False)),
        nn.Conv3d(16, 16, 3, padding=0, groups=16),
        nn.Conv3d(16, 16, 3, padding=1, groups=16, padding_mode="replicate"),
        nn.Conv3d(16, 16, (3, 4, 3), padding=(1, 2, 1), groups=16),
        Sub(16, 16, 3, padding=1, groups=16),
    )


def test_kernelize_replaces_what_it_can_and_says_why_not_the_rest():
    model = network()
    before, parameters = copy.deepcopy(model), dict(model.named_parameters())
    report = kernelize(model)
    assert report.convolutions == ["1", "7.0"]
    for name, reason in {
        "3": "stride (1, 2, 2)", "4": "dilation (2, 2, 2)", "5": "4 groups", "6": "16 out",
        "8": "padding (0, 0, 0)", "9": "padding mode 'replicate'", "10": "kernel (3, 4, 3)",
        "11": "it is a Sub",
    }.items():  # fmt: skip
        assert reason in report.left[name]
    assert len(report.left) == 8
    assert "replaced 0 UniFormer blocks and 2 depthwise convolutions\n  left 3: stride" in str(
        report
    )
    assert all(p is parameters[n] for n, p in model.named_parameters())

    x = torch.randn(2, 3, 5, 12, 13)
    y, want = model(x), before(x)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    want.square().sum().backward()
    for got, other in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(got.grad, other.grad, rtol=1e-3, atol=1e-4)
    assert kernelize(model).convolutions == []  # once is enough


def test_kernelize_a_lone_convolution():
    conv = nn.Conv3d(4, 4, 3, padding=1, groups=4)
    assert kernelize(conv).convolutions == ["the model itself"]
    assert type(conv) is DepthwiseConv3d


def test_parametrized_and_complex_convolutions_are_left():
    normed = nn.utils.parametrizations.spectral_norm(nn.Conv3d(8, 8, 3, padding=1, groups=8))
    model = nn.Sequential(normed, nn.Conv3d(8, 8, 3, padding=1, groups=8, dtype=torch.complex64))
    left = kernelize(model).left
    assert "kernelize first" in left["0"]
    assert "not real" in left["1"]


# --- Blocks ---------------------------------------------------------------------------

BLOCKS = [f"blocks{stage}.{i}" for stage in range(1, 5) for i in range(2)]


@pytest.mark.parametrize("made", [Uniformer, Recognizer])
def test_everything_is_shared(made):
    model = made()
    modules = dict(model.named_modules())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    keys, values = list(model.state_dict()), copy.deepcopy(model.state_dict())
    report = kernelize(model)
    prefix = "backbone." if made is Recognizer else ""
    assert report.blocks == [prefix + name for name in BLOCKS]
    assert report.convolutions == []
    assert str(report) == "replaced 8 UniFormer blocks and 0 depthwise convolutions"
    assert list(model.state_dict()) == keys
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert list(after) == list(tensors)
    assert all(after[name] is tensors[name] for name in tensors)
    for name, module in model.named_modules():
        assert module is modules[name] or name.endswith("drop_path")
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name])
    again = kernelize(model)
    assert (again.blocks, again.convolutions, again.left) == ([], [], {})


def test_nothing_else_changes():
    """Random numbers, the backend, gradients, and which parts train."""
    model = Uniformer(drop_path=0.2).train()
    model.blocks1[1].norm1.eval()
    model.blocks2[1].drop_path.eval()
    model.blocks3[0].requires_grad_(False)
    training = [m.training for n, m in model.named_modules() if "attn_drop" not in n]
    wanted = [p.requires_grad for p in model.parameters()]
    state, asked = torch.get_rng_state(), current_backend()
    kernelize(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert current_backend() == asked
    assert [m.training for m in model.modules()] == training
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())


def test_it_is_saved_copied_and_loaded():
    theirs = Uniformer(drop_path=0.2)
    ours = copy.deepcopy(theirs)
    kernelize(ours)
    x = torch.randn(2, 3, 3, 64, 96)
    want = ours.eval()(x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(ours)):
        assert type(other.blocks1[0]) is LocalBlockNCTHW
        assert torch.equal(other(x), want)
    fresh = Uniformer()
    fresh.load_state_dict(ours.state_dict())
    torch.testing.assert_close(fresh.eval()(x), want, rtol=1e-4, atol=1e-5)
    kernelize(fresh)
    fresh.load_state_dict(theirs.state_dict())
    assert torch.equal(fresh(x), want)


def test_a_block_without_numbers():
    with torch.device("meta"):
        block = SABlock(16, 2)
        assert kernelize(block).blocks == ["the model itself"]
    assert all(p.is_meta for p in block.parameters())
    assert block(torch.zeros(1, 16, 2, 3, 3, device="meta")).shape == (1, 16, 2, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_blocks_of_any_dtype(dtype):
    model = nn.Sequential(CBlock(16), SplitSABlock(16, 2)).to(dtype)
    assert kernelize(model).blocks == ["0", "1"]
    assert all(p.dtype == dtype for p in model.parameters())


class Recorder:
    """What cannot be copied, as little as a profiler can."""

    def __init__(self):
        self.lock, self.shapes = threading.Lock(), []

    def hook(self, block, args, y):
        with self.lock:
            self.shapes.append((args[0].shape, y.shape))


def test_a_hook_on_a_whole_block_sees_what_it_did():
    block, recorder = CBlock(16), Recorder()
    block.register_forward_hook(recorder.hook)
    assert kernelize(block).blocks == ["the model itself"]
    assert recorder.shapes == []  # not in the trial
    block(torch.randn(2, 16, 1, 3, 4))
    assert recorder.shapes == [((2, 16, 1, 3, 4), (2, 16, 1, 3, 4))]


def test_synchronised_norms_stay_so_and_the_trial_asks_no_other_process():
    block = nn.SyncBatchNorm.convert_sync_batchnorm(CBlock(16))
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        assert kernelize(block).blocks == ["the model itself"]
    finally:
        torch.distributed.destroy_process_group()
    assert type(block.norm1) is type(block.norm2) is nn.SyncBatchNorm


def test_where_nothing_is_dropped_it_does_not_matter_what_would_be():
    assert kernelize(DropsOnePath(16)).blocks == ["the model itself"]
    block = SABlock(16, 2)
    block.attn = DropsBeforeProjecting(16, 2, 0.0)
    assert kernelize(block).blocks == ["the model itself"]


def test_our_own_network_is_left_in_peace():
    report = kernelize(UniFormer(PRESETS["uniformer_nano"]))
    assert (report.blocks, report.convolutions, report.left) == ([], [], {})


def test_a_block_that_was_left_is_taken_once_it_fits():
    block = CBlock(16)
    hook = block.attn.register_forward_hook(lambda *_: None)
    assert kernelize(block).convolutions == ["pos_embed", "attn"]
    hook.remove()
    assert kernelize(block).blocks == ["the model itself"]
    assert kernelize(block).left == {}


# --- Blocks that are left -------------------------------------------------------------


class PostNorm(SABlock):
    """The same parts, in another order."""

    def forward(self, x):
        x = x + self.pos_embed(x)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.norm1(self.drop_path(self.attn(tokens)))
        tokens = tokens + self.norm2(self.drop_path(self.mlp(tokens)))
        return tokens.transpose(1, 2).reshape(x.shape)


class OnlyInTraining(CBlock):
    def forward(self, x):
        return super().forward(x) * (2 if self.training else 1)


class DropsOnePath(CBlock):
    def forward(self, x):
        x = x + self.pos_embed(x)
        x = x + self.drop_path(self.conv2(self.attn(self.conv1(self.norm1(x)))))
        return x + self.mlp(self.norm2(x))


class DropsBeforeProjecting(Attention):
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = self.attn_drop((self.scale * (q @ k.mT)).softmax(-1)) @ v
        return self.proj(self.proj_drop(out.transpose(1, 2).flatten(2)))


class DropsWhatIsAggregated(Attention):
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = self.attn_drop((self.scale * (q @ k.mT)).softmax(-1) @ v)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class DropsNoAffinity(Attention):
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = (self.scale * (q @ k.mT)).softmax(-1) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class WithClassToken(SABlock):
    def forward(self, cls_token, x):
        return cls_token, super().forward(x)


class Pair(SABlock):
    def forward(self, x):
        return super().forward(x), None


class OwnKeys(CBlock):
    def state_dict(self, *args, **kwargs):
        return {}


class DropsElements(DropPath):
    def forward(self, x):
        return nn.functional.dropout(x, self.drop_prob, self.training)


class TwiceNorm(nn.LayerNorm):
    def forward(self, input):
        return 2 * super().forward(input)


def changed(block, **parts):
    for path, part in parts.items():
        parent, _, name = path.replace("__", ".").rpartition(".")
        setattr(block.get_submodule(parent), name, part)
    return block


def zeroed(block):
    """Nothing comes out of its branches."""
    for layer in (block.attn.proj, block.mlp.fc2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for norm in (block.norm1, block.norm2):
        nn.init.zeros_(norm.bias)
    return block


def hooked(block, name):
    block.get_submodule(name).register_forward_hook(lambda *_: None)
    return block


def scaled():
    block = SABlock(16, 2)
    block.gamma_1 = nn.Parameter(torch.ones(16))
    block.gamma_2 = nn.Parameter(torch.ones(16))
    return block


def parametrized():
    block = CBlock(16)
    nn.utils.parametrizations.weight_norm(block.conv1)
    return block


def compiled():
    block = CBlock(16)
    block.compile(backend="eager")
    return block


def rebound():
    block = SABlock(16, 2)
    inner = block.forward
    block.forward = lambda x: 2 * inner(x)
    return block


def lacking():
    block = SplitSABlock(16, 2)
    del block.t_norm
    return block


def conv(*args, **kwargs):
    return nn.Conv3d(16, 16, *args, **kwargs)


REFUSED = {
    "layer scale": (scaled, "has gamma_1 and gamma_2, unlike"),
    "a part more": (lambda: changed(CBlock(16), ls1=nn.Identity()), "has ls1, unlike"),
    "a part less": (lacking, "has no t_norm"),
    "2-D": (
        lambda: changed(SABlock(16, 2), pos_embed=nn.Conv2d(16, 16, 3, padding=1, groups=16)),
        "pos_embed is a Conv2d",
    ),
    "not depthwise": (lambda: changed(CBlock(16), attn=conv(5, padding=2)), "attn has 16 channels"),
    "stride": (
        lambda: changed(CBlock(16), pos_embed=conv(3, 2, padding=1, groups=16)),
        "pos_embed has stride",
    ),
    "not pointwise": (lambda: changed(CBlock(16), conv2=conv(3, padding=1)), "conv2 is Conv3d"),
    "ReLU": (lambda: changed(CBlock(16), mlp__act=nn.ReLU()), "mlp.act is a ReLU"),
    "tanh": (
        lambda: changed(SABlock(16, 2), mlp__act=nn.GELU("tanh")),
        "not the exact GELU",
    ),
    "another norm": (lambda: changed(SABlock(16, 2), norm2=TwiceNorm(16)), "norm2 is a TwiceNorm"),
    "a norm that does not scale": (
        lambda: changed(CBlock(16), norm1=nn.BatchNorm3d(16, affine=False)),
        "does not scale",
    ),
    "heads": (lambda: changed(SABlock(16, 2), attn__num_heads=3), "num_heads is 3"),
    "a learned scale": (
        lambda: changed(SABlock(16, 2), attn__scale=torch.ones(())),
        "attn.scale is a Tensor",
    ),
    "hooks": (lambda: hooked(SABlock(16, 2), "mlp.fc1"), "mlp.fc1 has hooks"),
    "hooks on a group": (lambda: hooked(SABlock(16, 2), "attn"), "attn has hooks"),
    "parametrized": (parametrized, "kernelize first, then parametrize"),
    "compiled": (compiled, "kernelize first, then compile"),
    "a forward replaced": (rebound, "its forward has been replaced"),
    "complex": (lambda: changed(CBlock(16), conv1=conv(1, dtype=torch.cfloat)), "torch.complex64"),
    "a method hidden": (lambda: changed(CBlock(16), fused=True), "attribute fused"),
    "keys of its own": (lambda: OwnKeys(16), "state_dict of its own"),
    "not scaled up": (
        lambda: changed(CBlock(16), drop_path=DropPath(0.3, scale_by_keep=False)),
        "scale up the others",
    ),
    "elements dropped": (
        lambda: changed(SABlock(16, 2), drop_path=DropsElements(0.3)),
        "whole samples",
    ),
    "all dropped": (lambda: changed(CBlock(16), drop_path=DropPath(1.0)), "with drop_prob 1.0"),
    "other stochastic depth": (
        lambda: changed(CBlock(16), drop_path=nn.Dropout(0.1)),
        "drop_path is a Dropout",
    ),
    "another order": (lambda: PostNorm(16, 2), "other numbers than ours in eval mode"),
    "another order, of zeros": (lambda: zeroed(PostNorm(16, 2)), "other numbers than ours in eval"),
    "one branch never dropped": (lambda: DropsOnePath(16, 0.2), "other numbers than ours"),
    "otherwise in training": (lambda: OnlyInTraining(16), "other numbers than ours in training"),
    "dropout elsewhere": (
        lambda: changed(SABlock(16, 2), attn=DropsBeforeProjecting(16, 2, 0.3)),
        "other numbers than ours",
    ),
    "affinities not dropped": (
        lambda: changed(SABlock(16, 2), attn=DropsNoAffinity(16, 2, 0.3)),
        "than affinities",
    ),
    "what they aggregate dropped": (
        lambda: changed(SABlock(16, 2), attn=DropsWhatIsAggregated(16, 2, 0.3)),
        "than affinities",
    ),
    "more arguments": (lambda: WithClassToken(16, 2), "ended in TypeError"),
    "more results": (lambda: Pair(16, 2), "does not give a tensor"),
}


@pytest.mark.parametrize(("made", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_differs_is_left_as_it_is_and_said_why(made, reason):
    model = nn.Sequential(made(), CBlock(16))
    types = [type(m) for m in model[0].modules() if not isinstance(m, nn.Conv3d)]
    values = copy.deepcopy(nn.Module.state_dict(model))
    state = torch.get_rng_state()
    report = kernelize(model)
    assert report.blocks == ["1"]
    assert reason in report.left["0"]
    assert f"  left 0: {report.left['0']}" in str(report)
    assert [type(m) for m in model[0].modules() if not isinstance(m, nn.Conv3d)] == types
    assert torch.equal(torch.get_rng_state(), state)
    after = nn.Module.state_dict(model)
    assert all(torch.equal(value, after[name]) for name, value in values.items())
    model[1](torch.zeros(1, 16, 2, 3, 4))


def test_its_convolutions_are_replaced_all_the_same():
    block, x = PostNorm(16, 2), torch.randn(2, 16, 2, 3, 4)
    want = block(x)
    assert kernelize(block).convolutions == ["pos_embed"]
    torch.testing.assert_close(block(x), want, rtol=1e-4, atol=1e-5)


def test_parts_that_two_modules_share_stay():
    """A second user would be given channels-last tensors; a whole block may be shared."""
    model = nn.Sequential(SABlock(16, 2), SABlock(16, 2), CBlock(16))
    model[1].mlp = model[0].mlp
    model.append(model[2])
    report = kernelize(model)
    assert report.blocks == ["2"]
    assert report.left == {
        "0": "mlp is part of another module, too", "1": "mlp is part of another module, too",
    }  # fmt: skip
    model(torch.randn(2, 16, 2, 3, 4))

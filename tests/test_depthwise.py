"""Drop-in depthwise convolutions, and the replacement of others' in place."""

import copy
import warnings

import pytest
import torch
from torch import nn

from uniformer import DepthwiseConv3d, kernelize
from uniformer import depthwise as module


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
    assert report.replaced == ["1", "7.0"]
    for name, reason in {
        "3": "stride (1, 2, 2)", "4": "dilation (2, 2, 2)", "5": "4 groups", "6": "16 out",
        "8": "padding (0, 0, 0)", "9": "padding mode 'replicate'", "10": "kernel (3, 4, 3)",
        "11": "it is a Sub",
    }.items():  # fmt: skip
        assert reason in report.left[name]
    assert len(report.left) == 8
    assert "2 depthwise convolutions run on the kernels\n  left 3: stride" in str(report)
    assert all(p is parameters[n] for n, p in model.named_parameters())

    x = torch.randn(2, 3, 5, 12, 13)
    y, want = model(x), before(x)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    want.square().sum().backward()
    for got, other in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(got.grad, other.grad, rtol=1e-3, atol=1e-4)
    assert kernelize(model).replaced == []  # once is enough


def test_kernelize_a_lone_convolution():
    conv = nn.Conv3d(4, 4, 3, padding=1, groups=4)
    assert kernelize(conv).replaced == ["the model itself"]
    assert type(conv) is DepthwiseConv3d


def test_it_is_a_conv3d():
    ours = DepthwiseConv3d(8, 8, 5, padding=2, groups=8)
    theirs = nn.Conv3d(8, 8, 5, padding=2, groups=8)
    ours.load_state_dict(theirs.state_dict())
    for shape in ((2, 8, 3, 7, 6), (8, 3, 7, 6)):
        x = torch.randn(shape)
        y = ours(x)
        torch.testing.assert_close(y, theirs(x), rtol=1e-4, atol=1e-5)
    last = x.unsqueeze(0).contiguous(memory_format=torch.channels_last_3d)
    assert ours(last).is_contiguous(memory_format=torch.channels_last_3d)
    assert ours(x.unsqueeze(0)).is_contiguous()  # a `view` may follow


def test_what_the_kernels_do_not_serve_runs_as_conv3d_and_says_so_once(caplog, monkeypatch):
    monkeypatch.setattr(module, "_announced", set())
    conv = DepthwiseConv3d(8, 8, 3, stride=2, padding=1, groups=8)
    x = torch.randn(1, 8, 4, 6, 6)
    for _ in range(2):
        torch.testing.assert_close(conv(x), nn.Conv3d.forward(conv, x))
    (record,) = caplog.records
    assert "stride (2, 2, 2): not 1" in record.message


def test_a_wrong_rank_is_refused():
    with pytest.raises(ValueError, match="the input must be"):
        DepthwiseConv3d(8, 8, 3, padding=1, groups=8)(torch.zeros(8, 3))


def test_torch_jit_takes_it_as_a_conv3d():
    conv = kernelized = DepthwiseConv3d(4, 4, 3, padding=1, groups=4)
    x = torch.randn(1, 4, 2, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        for jitted in (torch.jit.script(conv), torch.jit.trace(kernelized, x)):
            torch.testing.assert_close(jitted(x), conv(x), rtol=1e-4, atol=1e-5)
            assert "uniformer" not in str(jitted.inlined_graph.findAllNodes("uniformer::dwconv3d"))


def test_what_is_not_served_compiles_whole():
    conv = DepthwiseConv3d(8, 8, 3, stride=2, padding=1, groups=8)
    x = torch.randn(1, 8, 4, 6, 6)
    compiled = torch.compile(conv, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), conv(x))


def test_parametrized_and_complex_convolutions_are_left():
    normed = nn.utils.parametrizations.spectral_norm(nn.Conv3d(8, 8, 3, padding=1, groups=8))
    model = nn.Sequential(normed, nn.Conv3d(8, 8, 3, padding=1, groups=8, dtype=torch.complex64))
    left = kernelize(model).left
    assert "kernelize first" in left["0"]
    assert "not real" in left["1"]


def test_shapes_come_without_numbers_too():
    conv = DepthwiseConv3d(8, 8, 3, padding=1, groups=8, device="meta")
    assert conv(torch.zeros(1, 8, 2, 4, 4, device="meta")).shape == (1, 8, 2, 4, 4)

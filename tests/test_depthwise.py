"""Drop-in depthwise convolutions."""

import warnings

import pytest
import torch
from torch import nn

from uniformer import DepthwiseConv3d
from uniformer import depthwise as module


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


def test_shapes_come_without_numbers_too():
    conv = DepthwiseConv3d(8, 8, 3, padding=1, groups=8, device="meta")
    assert conv(torch.zeros(1, 8, 2, 4, 4, device="meta")).shape == (1, 8, 2, 4, 4)

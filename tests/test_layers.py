"""The layers alone, against the equations of the paper."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from uniformer.layers import DPE, FFN, DropPath, GlobalMHRA, LocalMHRA, PatchEmbed, batch_norm


def test_dpe_adds_a_depthwise_convolution():
    layer = DPE(6)
    x = torch.randn(2, 3, 4, 5, 6)
    ncthw = x.permute(0, 4, 1, 2, 3)
    conv = nn.Conv3d(6, 6, 3, padding=1, groups=6)
    conv.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), (ncthw + conv(ncthw)).permute(0, 2, 3, 4, 1))


@pytest.mark.parametrize("tube_size", [3, 5, 7, 9])
def test_local_mhra_aggregates_values_in_the_tube(tube_size):
    """Equation 6 at one token: a sum over its neighbourhood, weighted by offset."""
    layer = LocalMHRA(4, tube_size).double()
    x = torch.randn(1, 5, 6, 7, 4, dtype=torch.float64)
    values = F.linear(x, layer.conv1.weight.flatten(1), layer.conv1.bias)
    r, t, h, w = tube_size // 2, 2, 1, 6
    total = layer.attn.bias.clone()
    for i in range(5):
        for j in range(6):
            for k in range(7):
                if max(abs(i - t), abs(j - h), abs(k - w)) <= r:
                    weight = layer.attn.weight[:, 0, i - t + r, j - h + r, k - w + r]
                    total = total + weight * values[0, i, j, k]
    want = layer.conv2.weight.flatten(1) @ total + layer.conv2.bias
    torch.testing.assert_close(layer(x)[0, t, h, w], want)


def test_global_mhra_is_multi_head_attention():
    layer = GlobalMHRA(12, 3).eval()
    other = nn.MultiheadAttention(12, 3, batch_first=True).eval()
    other.in_proj_weight.data, other.in_proj_bias.data = layer.qkv.weight.data, layer.qkv.bias.data
    other.out_proj.load_state_dict(layer.proj.state_dict())
    x = torch.randn(2, 2, 3, 4, 12)
    tokens = x.flatten(1, 3)
    want = other(tokens, tokens, tokens, need_weights=False)[0]
    torch.testing.assert_close(layer(x), want.view(x.shape))
    torch.testing.assert_close(layer(tokens), want)


def test_global_mhra_needs_whole_heads():
    with pytest.raises(ValueError, match="multiple of num_heads"):
        GlobalMHRA(10, 3)


@pytest.mark.parametrize("conv", [False, True])
def test_ffn(conv):
    layer = FFN(6, 24, conv=conv)
    assert layer.fc1.weight.shape == ((24, 6, 1, 1, 1) if conv else (24, 6))
    x = torch.randn(2, 3, 4, 5, 6)
    hidden = x @ layer.fc1.weight.view(24, 6).T + layer.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden * 0.5**0.5))
    torch.testing.assert_close(layer(x), hidden @ layer.fc2.weight.view(6, 24).T + layer.fc2.bias)


def test_patch_embed_projects_and_normalises():
    layer = PatchEmbed(3, 8, (3, 4, 4), (2, 4, 4), (1, 0, 0))
    y = layer(torch.randn(2, 5, 9, 8, 3))
    assert y.shape == (2, 3, 2, 2, 8)
    torch.testing.assert_close(y.mean(-1), torch.zeros(2, 3, 2, 2), atol=1e-5, rtol=0)
    assert layer.norm.eps == 1e-5


def test_batch_norm_over_channels_last():
    norm = nn.BatchNorm3d(6)
    x = torch.randn(2, 3, 4, 5, 6) * 3 + 1
    y = batch_norm(norm, x)
    assert y.is_contiguous()
    flat = y.flatten(0, 3)
    torch.testing.assert_close(flat.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat.var(0, correction=0), torch.ones(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.flatten(0, 3).mean(0))


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    layer = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    y = layer(x)
    assert set(y.flatten().mul(0.75).tolist()) == {0.0, 1.0}
    assert (y == y[:, :1, :1]).all()
    assert abs(float(y.mean()) - 1) < 0.05
    assert layer.eval()(x) is x
    assert not DropPath(1.0)(x).any()
    assert DropPath(0.0)(x) is x

"""A training step of UniFormer-S, 16 x 224 x 224, by where its depthwise convolutions run."""

import pytest
import torch
import torch.nn.functional as F

import uniformer.layers as layers
from uniformer import create_model
from uniformer_kernels.dwconv3d import dwconv3d, dwconv3d_ref


def ncthw(x, weight, bias=None, *, residual=False):
    """PyTorch's convolution in its own layout, as in networks that keep (B, C, T, H, W)."""
    padding = [k // 2 for k in weight.shape[2:]]
    y = F.conv3d(x.permute(0, 4, 1, 2, 3).contiguous(), weight, bias, 1, padding, 1, x.shape[-1])
    y = y.permute(0, 2, 3, 4, 1).contiguous()
    return x + y if residual else y


PROVIDERS = {
    "PyTorch NCTHW": ncthw,
    "PyTorch channels_last_3d": dwconv3d_ref,
    "uniformer": dwconv3d,
}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_training_step(benchmark, provider, monkeypatch):
    benchmark.group = "training step of uniformer_small, 1 x 16 x 224 x 224, fp32"
    monkeypatch.setattr(layers, "dwconv3d", PROVIDERS[provider])
    torch.manual_seed(0)
    model = create_model("uniformer_small", drop_path_rate=0.0)
    clip, label = torch.randn(1, 3, 16, 224, 224), torch.tensor([0])

    def step():
        F.cross_entropy(model(clip), label).backward()
        model.zero_grad()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)

"""The formula behind the golden values, and how a tensor is held to them."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "golden"


def golden(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text())


def generator(key: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))


def value(key: str, shape: tuple[int, ...]) -> Tensor:
    """The weight called `key`, in float64."""
    g = generator(key)
    if key.endswith("num_batches_tracked"):
        array = np.zeros(shape)
    elif key.endswith("running_var"):
        array = g.uniform(0.5, 1.5, shape)
    elif key.endswith("running_mean"):
        array = 0.1 * g.standard_normal(shape)
    elif len(shape) == 1 and key.endswith("weight"):
        array = g.uniform(0.8, 1.2, shape)
    elif len(shape) <= 1 or key.endswith("bias"):
        array = 0.05 * g.standard_normal(shape)
    else:
        array = g.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(array))


def fill(model: nn.Module) -> nn.Module:
    """Give a float32 model the weights of the formula."""
    state = {k: value(k, tuple(v.shape)).to(v.dtype) for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    return model


def clip(shape: list[int]) -> Tensor:
    name = "input:" + "x".join(map(str, shape))
    return torch.from_numpy(generator(name).standard_normal(shape))


def assert_close(got: Tensor, want: list[float], rtol: float, name: str = "") -> None:
    """All values within `rtol` of the largest wanted one."""
    wanted = torch.tensor(want, dtype=torch.float64)
    error = (got.detach().double().flatten() - wanted).abs().max() / wanted.abs().max()
    assert error <= rtol, f"{name}: relative error {error:.1e} > {rtol:.0e}"


def assert_fingerprint(got: Tensor, want: dict[str, Any], rtol: float, name: str = "") -> None:
    """Shape, mean, root mean square, and 16 values; all relative to the root mean square."""
    got = got.detach().double()
    assert list(got.shape) == want["shape"], name
    flat = got.contiguous().flatten()
    sample = flat[torch.tensor(want["index"])]
    scale = max(want["rms"], 1e-300)
    errors = {
        "mean": abs(float(flat.mean()) - want["mean"]),
        "rms": abs(float(flat.square().mean().sqrt()) - want["rms"]),
        "values": float((sample - torch.tensor(want["value"], dtype=torch.float64)).abs().max()),
    }
    for what, error in errors.items():
        assert error / scale <= rtol, f"{name}, {what}: relative error {error / scale:.1e}"

"""The one yardstick of operators: no worse than the same dtype run through plain PyTorch."""

from collections.abc import Callable

import torch
from torch import Tensor


def run(fn: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    """[y, *gradients of the inputs]."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = fn(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_matches(op, ref, inputs: list[Tensor], slack: float = 2.0) -> None:
    """Forward and every gradient of `op` against `ref` run in fp64.

    The bound is `slack` times the error `ref` itself makes in the inputs' dtype, plus that
    dtype's epsilon at the tensor's scale.
    """
    dy = torch.randn_like(op(*inputs))
    got = run(op, inputs, dy)
    near = run(ref, inputs, dy)
    true = run(ref, [t.double() for t in inputs], dy.double())
    names = ["y", *(f"grad of input {i}" for i in range(len(inputs)))]
    for name, g, n, t in zip(names, got, near, true, strict=True):
        assert (g.shape, g.dtype) == (n.shape, n.dtype), name
        bound = slack * (n - t).abs().max() + torch.finfo(g.dtype).eps * t.abs().max()
        err = (g - t).abs().max()
        assert err <= bound, f"{name}: error {err:.3e} > bound {bound:.3e}"

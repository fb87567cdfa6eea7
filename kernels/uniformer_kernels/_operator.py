"""How an operator is told to PyTorch, and how it is called without PyTorch's dispatcher.

`torch.library` makes an operator known to compilers, exporters and counters, but a call through
its dispatcher takes 20-50 us. Where nothing but autograd listens, `Operator` goes straight to the
kernel, and with gradients to the `torch.autograd.Function` around it.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from uniformer_kernels import _runtime

__all__ = ["Operator", "once_differentiable", "only_autograd_listens"]

SECOND = (
    "this operator's gradient has none of its own; take gradients of gradients under "
    "uniformer_kernels.backend('reference'), forward and backward"
)

_library = torch.library.Library("uniformer", "FRAGMENT")


class Operator:
    """The operator `torch.ops.uniformer.<name>`; calling it runs it.

    Args:
        schema: its name, arguments and results, in PyTorch's words.
        kernel: what runs, on any device, below autograd.
        fake: shapes and dtypes of the results, for compilers.
        plain: the same in plain PyTorch, for a batched backward pass (`is_grads_batched`); without
            it, that raises.
    """

    def __init__(
        self, schema: str, kernel: Callable, fake: Callable, plain: Callable | None = None
    ) -> None:
        self.name = schema.partition("(")[0]
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        self.packet = getattr(torch.ops.uniformer, self.name)
        self.op = self.packet.default
        self.kernel, self.plain = kernel, plain
        self.function: Any = None
        torch.library.impl(_library, self.name, "CompositeExplicitAutograd")(kernel)
        torch.library.register_fake(f"uniformer::{self.name}", fake, lib=_library)

    def differentiable(self, function: Any) -> Any:
        """Decorates the `torch.autograd.Function` whose forward calls `below_autograd`."""
        self.function = function
        _library.impl(self.op, partial(_under_autograd, self), "Autograd")
        return function

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.op(*args)
        if _runtime.functorch_is_active():  # in a batched backward pass
            if self.plain is None:
                raise RuntimeError(
                    f"{self.name} has no batched gradient; under "
                    f"uniformer_kernels.backend('reference') it has"
                )
            return self.plain(*args)
        if not only_autograd_listens(args):
            return self.op(*args)
        return self.function.apply(*args) if _needs_gradient(args) else self.kernel(*args)

    def goes_straight(self, args: Sequence) -> bool:
        """Whether a call goes past the dispatcher to a `torch.autograd.Function`."""
        if torch.compiler.is_compiling() or _runtime.functorch_is_active():
            return False
        return only_autograd_listens(args) and _needs_gradient(args)

    def below_autograd(self, *args: Any) -> Any:
        """What a gradient's forward calls."""
        if not torch.compiler.is_compiling() and only_autograd_listens(args):
            return self.kernel(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.op(*args)


def once_differentiable(backward: Callable) -> Callable:
    """Decorates a gradient that has none of its own: one through it raises.

    PyTorch's decorator lets it pass where the gradient that comes in is a constant, or where only
    that of some of the leaves is asked for; the second derivative by way of what was saved is then
    missing without a word.
    """

    @wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        graph = torch.is_grad_enabled()  # as with create_graph=True
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not graph or torch.compiler.is_compiling():
            return found
        made = [t for t in found if t is not None]
        inputs = [t for t in (*ctx.saved_tensors, *grads) if t is not None]
        raising = iter(_Raising.apply(len(made), *made, *inputs))
        return tuple(None if t is None else next(raising) for t in found)

    return run


class _Raising(torch.autograd.Function):
    """Gradients, and all that they depend on: whoever derives them raises."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(SECOND)


def _under_autograd(operator: Operator, *args: Any) -> Any:
    """What the dispatcher runs under its Autograd key."""
    if _needs_gradient(args):
        return operator.function.apply(*args)
    return operator.below_autograd(*args)


def _needs_gradient(args: Sequence) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(a.requires_grad for a in args if isinstance(a, Tensor))


def only_autograd_listens(args: Sequence) -> bool:
    """No mode such as a counter of operations, and tensors as plain as they come."""
    if torch._C._len_torch_dispatch_stack():
        return False
    # Written out: it is done in every call, and one in Python costs as much as some of these.
    for t in args:
        if not isinstance(t, Tensor):
            continue
        if type(t) is not Tensor and type(t) is not Parameter:
            return False
        # Memory of its own that says what it holds, not to be negated first.
        if not torch._C._has_storage(t) or t.is_neg() or t._is_zerotensor():
            return False
    return True

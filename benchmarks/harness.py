"""Time several providers of one computation side by side, each checked before it is timed.

A `Case` says what is computed and at which size; its `Problem` holds the tensors and, for each
provider, how to compute it. A provider whose result or gradients are off is reported, not timed,
and one that raises is a row that says why. Times of the providers are taken in turns, so that a
slow minute of the machine is slow for all of them.

Shapes: B clips, T frames, H rows, W columns, C channels; problems are stated in (B, T, H, W, C).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import DTYPES, rounded, said, statistics, take_turns

__all__ = [
    "DIRECTIONS", "Case", "Problem", "Provider", "Ready", "is_chosen", "measure", "prepare",
    "truth_dtype",
]  # fmt: skip

DIRECTIONS = ("forward", "backward", "both")
# Relative error, norm over norm, of results and gradients: sums of a few thousand terms in the
# dtype. A wrong tap, tile or sign costs 0.1 and more.
TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2}


@dataclass(frozen=True)
class Provider:
    """One way to compute a problem.

    Attributes:
        fn: of x and the parameters.
        parameters: what else gradients are wanted of.
        layout: the memory format of (B, C, T, H, W) that `fn` takes and gives; None for
            (B, T, H, W, C).
    """

    fn: Callable[..., Tensor]
    parameters: Sequence[Tensor] = ()
    layout: torch.memory_format | None = None


@dataclass(frozen=True)
class Problem:
    """The tensors of a case.

    Attributes:
        x: the input.
        providers: by name.
        truth: the same in higher precision; takes `x` in its own dtype.
        truth_dtype: that dtype.
    """

    x: Tensor
    providers: Mapping[str, Provider]
    truth: Provider
    truth_dtype: torch.dtype = torch.float64


def truth_dtype(device: str) -> torch.dtype:
    """What is held for true: fp64, but on a GPU fp32, for fp64 would take all of a lease."""
    return torch.float64 if device == "cpu" else torch.float32


@dataclass(frozen=True)
class Case:
    """What is computed, at which size, and what it costs at least.

    Attributes:
        op: the operator, layer or block.
        case: its shape, in words.
        stage: of the network, 1 to 4.
        batch: B.
        dtype: "fp32", "fp16" or "bf16".
        make: the problem, on a device.
        bytes: fewest bytes that must move, of a forward and of a backward pass.
        flops: operations of a forward and of a backward pass, 2 for a multiply-add.
        unit: what does most of them: "fma", fp32 multiply-adds, or "gemm", matrix units.
        autocast: run under autocast to `dtype`, with parameters in fp32.
        slack: how many times the usual error is allowed.
    """

    op: str
    case: str
    stage: int
    batch: int
    dtype: str
    make: Callable[[str], Problem] = field(repr=False)
    bytes: tuple[int, int] = (0, 0)
    flops: tuple[int, int] = (0, 0)
    unit: str = "gemm"
    autocast: bool = False
    slack: float = 1.0

    def cost(self, direction: str) -> tuple[int, int]:
        """Bytes and operations of a direction."""
        both = sum(self.bytes), sum(self.flops)
        return {
            "forward": (self.bytes[0], self.flops[0]),
            "backward": (self.bytes[1], self.flops[1]),
            "both": both,
        }[direction]

    def floor_ms(self, direction: str, ceilings: Mapping[str, float]) -> float:
        """Milliseconds below which a machine with these ceilings cannot come."""
        moved, flops = self.cost(direction)
        rate = ceilings[f"{'fp32' if self.unit == 'fma' else self.dtype}_TFLOPs"]
        return max(moved / ceilings["copy_GBps"] / 1e6, flops / rate / 1e9)

    def __str__(self) -> str:
        return f"{self.op} {self.case} B={self.batch} {self.dtype}"


# --- One case -------------------------------------------------------------------------


class Ready:
    """A provider with its inputs laid out, to be called again and again."""

    def __init__(self, provider: Provider, x: Tensor, dy: Tensor | None, autocast: str) -> None:
        self.provider, self.autocast = provider, DTYPES[autocast]
        self.x = self._laid(x).requires_grad_()
        self.leaves = [self.x, *(p.requires_grad_() for p in provider.parameters)]
        self.y: Tensor | None = None
        self.dy = None if dy is None else self._laid(dy)

    def _laid(self, t: Tensor) -> Tensor:
        if self.provider.layout is None or t.ndim != 5:
            return t.detach().clone()
        t = t.detach().permute(0, 4, 1, 2, 3)
        return t.contiguous(memory_format=self.provider.layout)

    def plain(self, t: Tensor) -> Tensor:
        """As the problem is stated: (B, T, H, W, C)."""
        return t if self.provider.layout is None or t.ndim != 5 else t.permute(0, 2, 3, 4, 1)

    def _call(self) -> Tensor:
        if self.autocast == torch.float32:
            return self.provider.fn(self.x, *self.provider.parameters)
        with torch.autocast(self.x.device.type, self.autocast):
            return self.provider.fn(self.x, *self.provider.parameters)

    def forward(self) -> None:
        with torch.no_grad():
            self._call()

    def backward(self) -> None:
        if self.y is None:
            self.y = self._call()
        torch.autograd.grad(self.y, self.leaves, self.dy, retain_graph=True)

    def both(self) -> None:
        torch.autograd.grad(self._call(), self.leaves, self.dy)

    def results(self) -> list[Tensor]:
        """y, dx and the gradients of the parameters; the first two as the problem is stated."""
        y = self._call()
        self.dy = self._laid(_gradient_like(self.plain(y))) if self.dy is None else self.dy
        self.dy = self.dy.to(y.dtype)
        dx, *rest = torch.autograd.grad(y, self.leaves, self.dy)
        return [self.plain(y.detach()), self.plain(dx), *rest]


def _gradient_like(y: Tensor) -> Tensor:
    generator = torch.Generator(y.device).manual_seed(1)
    return torch.randn(y.shape, device=y.device, dtype=y.dtype, generator=generator)


def _error(got: Sequence[Tensor], want: Sequence[Tensor]) -> tuple[float, str]:
    """The largest relative error, and of what."""
    names = ["the result", "the gradient of x"]
    worst = (0.0, names[0])
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        name = names[i] if i < 2 else f"the gradient of parameter {i - 1}"
        if g.numel() != w.numel():
            return float("inf"), f"{name}: {tuple(g.shape)}, not {tuple(w.shape)}"
        difference = (g.reshape(w.shape).to(w.dtype) - w).norm()
        error = float(difference / w.norm().clamp_min(1e-30))
        if not error <= worst[0]:  # so that what is no number is worst
            worst = (error, name)
    return worst


def measure(
    case: Case,
    device: str,
    ceilings: Mapping[str, float],
    *,
    seconds: float = 1.0,
    directions: Sequence[str] = DIRECTIONS,
    only: str | None = None,
) -> list[dict[str, Any]]:
    """Check every provider of a case, then time those that are right.

    Args:
        case: what to compute.
        device: "cpu" or "cuda".
        ceilings: of this machine, as `ceilings` measures them.
        seconds: to spend on each direction, about.
        directions: of `DIRECTIONS`.
        only: the one provider to run.

    Returns:
        A row for each provider and direction: times, or why there are none.
    """
    ready, failed, check = prepare(case, device, only)
    rows = []
    for direction in directions:
        fns = {name: getattr(r, direction) for name, r in ready.items()}
        failed_now: dict[str, str] = {}
        times = take_turns(fns, device, seconds, failed=failed_now)
        for name, ms in times.items():
            rows.append(_row(case, direction, name, ceilings) | statistics(ms))
        for name, why in (failed | failed_now).items():
            rows.append(_row(case, direction, name, ceilings) | {"failed": why})
    for name, candidate in ready.items():  # once more: what was right may have been so once
        why = check(candidate)
        if why:
            kept = [row for row in rows if row["provider"] != name]
            lost = [_row(case, d, name, ceilings) | {"failed": f"later {why}"} for d in directions]
            rows = kept + lost
    return rows


def prepare(
    case: Case, device: str, only: str | None = None
) -> tuple[dict[str, Ready], dict[str, str], Callable[[Ready], str]]:
    """Providers whose result and gradients are right, why the others are not among them, and what
    says why a provider is wrong, if it is."""
    problem = case.make(device)
    truth = Ready(problem.truth, problem.x.to(problem.truth_dtype), None, "fp32")
    want = truth.results()
    assert truth.dy is not None
    dy = truth.plain(truth.dy)

    def check(candidate: Ready) -> str:
        try:
            error, what = _error(candidate.results(), want)
        except Exception as raised:  # a rival may fail as it likes: its row says so
            return said(raised)
        allowed = TOLERANCE[case.dtype] * case.slack
        if error <= allowed:
            return ""
        return f"wrong: {what} is off by {error:.1e} of its norm, {allowed:.0e} is allowed"

    ready, failed = {}, {}
    for name, provider in problem.providers.items():
        if only in (None, name):
            candidate = Ready(provider, problem.x, dy, case.dtype if case.autocast else "fp32")
            why = check(candidate)
            if why:
                failed[name] = why
            else:
                ready[name] = candidate
    return ready, failed, check


def _row(case: Case, direction: str, provider: str, ceilings: Mapping[str, float]) -> dict:
    moved, flops = case.cost(direction)
    return {
        "op": case.op, "case": case.case, "stage": case.stage, "batch": case.batch,
        "dtype": case.dtype, "direction": direction, "provider": provider, "bytes": moved,
        "flops": flops, "unit": case.unit, "floor_ms": rounded(case.floor_ms(direction, ceilings)),
    }  # fmt: skip


def is_chosen(name: object, words: Sequence[str]) -> bool:
    """Whether a name has all of the words, of which "a|b" is either."""
    return all(any(part in str(name) for part in word.split("|")) for word in words)

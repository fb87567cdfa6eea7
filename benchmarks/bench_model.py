"""The whole network: inference and training steps, clips a second, memory and energy.

A training step is forward, cross entropy, backward and AdamW, without stochastic depth. Rivals are
the network in plain PyTorch, `plain.py`: as the official code has it (NCTHW, naive attention), and
in channels_last_3d with SDPA; on request also through torch.compile. On a CPU one clip is inferred
by ONNX Runtime and OpenVINO too, `runtimes.py`. Where the dtype has 16 bits all of PyTorch runs
under autocast, with fp32 parameters. Each is checked against plain PyTorch in fp32.
"""

import contextlib
import math
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import DTYPES, OURS, said, statistics, take_turns
from benchmarks.plain import PlainUniFormer
from benchmarks.runtimes import Elsewhere, runtimes
from benchmarks.shapes import PASSES
from uniformer import global_block, layers, local_block
from uniformer.configs import PRESETS
from uniformer.flops import count_macs
from uniformer.model import UniFormer
from uniformer_kernels import channel_stats

TOLERANCE = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 2e-1}
CLASSES = 400
MODES = ("inference", "training")
LEAST_TURNS = 15
SIZES = (128, 160, 192, 224, 256, 320)


@dataclass(frozen=True)
class Run:
    """A network, its clips and what is done with them.

    Attributes:
        model: "uniformer_small", ...
        frames: T.
        size: H and W, in pixels.
        batch: clips a step.
        dtype: "fp32", "fp16" or "bf16".
        mode: "inference" or "training".
    """

    model: str
    frames: int
    size: int
    batch: int
    dtype: str
    mode: str

    @property
    def clips(self) -> tuple[int, ...]:
        """The shape of the clips of a step."""
        return self.batch, 3, self.frames, self.size, self.size

    def __str__(self) -> str:
        return f"{self.model} {self.frames}x{self.size} B={self.batch} {self.dtype} {self.mode}"


LAYOUTS = {"NCTHW": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}
CAST = f"{OURS}, weights in bf16"  # what is left of the precision of autocast
FIRST_ON_CPU = Run("uniformer_small", 16, 224, 1, "fp32", "inference")


def runs(device: str, tiny: bool = False, full: bool = False) -> Iterator[Run]:
    """The most telling first: what a lease cuts short is the tail."""
    usual = dict.fromkeys(_usual_runs(device, tiny))
    yield from usual
    if full:
        every = product(
            ("uniformer_small", "uniformer_base"), (8, 16, 32), SIZES, (1, 8, 32), DTYPES, MODES
        )
        yield from (run for run in (Run(*fields) for fields in every) if run not in usual)


def _usual_runs(device: str, tiny: bool) -> Iterator[Run]:
    if tiny:
        yield Run("uniformer_nano", 4, 32, 2, "fp32", "training")
        yield Run("uniformer_nano", 4, 32, 1, "bf16", "inference")
    elif device == "cpu":
        yield from _runs_on_cpu()
    else:
        yield from _runs_on_gpu()


def _runs_on_cpu() -> Iterator[Run]:
    first = FIRST_ON_CPU
    for dtype in ("fp32", "bf16"):
        yield replace(first, dtype=dtype)
        yield replace(first, dtype=dtype, mode="training")
    for frames in (8, 32):
        yield replace(first, frames=frames)
    yield replace(first, size=128)
    yield replace(first, batch=4)
    yield replace(first, frames=1, size=32)  # the smallest there is: what the host alone takes
    for batch in (1, 2, 4):
        yield replace(first, frames=8, size=128, batch=batch, mode="training")


def _runs_on_gpu() -> Iterator[Run]:
    first = Run("uniformer_small", 16, 224, 32, "bf16", "inference")
    for model in ("uniformer_small", "uniformer_base"):
        for mode in reversed(MODES):
            yield replace(first, model=model, mode=mode)
    yield replace(first, batch=1)
    for batch in (8, 64):
        for mode in MODES:
            yield replace(first, batch=batch, mode=mode)
    for frames in (8, 32):
        yield replace(first, batch=1, frames=frames)
        yield replace(first, batch=16, frames=frames, mode="training")
        yield replace(first, batch=16, frames=frames)
    for size in SIZES:
        if size != 224:
            yield replace(first, batch=16, size=size)
    for frames in (8, 32):
        for mode in MODES:
            yield replace(first, model="uniformer_base", batch=16, frames=frames, mode=mode)
    for dtype in ("fp16", "fp32"):
        for mode in MODES:
            yield replace(first, batch=8, dtype=dtype, mode=mode)


# --- Providers ------------------------------------------------------------------------


def providers(run: Run, device: str, compiled: bool) -> dict[str, Callable[[], nn.Module]]:
    """How to make each network; all have the same parameters."""
    cfg = replace(PRESETS[run.model], num_classes=CLASSES, drop_path_rate=0.0)

    def made(module: nn.Module, layout: torch.memory_format | None = None) -> nn.Module:
        torch.manual_seed(0)
        module.load_state_dict(UniFormer(cfg).state_dict())
        if layout is not None:
            module = module.to(memory_format=layout)  # type: ignore[call-overload]
        return module.to(device).train(run.mode == "training")

    def plain() -> nn.Module:
        return made(PlainUniFormer(cfg))

    def channels_last() -> nn.Module:
        return made(PlainUniFormer(cfg, sdpa=True), torch.channels_last_3d)

    def ours() -> nn.Module:
        return made(UniFormer(cfg))

    def on_pytorch(layout: torch.memory_format) -> nn.Module:
        return _on(partial(_pytorch, layout), ours())

    found = {OURS: ours, "PyTorch NCTHW": plain, "PyTorch channels_last_3d": channels_last}
    if run.mode == "training" and device == "cpu" and run.size == 224:
        # What the depthwise convolution alone is worth: all else is equal.
        for name, layout in LAYOUTS.items():
            found[f"uniformer on F.conv3d {name}"] = partial(on_pytorch, layout)
    first = device == "cpu" and replace(run, dtype="fp32") == FIRST_ON_CPU
    if first and run.dtype == "bf16":
        found[CAST] = lambda: ours().bfloat16()  # OpenVINO's weights are so, too
    if compiled:
        for name, make in list(found.items()):
            if name in (OURS, CAST) and device == "cpu":
                continue  # a minute each; the rivals' are what users have
            found[f"torch.compile of {name}"] = partial(_compiled, make)
    if first:
        found |= runtimes(plain, run.clips, run.dtype)
    return found


def _on(convolution: Callable[..., Tensor], model: Any) -> nn.Module:
    """The network with another depthwise convolution; all else is as it is."""
    forward = model.forward_features

    def with_stats(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        y = convolution(*args, **kwargs)
        return y, channel_stats(y)

    def forward_features(x: Tensor) -> Tensor:
        with (
            patch.object(layers, "dwconv3d", convolution),
            patch.object(local_block, "dwconv3d", convolution),
            patch.object(local_block, "dwconv3d_stats", with_stats),
            patch.object(global_block, "normalises_rows", lambda _: True),  # not with the DPE
        ):
            return forward(x)

    model.forward_features = forward_features
    return model


def _pytorch(
    layout: torch.memory_format,
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: bool = False,
) -> Tensor:  # fmt: skip
    """PyTorch's convolution on x (B, T, H, W, C) in a layout of its own."""
    padding, inner = [k // 2 for k in weight.shape[2:]], x.permute(0, 4, 1, 2, 3)
    inner = inner.contiguous(memory_format=layout)
    y = F.conv3d(inner, weight, bias, 1, padding, 1, x.shape[-1])
    y = y.permute(0, 2, 3, 4, 1).contiguous()
    return x + y if residual else y


def _compiled(make: Callable[[], nn.Module]) -> Any:
    return torch.compile(make())


class _Ready:
    """A network with its clips, to be run again and again."""

    def __init__(self, name: str, model: nn.Module, run: Run, device: str) -> None:
        self.model, self.device, self.dtype = model, device, DTYPES[run.dtype]
        generator = torch.Generator().manual_seed(1)
        self.clips = torch.randn(run.clips, generator=generator).to(device)
        if "PyTorch channels_last_3d" in name:
            self.clips = self.clips.contiguous(memory_format=torch.channels_last_3d)
        self.labels = torch.arange(run.batch, device=device) % CLASSES
        self.step = self._train if run.mode == "training" else self._infer
        if run.mode == "training":
            # The learning rate is tiny, so that no provider's network drifts from the others'.
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-12)

    def logits(self) -> Tensor:
        if self.dtype == torch.float32:
            return self.model(self.clips)
        with torch.autocast(self.device, self.dtype):
            return self.model(self.clips)

    def _infer(self) -> None:
        with torch.no_grad():
            self.logits()

    def _train(self) -> None:
        F.cross_entropy(self.logits().float(), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def saved_mib(self) -> float:
        """What autograd keeps from forward to backward, parameters aside."""
        kept: dict[int, int] = {}
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            self.logits()
        return sum(kept.values()) / 2**20


# --- Measuring ------------------------------------------------------------------------


def measure(
    run: Run,
    device: str,
    ceilings: Mapping[str, float],
    *,
    seconds: float,
    compiled: bool = False,
    only: str | None = None,
) -> list[dict[str, Any]]:
    """Check every provider, then time those that are right, in turns: a row for each."""
    cfg = replace(PRESETS[run.model], num_classes=CLASSES)
    gmacs = sum(r.total for r in count_macs(cfg, run.frames, run.size, run.size)) / 1e9
    row = {
        "model": run.model, "frames": run.frames, "size": run.size, "batch": run.batch,
        "dtype": run.dtype, "mode": run.mode, "gmacs": round(gmacs, 2),
        "floor_ms": _floor_ms(run, ceilings),
    }  # fmt: skip
    making = providers(run, device, compiled)
    truth: dict[str, Tensor] = {}
    head: Any = None
    ready: dict[str, _Ready] = {}
    extra: dict[str, dict[str, Any]] = {}
    for name in ["PyTorch NCTHW", *(n for n in making if n != "PyTorch NCTHW")]:
        if only not in (None, name) and truth:
            continue
        try:
            candidate = _Ready(name, making[name](), run, device)
            if not truth:
                truth = _results(candidate, run, torch.float32)
                head = cast(Any, candidate.model).forward_head
            _check(candidate, run, truth, head)
            if only in (None, name):
                extra[name] = _memory(candidate, run, device)
                ready[name] = candidate
        except Exception as error:
            extra[name] = {"failed": said(error)}
        if device == "cuda":
            torch.cuda.empty_cache()
    steps = {n: r.step for n, r in ready.items()}
    failed: dict[str, str] = {}
    # Where other runtimes are within a few percent, medians of three turns say nothing.
    least = LEAST_TURNS if any(isinstance(r.model, Elsewhere) for r in ready.values()) else 3
    times = take_turns(steps, device, seconds, least, failed=failed)
    extra |= {name: {"failed": why} for name, why in failed.items()}
    rows = []
    for name in making:
        if name in times:
            found = statistics(times[name])
            clips = {"clips_per_s": round(run.batch / found["p50_ms"] * 1e3, 3)}
            energy = {"joules_per_clip": _joules(ready[name], run, device)}
            rows.append(row | {"provider": name} | found | clips | extra[name] | energy)
        elif name in extra and "failed" in extra[name]:
            rows.append(row | {"provider": name} | extra[name])
    return rows


def _floor_ms(run: Run, ceilings: Mapping[str, float]) -> float:
    """Every block at the fewest passes over its activation, or at its operations at the rate of
    matrix products, whichever is longer; backward costs twice as much as forward."""
    cfg, size = PRESETS[run.model], DTYPES[run.dtype].itemsize
    total = 0.0
    for row, depth, C in zip(
        count_macs(cfg, run.frames, run.size, run.size), cfg.depths, cfg.dims, strict=False
    ):
        passes = depth * PASSES[row.kind] * math.prod(row.tokens) * C * size
        flops = 2 * row.total / ceilings[f"{run.dtype}_TFLOPs"] / 1e9
        total += run.batch * max(passes / ceilings["copy_GBps"] / 1e6, flops)
    return round(total * (3 if run.mode == "training" else 1), 4)


def _results(ready: _Ready, run: Run, dtype: torch.dtype) -> dict[str, Tensor]:
    """The feature map, and in training the gradient of the first weight from a random one of it.

    Not the logits: the mean of one clip, normalised over that clip, is 0. But they are all that
    there is of a compiled network, whose parts are not compiled, and of one in another runtime.
    """
    model: Any = ready.model
    autocast = torch.autocast(ready.device, dtype, enabled=dtype != torch.float32)
    if hasattr(model, "_orig_mod") or isinstance(model, Elsewhere):
        with torch.no_grad(), autocast:
            return {"the result": model(ready.clips).float()}
    training = run.mode == "training"
    with torch.set_grad_enabled(training), autocast:
        features = model.forward_features(ready.clips).float()
    found = {"the result": features.detach()}
    if training:
        generator = torch.Generator().manual_seed(2)
        dy = torch.randn(features.shape, generator=generator).to(features.device)
        weight = model.patch_embed1.proj.weight
        (found["the gradient of the first weight"],) = torch.autograd.grad(features, weight, dy)
    return found


def _check(candidate: _Ready, run: Run, truth: dict[str, Tensor], head: Any) -> None:
    for what, got in _results(candidate, run, DTYPES[run.dtype]).items():
        want = truth[what]
        if got.shape != want.shape:
            with torch.no_grad():
                want = head(want)
        # Gradients have gone through the whole network twice.
        allowed = TOLERANCE[run.dtype] * (1 if what == "the result" else 3)
        error = float((got - want).norm() / want.norm())
        if not error <= allowed:
            raise ValueError(
                f"wrong: {what} is off by {error:.1e} of its norm, {allowed:.0e} is allowed"
            )


def _memory(candidate: _Ready, run: Run, device: str) -> dict[str, Any]:
    """MiB at the peak of a step, on a GPU, and MiB that autograd keeps for the backward pass."""
    found: dict[str, Any] = {"peak_MiB": None, "saved_MiB": None}
    compiled = hasattr(candidate.model, "_orig_mod")  # hooks would break its graphs
    if run.mode == "training" and not compiled:
        found["saved_MiB"] = round(candidate.saved_mib(), 1)
    if device == "cuda":
        candidate.step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        candidate.step()
        torch.cuda.synchronize()
        own = sum(p.nbytes for p in candidate.model.parameters())
        peak = torch.cuda.max_memory_allocated() - before + own
        found["peak_MiB"] = round(peak / 2**20, 1)
    return found


def _joules(ready: _Ready, run: Run, device: str) -> float | None:
    """Energy of a clip: the mean of what nvidia-smi reads while steps run for a second."""
    if device != "cuda" or run.batch < 8:
        return None
    command = [
        "nvidia-smi",
        "--query-gpu=power.draw",
        "--format=csv,noheader,nounits",
        "-lms",
        "100",
    ]
    with contextlib.suppress(OSError, ValueError, IndexError):
        steps, start = 0, time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
            while time.perf_counter() - start < 1.0:
                ready.step()
                torch.cuda.synchronize()
                steps += 1
            seconds = time.perf_counter() - start
            reader.terminate()
            said_ = reader.stdout.read() if reader.stdout else ""
        watts = [float(line) for line in said_.splitlines()[2:]]  # the first are from before
        return round(sum(watts) / len(watts) * seconds / steps / run.batch, 4) if watts else None
    return None

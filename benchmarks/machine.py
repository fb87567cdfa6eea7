"""Clocks and limits of this machine, and the files that keep what was measured on it."""

import contextlib
import gc
import json
import math
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

__all__ = [
    "DTYPES", "OURS", "RESULTS", "ROOT", "RUNTIMES", "ceilings", "environment", "git", "read",
    "rounded", "said", "save", "slug", "statistics", "take_turns",
]  # fmt: skip

OURS = "uniformer"
RUNTIMES = ("onnxruntime", "openvino")  # packages; rivals on a CPU
ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
WRITTEN = ("benchmarks/results", "kernels/uniformer_kernels/tuned.json")  # by benchmarks, tracked
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# --- Clocks ---------------------------------------------------------------------------


def take_turns(
    fns: Mapping[str, Callable[[], None]],
    device: str,
    seconds: float,
    least: int = 3,
    most: int = 50,
    failed: dict[str, str] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of each call of each function, in turns of any order, for `seconds`.

    A function that raises is left out, and why is put into `failed`, if that is given.

    On a GPU its own clock is read, and its cache is filled with something else before every call,
    which also keeps it busy until the call is in its queue.
    """
    timer = _cuda_timer() if device == "cuda" else _cpu_ms
    order = random.Random(0)  # else each finds the caches as the same one has left them
    times: dict[str, list[float]] = {name: [] for name in fns}

    def call(name: str) -> float:
        try:
            return timer(fns[name])
        except Exception as error:
            if failed is None:
                raise
            failed[name] = said(error)
            del times[name]
            return math.nan

    for name in fns:  # what the first calls compile, allocate and plan
        call(name)
        if device == "cuda" and name in times:
            call(name)
    end = time.perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        for done in range(most):
            if done >= least and time.perf_counter() > end:
                break
            turns = list(times.items())
            order.shuffle(turns)
            for name, ms in turns:
                ms.append(call(name))
    finally:
        gc.enable()
    return times


def said(error: Exception) -> str:
    """An error on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."


def _cpu_ms(fn: Callable[[], None]) -> float:
    start = time.perf_counter()
    fn()
    return (time.perf_counter() - start) * 1e3


def _cuda_timer() -> Callable[[Callable[[], None]], float]:
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    flush = torch.empty(max(2 * l2, 1 << 26), dtype=torch.int8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timer(fn: Callable[[], None]) -> float:
        flush.zero_()
        start.record()
        fn()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    return timer


def statistics(ms: Sequence[float]) -> dict[str, Any]:
    """p20, median and p80 of times."""
    low, mid, high = torch.tensor(ms).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {
        "p20_ms": rounded(low), "p50_ms": rounded(mid), "p80_ms": rounded(high), "rounds": len(ms)
    }  # fmt: skip


def rounded(value: float) -> float:
    """Five digits."""
    return float(f"{value:.5g}")


# --- Limits ---------------------------------------------------------------------------


def ceilings(device: str) -> dict[str, float]:
    """What this machine does at best, measured: a large copy, and large matrix products."""
    cuda = device == "cuda"
    source = torch.empty(1 << (29 if cuda else 26), dtype=torch.float32, device=device).fill_(1)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    best = min(take_turns({"copy": copy}, device, 0.5)["copy"])
    found = {"copy_GBps": rounded(2 * source.nbytes / best / 1e6)}
    for name, dtype in DTYPES.items():
        n = (4096 if name == "fp32" else 8192) if cuda else (512 if name == "fp16" else 1536)
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))

        def product(a: torch.Tensor = a, b: torch.Tensor = b) -> None:
            a @ b

        x, weight = a.view(1, 1, 1, n, n).permute(0, 4, 1, 2, 3), b.view(n, n, 1, 1, 1)

        def convolution(x: torch.Tensor = x, weight: torch.Tensor = weight) -> None:
            F.conv3d(x, weight)  # on a CPU by another library, often the faster

        products = {"gemm": product} | ({} if cuda else {"conv": convolution})
        best = min(min(ms) for ms in take_turns(products, device, 0.5).values())
        found[f"{name}_TFLOPs"] = rounded(2 * n**3 / best / 1e9)
    return found


def slug(device: str) -> str:
    """The device in file names: "cpu", or as in "h100"."""
    if device == "cpu":
        return "cpu"
    words = torch.cuda.get_device_name().replace("-", " ").split()
    return next(
        (w for w in words if w[:1] in "ABHLTV" and any(c.isdigit() for c in w)), "gpu"
    ).lower()


def environment(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    found = {
        "device": device,
        "processor": next(
            (x.split(": ")[1] for x in lines if x.startswith("model name")), platform.processor()
        ),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", ".", *(f":!{f}" for f in WRITTEN))),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device == "cpu":
        found |= {package: _version(package) for package in RUNTIMES}
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            said = subprocess.run(
                ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
                capture_output=True, text=True, timeout=20, check=True,
            ).stdout  # fmt: skip
            values = said.splitlines()[0].split(", ")
            found |= dict(zip(query.split(","), values, strict=False))
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git(*arguments: str) -> str | None:
    """What git prints, or None where it fails or this is no checkout."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    return None


# --- Files ----------------------------------------------------------------------------


def save(file: Path, content: Mapping[str, Any]) -> None:
    """Write results whole or not at all, a row a line."""
    rows = ",\n".join(json.dumps(row) for row in content["rows"])
    head = {k: v for k, v in content.items() if k != "rows"}
    text = json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{rows}\n]}}\n'
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text(text)
    os.replace(part, file)


def read(file: Path) -> dict[str, Any] | None:
    """Results, or None where there are none or they are damaged."""
    try:
        content = json.loads(file.read_text())
        rows = content["rows"]
        whole = all(row["provider"] and row["batch"] for row in rows)
        whole = whole and all(isinstance(content[k], dict) for k in ("environment", "ceilings"))
        return content if whole and isinstance(rows, list) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None

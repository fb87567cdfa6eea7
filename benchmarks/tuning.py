"""What the tuners share: a launch's time, their command line, and the file that they write to.

The environment in the file is that of the last run on such a GPU.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from uniformer_kernels import _runtime

__all__ = [
    "GPU", "Row", "environment", "finish", "poisoned", "read", "settings", "time_ms", "write",
]  # fmt: skip

GPU = torch.cuda.is_available()
WARM_UP, LAUNCHES = 3, 15
FLUSH = 256 * 2**20  # bytes, twice the largest second-level cache
AHEAD = 40  # flushes, 4 ms: the time the host takes to put all launches into the queue

Row = dict[str, Any]  # as in the file; to launch, its backend and sizes alone


# --- One launch -----------------------------------------------------------------------


def finish() -> None:
    """Wait for the GPU; raises what went wrong on it."""
    if GPU:
        torch.cuda.synchronize()


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory is NaN: else what a launch leaves out is what the one before has left there."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def time_ms(run: Callable[[], object]) -> float:
    """Median of a few launches, on a GPU each with its cache full of something else."""
    if not GPU:  # once: all that is tried there is this program
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    for _ in range(WARM_UP):
        run()
    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(LAUNCHES)]
    for _ in range(AHEAD):
        flush.zero_()
    for before, after in events:
        flush.zero_()
        before.record()
        run()
        after.record()
    finish()
    return median(before.elapsed_time(after) for before, after in events)


# --- The file -------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """The tables that are there, by architecture."""
    content = json.loads(path.read_text()) if path.exists() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no tables: mend or delete it")
    return content


def write(
    path: Path, arch: str, environment: Row, key: str, row: Row, op: str = "dwconv3d"
) -> None:  # fmt: skip
    """Put a row among what is there; the file is replaced whole or not at all."""
    content = read(path)
    table = content.setdefault(arch, {})
    table["environment"] = environment
    table.setdefault(op, {})[key] = row
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def environment(batch: int) -> tuple[str, Row]:
    """The architecture, and what the numbers depend on."""
    arch, gpu = "cpu", None
    if GPU:
        major, minor = torch.cuda.get_device_capability()
        arch, gpu = f"sm_{major}{minor}", torch.cuda.get_device_name()
    return arch, {
        "gpu": gpu, "torch": torch.__version__, "triton": version("triton"), "batch": batch,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }  # fmt: skip


# --- The command line -----------------------------------------------------------------


def settings(
    module: str, description: str, seconds: float, arguments: list[str] | None
) -> argparse.Namespace:  # fmt: skip
    """Of a tuner's command line: seconds, dry_run, and `into`, the file, which can be written to.

    Does not come back where this program has to begin anew, with Triton interpreting its kernels.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=seconds, help="in all, at most")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on any machine")
    parser.add_argument("--into", type=Path, help="a file instead of the library's")
    args = parser.parse_args(arguments)
    if args.dry_run and args.into is None:
        parser.error("--dry-run measures nothing for the library: say --into FILE")
    if not args.dry_run and (not GPU or _runtime.interpreting()):
        parser.error("this needs a CUDA device, and TRITON_INTERPRET unset; or --dry-run")
    if not GPU and not _runtime.interpreting():  # Triton asks when it is imported, as it is by now
        os.environ["TRITON_INTERPRET"] = "1"
        again = sys.argv[1:] if arguments is None else arguments
        os.execv(sys.executable, [sys.executable, "-m", module, *again])
    args.into = args.into or _runtime.TUNED
    read(args.into)  # rather fail now than when all is measured
    if not os.access(args.into.parent, os.W_OK):
        parser.error(f"{args.into.parent} cannot be written to: say --into FILE")
    return args

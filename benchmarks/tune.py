"""Time ways to launch the kernels on this GPU and put the fastest on file for the library.

    python -m benchmarks.tune --seconds 500              # into kernels/uniformer_kernels/tuned.json
    python -m benchmarks.tune --dry-run --into a.json    # the same on tiny shapes, on any machine

Every shape of the network is run with the default launch, with a list of others, and in CUDA C++.
First all are compiled, the most promising first, in a process for each processor: one takes up to
half a minute. Then each is compared with what the default launch returns, and timed. When time is
up it ends with what it has, and says what is missing.

Where C++ is the fastest, the row holds the fastest launch in Triton all the same, for machines
that cannot build the library.
"""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.machine import said
from benchmarks.static_cost import KERNELS
from benchmarks.tuning import GPU, Row, environment, finish, poisoned, settings, time_ms, write
from uniformer_kernels import _runtime, dwconv3d_native

__all__ = ["main"]

BATCH = 32
COMPILING = 0.8  # of the time, at most: a launch takes half a minute to compile, 0.2 s to time
PROCESSES = 16  # at most; each has half a GB of the GPU's memory for its context, and a GB of data
# Of sums of half a million terms in fp32. Those of a forward are rounded to x's dtype, once.
TOLERANCE = 1e-4

SIZES = ("NH", "NW", "BLOCK_P", "BLOCK_C")
APART: Row = {"backend": "apart"}  # two kernels one after the other

# NH (if any), NW, BLOCK_P, BLOCK_C, warps. The most promising first, by what the compiler makes of
# them for sm_90: instructions a product, against the registers, which decide how many warps fit.
CANDIDATES: dict[tuple[str, int], tuple[tuple[int, ...], ...]] = {
    ("fwd", 5): (
        (2, 14, 4, 64, 4), (2, 7, 4, 64, 4), (4, 14, 4, 64, 8), (4, 7, 4, 64, 8),
        (1, 14, 4, 64, 4), (1, 7, 8, 64, 4), (7, 7, 4, 64, 8), (4, 7, 8, 64, 8),
        (2, 14, 4, 64, 8), (1, 7, 4, 64, 4), (4, 7, 8, 32, 4), (2, 7, 8, 64, 8),
        (4, 7, 4, 32, 2), (2, 7, 4, 32, 2),
    ),
    ("fwd", 3): (
        (2, 7, 4, 64, 4), (2, 14, 4, 64, 4), (1, 7, 4, 64, 4), (7, 7, 4, 64, 4),
        (1, 7, 8, 64, 4), (1, 14, 4, 64, 4), (2, 7, 8, 64, 4), (4, 7, 4, 64, 8),
        (2, 7, 8, 64, 8), (4, 7, 8, 64, 8), (2, 7, 4, 32, 2), (2, 7, 8, 32, 4),
        (7, 7, 4, 64, 8), (1, 7, 4, 32, 2),
    ),
    # Without NH: all frames at a time, and with it in tiles of one.
    ("bwd_weight", 5): (
        (7, 8, 32, 8), (4, 4, 32, 4), (7, 2, 32, 2), (4, 8, 32, 8), (14, 4, 32, 4),
        (4, 7, 2, 64, 2), (2, 14, 4, 64, 4), (4, 7, 4, 64, 8), (4, 7, 4, 64, 4), (2, 7, 4, 64, 4),
    ),
    ("bwd_weight", 3): (
        (14, 4, 64, 4), (7, 8, 64, 8), (4, 4, 64, 4), (14, 8, 64, 8), (7, 4, 32, 4),
        (2, 7, 4, 64, 4), (7, 7, 4, 64, 4), (4, 7, 8, 64, 4), (2, 7, 8, 64, 4),
    ),
    ("bwd", 3): (
        (4, 4, 64, 4), (7, 8, 64, 8), (4, 8, 64, 8), (7, 4, 32, 4), (14, 4, 32, 4),
        (2, 4, 64, 4), (7, 8, 32, 8), (14, 8, 32, 8),
    ),
    # All channels in a program: smaller tiles make more of them.
    ("norm", 3): (
        (1, 7, 4, 64, 4), (2, 7, 2, 64, 2), (1, 7, 2, 64, 2), (4, 7, 4, 64, 4), (2, 7, 8, 64, 8),
        (1, 7, 8, 64, 8), (2, 7, 4, 128, 8), (1, 7, 1, 64, 1),
    ),
}  # fmt: skip


class Case(NamedTuple):
    """A direction, a kernel and a shape (B, T, H, W, C)."""

    direction: str
    k: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def key(self) -> str:
        """Its name in the file."""
        _, T, H, W, C = self.shape
        return f"{self.direction} {self.k}x{self.k}x{self.k} {self.dtype} {C} {T}x{H}x{W}"


def list_cases(dry_run: bool) -> list[Case]:
    """All of bf16 first, and of it 5x5x5: the network spends most there."""
    shapes = {k: [(BATCH, T, H, W, C) for C, T, H, W in KERNELS[k]] for k in (5, 3)}
    normed = shapes[3][2:]  # the stages with LayerNorms
    if dry_run:
        shapes = {3: [(1, 1, 1, 7, 8)]}
        normed = shapes[3]
    return [
        Case(direction, k, dtype, shape)
        for dtype in ("bf16", "fp16")
        for k in shapes
        for shape in shapes[k]
        for direction in ("fwd", "bwd_weight", "bwd", "norm")
        if (direction, k) in CANDIDATES and (direction != "norm" or shape in normed)
    ]


def _forward() -> ModuleType:
    """Not before `main` has said whether Triton interprets."""
    from uniformer_kernels import dwconv3d_triton

    return dwconv3d_triton


def _backward() -> ModuleType:
    from uniformer_kernels import dwconv3d_bwd_triton

    return dwconv3d_bwd_triton


def _with_norm() -> ModuleType:
    from uniformer_kernels import dwconv3d_norm_triton

    return dwconv3d_norm_triton


def _config(case: Case, tuned: Row) -> Any:
    kernel, C, op = (case.k,) * 3, case.shape[-1], _backward()
    if case.direction in ("fwd", "norm"):
        forward = _forward() if case.direction == "fwd" else _with_norm()
        return forward.fwd_config(case.shape, C, kernel, tuned)
    if "NH" in tuned:
        return op.tiles_config(case.shape, C, C, kernel, 1, tuned)
    return op.bwd_config(case.shape, C, C, kernel, 1, tuned, with_dx=case.direction == "bwd")


def rows_of(case: Case, dry_run: bool = False) -> list[Row]:
    """What to try, each launch once: the default, the candidates, C++."""
    rows: list[Row] = []
    names = (*SIZES, "warps")
    for sizes in [(), *CANDIDATES[case.direction, case.k][: 1 if dry_run else None]]:
        config = _config(case, dict(zip(names[-len(sizes) :], sizes, strict=False)))
        arguments = {name: config.arguments[name] for name in SIZES if name in config.arguments}
        row = {"backend": "triton"} | arguments | {"warps": config.warps}
        if row not in rows:  # a small shape makes several the same
            rows.append(row)
    rivals: dict[str, list[Row]] = {"bwd": [], "norm": [APART]}
    return rows + rivals.get(case.direction, [{"backend": "cuda"}])


# --- One launch -----------------------------------------------------------------------


class Tensors(NamedTuple):
    """What a case is run on; parameters in fp32, as in training under autocast."""

    dy: Tensor
    x: Tensor
    weight: Tensor
    bias: Tensor


def make(case: Case) -> Tensors:
    """Random tensors of a case."""
    C, dtype = case.shape[-1], _runtime.DTYPES[case.dtype]
    device = "cuda" if GPU else "cpu"
    return Tensors(
        torch.randn(case.shape, device=device, dtype=dtype),
        torch.randn(case.shape, device=device, dtype=dtype),
        torch.randn(C, 1, *(case.k,) * 3, device=device),
        torch.randn(C, device=device),
    )


def launch(case: Case, row: Row, tensors: Tensors) -> tuple[Tensor, ...]:
    """Run a case as the network does; the DPE, 3x3x3, has a residual."""
    dy, x, weight, bias = tensors
    residual, cuda = case.k == 3, row["backend"] == "cuda"
    if case.direction == "norm":
        ones, eps = torch.ones_like(bias), 1e-6
        if row["backend"] == "triton":
            return _with_norm().fwd(x, weight, bias, residual, ones, bias, eps, x.dtype, tuned=row)
        y = _forward().fwd(x, weight, bias, residual)
        gamma, beta = (t.to(x.dtype if GPU else torch.float32) for t in (ones, bias))
        return y, *torch.native_layer_norm(y, y.shape[-1:], gamma, beta, eps)
    if case.direction == "bwd":
        return _backward().bwd(dy, x, weight, residual, tuned=row)
    if case.direction == "bwd_weight":
        if cuda:
            return (dwconv3d_native.bwd_weight_cuda(dy, x, weight),)
        return (_backward().bwd_weight(dy, x, weight, tuned=row),)
    if cuda:
        return (dwconv3d_native.fwd_cuda(x, weight, bias, residual),)
    return (_forward().fwd(x, weight, bias, residual, tuned=row),)


def check(case: Case, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Raise ValueError where a result is another than the default launch's."""
    for g, w in zip(got, want, strict=True):
        # Sums of all positions are in fp32, whatever the case's dtype.
        bound = TOLERANCE if g.dtype == torch.float32 else 2 * torch.finfo(g.dtype).eps
        error = float((g.float() - w.float()).abs().max() / w.float().abs().max())
        if not error <= bound:  # NaN is no less
            raise ValueError(f"wrong by {error:.1e} of the largest, {bound:.1e} is allowed")


# --- All of them ----------------------------------------------------------------------

Failure = tuple[Case, Row, str]  # and why


def _attempt(job: tuple[Case, Row]) -> tuple[Case, Row, str | None]:
    """In a process of its own: what Triton has compiled it keeps on disk, for all."""
    case, row = job
    try:
        launch(case, row, make(case))
        finish()
    except Exception as error:  # of any kind: such a launch is not for us
        return case, row, said(error)
    return case, row, None


def compile_all(
    rows: Mapping[Case, Sequence[Row]], deadline: float
) -> tuple[dict[Case, list[Row]], list[Failure]]:
    """Launch everything once, so that it is compiled: the first of each case first.

    Args:
        rows: what to try, by case.
        deadline: when to end, as of `time.monotonic`.

    Returns:
        What can be launched, in the order of `rows`, and what cannot. What is in neither would
        have taken longer.
    """
    dtypes = list(dict.fromkeys(case.dtype for case in rows))
    jobs = [(case, row) for case in rows for row in rows[case] if row["backend"] == "triton"]
    jobs.sort(key=lambda job: (dtypes.index(job[0].dtype), rows[job[0]].index(job[1])))
    done: list[tuple[Case, Row, str | None]] = []

    def left() -> float:
        return max(deadline - time.monotonic(), 0)

    processes = min(os.cpu_count() or 1, PROCESSES, len(jobs))
    # Spawned, since CUDA does not survive a fork. The end of `with` is theirs, whatever they do.
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(processes, torch.set_num_threads, (1,)) as pool,
        tqdm(total=len(jobs), desc="compile", unit="launch", disable=None) as bar,
    ):
        library = pool.apply_async(_runtime.why_not, ("cuda",))  # builds it
        attempts = pool.imap_unordered(_attempt, jobs)
        with contextlib.suppress(multiprocessing.TimeoutError):
            for _ in jobs:
                done.append(attempts.next(left()))
                bar.update()
        with contextlib.suppress(multiprocessing.TimeoutError):
            why = library.get(left())
            cuda = {"backend": "cuda"}
            done += [(case, cuda, why) for case in rows if cuda in rows[case]]
    done += [(case, APART, None) for case in rows if APART in rows[case]]  # compiled for others
    works = [(case, row) for case, row, why in done if why is None]
    failed = [(case, row, why) for case, row, why in done if why is not None]
    return {c: [row for row in rows[c] if (c, row) in works] for c in rows}, failed


def measure(
    case: Case, rows: Sequence[Row], deadline: float
) -> tuple[list[tuple[float, Row]], list[Failure]]:
    """Milliseconds of each of `rows`, the default first, and which are wrong or fail."""
    tensors = make(case)
    times: list[tuple[float, Row]] = []
    failed: list[Failure] = []
    want = None
    for row in rows:
        if time.monotonic() > deadline:
            break
        try:
            with poisoned():
                got = launch(case, row, tensors)
            check(case, got, got if want is None else want)
            want = got if want is None else want
            times.append((time_ms(partial(launch, case, row, tensors)), row))
        except Exception as error:
            finish()  # raises again where the GPU is lost for this process
            failed.append((case, row, said(error)))
            if want is None:  # with nothing to compare with, nothing is right
                break
    return times, failed


def result(times: Sequence[tuple[float, Row]], apart: float | None = None) -> Row:
    """A row of the file, of times of which the default's is the first.

    `apart` is what the parts of a case take one after the other.
    """
    best, launched = min((t for t in times if t[1]["backend"] == "triton"), key=lambda t: t[0])
    ms = {"triton": best} | {row["backend"]: t for t, row in times if row["backend"] != "triton"}
    ms |= {} if apart is None else {"apart": apart}
    backend = min(ms, key=lambda name: ms[name])
    rivals = {"default": times[0][0]} | {name: t for name, t in ms.items() if name != backend}
    return launched | {
        "backend": backend,
        "ms": round(ms[backend], 5),
        "rival_ms": {name: round(t, 5) for name, t in rivals.items()},
    }


def in_parts(case: Case, found: Mapping[Case, Row]) -> float | None:
    """Milliseconds of dx and the weight's gradient one after the other, where both are known."""
    if case.direction != "bwd":
        return None
    parts = [found.get(case._replace(direction=d)) for d in ("fwd", "bwd_weight")]
    return None if None in parts else sum(row["ms"] for row in parts if row)


# --- The command line -----------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """See the top of the file."""
    started = time.monotonic()
    description = "Time the launches of the kernels on this GPU."
    args = settings("benchmarks.tune", description, 500, arguments)
    rows = {case: rows_of(case, args.dry_run) for case in list_cases(args.dry_run)}
    deadline = started + args.seconds
    works, failed = compile_all(rows, started + COMPILING * args.seconds)
    arch, where = environment(batch=next(iter(rows)).shape[0])
    found: dict[Case, Row] = {}
    timed = 0
    try:
        for case in tqdm(rows, desc="time", unit="shape", disable=None):
            if rows[case][0] not in works[case] or time.monotonic() > deadline:
                continue
            times, wrong = measure(case, works[case], deadline)
            timed, failed = timed + len(times), failed + wrong
            if len(times) > 1:
                found[case] = result(times, in_parts(case, found))
                write(args.into, arch, where, case.key, found[case])
    finally:
        print(report(rows, found, timed, failed))


def report(
    rows: Mapping[Case, Sequence[Row]], found: Mapping[Case, Row], timed: int, failed: list[Failure]
) -> str:
    """What was found, what was skipped and why, and what is missing."""
    lines = [
        f"{case.key}: {row['backend']} {row['ms']:.4f} ms, "
        + ", ".join(f"{name} {ms:.4f}" for name, ms in row["rival_ms"].items())
        for case, row in found.items()
    ]
    lines += [
        f"skipped {case.key}, {' '.join(map(str, row.values()))}: {why}"
        for case, row, why in failed
    ]
    missing = sum(map(len, rows.values())) - timed - len(failed)
    lines.append(f"{timed} launches timed, {len(failed)} skipped, {missing} not tried")
    if lacking := [case.key for case in rows if case not in found]:
        lines.append(f"without a result: {'; '.join(lacking)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

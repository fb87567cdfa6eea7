"""The microbenchmarks under pytest-benchmark: a test of ours for each case and direction.

    pytest benchmarks/bench_attention.py --benchmark-autosave -k "bf16 and forward"
    pytest benchmarks/bench_attention.py --benchmark-compare

`make bench` times the same cases in turns, which a noisy machine needs; here each has its own.
"""

import pytest
import torch

from benchmarks.harness import DIRECTIONS, prepare
from benchmarks.machine import environment

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCHES, DTYPES = ((1, 8, 32), ("bf16", "fp16", "fp32")) if DEVICE == "cuda" else (
    (1,), ("fp32", "bf16")
)  # fmt: skip


def pytest_generate_tests(metafunc):
    if "microbenchmark" in metafunc.fixturenames:
        cases = list(metafunc.module.cases(BATCHES, DTYPES))
        metafunc.parametrize("case", cases, ids=str, scope="module")
        metafunc.parametrize("direction", DIRECTIONS)


@pytest.fixture
def microbenchmark(benchmark, case, direction):
    """Times ours, grouped by case and direction; wrong results fail."""

    def run():
        ready, failed, _ = prepare(case, DEVICE, "uniformer")
        assert not failed, failed
        benchmark.group = f"{direction} {case}"
        call = getattr(ready["uniformer"], direction)

        def finished():
            call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(finished, rounds=20, warmup_rounds=2)

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(environment(DEVICE))

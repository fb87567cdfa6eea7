"""Triton kernels compile ahead of time, without spills, to the machine code that is on file."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.static_cost import ARCHS, RESULTS

triton = pytest.importorskip("triton")
PROGRAM = """
import json
from benchmarks.static_cost import report
print(json.dumps(report(match={match!r})))
"""


@pytest.mark.parametrize("match", ["3x3x3 C=64", "5x5x5 C=64"])
def test_kernels_compile_without_spills_to_what_is_on_file(match):
    """In a process of its own: kernels that are interpreted cannot be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(match=match)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 2 * len(ARCHS)  # forward, and the gradient of the weight
    for row in rows:
        assert row["spilled_bytes"] == 0, row
        assert row["shared_bytes"] <= 99 * 1024, row  # of the smallest chip
        assert row["loop"]["products"] > 200, row
    filed = json.loads(RESULTS.read_text())
    if filed["environment"]["triton"] == triton.__version__:
        stale = "python -m benchmarks.static_cost writes it anew; say why it changed"
        assert [r for r in filed["rows"] if match in r["kernel"]] == rows, stale

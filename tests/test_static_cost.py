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


WIDTHS = [64, 128, 56, 112]  # of the local stages, and of the light models'
KERNELS = {"3x3x3 C=64 ": 2, "5x5x5 C=64 ": 2} | {f"bf16 rows C={C}": 7 for C in WIDTHS}
KERNELS |= {"dwconv3d_norm": 2, "patch_embed": 5, "H=5 D=64": 3, "D=28": 3}


@pytest.mark.parametrize("match", KERNELS)
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
    assert len(rows) == KERNELS[match] * len(ARCHS)
    for row in rows:
        assert row["spilled_bytes"] == 0, row
        # Of sm_80; smaller chips get smaller tiles of a weight's gradient.
        assert row["shared_bytes"] <= 164 * 1024, row
        if "attention" in row["kernel"] and row["arch"] == "sm_90":
            assert row["instruction"] == "HGMMA", row
        assert row["loop"]["products"] > 200 or row["tensor_cores"] > 0, row
    filed = json.loads(RESULTS.read_text())
    if filed["environment"]["triton"] == triton.__version__:
        stale = "python -m benchmarks.static_cost writes it anew; say why it changed"
        assert [r for r in filed["rows"] if match in r["kernel"]] == rows, stale

"""Rows of results by what was measured, and how the providers of a case compare."""

import math
from typing import Any, NamedTuple

from benchmarks.machine import OURS

__all__ = ["NOISE", "Case", "Results", "Row", "changes", "group", "number", "ratio"]

Row = dict[str, Any]
Results = dict[str, Any]  # environment, ceilings, rows

NOISE = 0.1  # shared machines differ by this much from one run to the next


class Case(NamedTuple):
    """What was measured: an op in a direction, or a model in a mode."""

    name: str
    shape: str
    batch: int
    dtype: str
    way: str

    def __str__(self) -> str:
        return f"{self.name} {self.shape} B={self.batch} {self.dtype} {self.way}"


def group(results: Results | None) -> dict[Case, dict[str, Row]]:
    """The rows of each case by provider, ours first."""
    cases: dict[Case, dict[str, Row]] = {}
    for row in sorted(results["rows"] if results else [], key=lambda r: r["provider"] != OURS):
        if "op" in row:
            names = row["op"], row["case"], row["batch"], row["dtype"], row["direction"]
        else:
            clip = f"{row['frames']} x {row['size']} x {row['size']}"
            names = row["model"], clip, row["batch"], row["dtype"], row["mode"]
        cases.setdefault(Case(*names), {})[row["provider"]] = row
    return cases


def ratio(rows: dict[str, Row]) -> float | None:
    """Time of the fastest rival over ours; None where there are not both. What compiles ours is no
    rival."""
    rivals = [row["p50_ms"] for who, row in rows.items() if OURS not in who and "p50_ms" in row]
    ours = rows.get(OURS, {}).get("p50_ms")
    return min(rivals) / ours if rivals and ours else None


def changes(new: Results | None, old: Results | None) -> dict[Case, float]:
    """New time over old of our rows in both, the worst first; infinite for those that now fail."""
    past = group(old)
    found = {}
    for case, rows in group(new).items():
        before = past.get(case, {}).get(OURS, {}).get("p50_ms")
        if before and OURS in rows:
            found[case] = rows[OURS].get("p50_ms", math.inf) / before
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def number(x: float | None) -> str:
    """Three digits."""
    return "-" if x is None else f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"

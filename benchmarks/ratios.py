"""Print how many times faster this library is than the best other provider of each case.

python -m benchmarks.ratios benchmarks/results/dwconv3d_cpu.json
"""

import json
import sys
from pathlib import Path

OURS = "uniformer"


def ratios(rows: list[dict]) -> dict[str, tuple[float, dict[str, float]]]:
    """Group -> best other time over ours, and the least milliseconds of each provider."""
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        groups.setdefault(row["group"], {})[row["provider"]] = row["min_ms"]
    return {
        group: (min(t for name, t in times.items() if name != OURS) / times[OURS], times)
        for group, times in groups.items()
    }


def main() -> None:
    for path in sys.argv[1:]:
        content = json.loads(Path(path).read_text())
        print(path, content["machine_info"])
        for group, (ratio, times) in ratios(content["benchmarks"]).items():
            listed = "  ".join(f"{name} {ms:.2f} ms" for name, ms in times.items())
            print(f"{ratio:6.2f}x  {group}:  {listed}")


if __name__ == "__main__":
    main()

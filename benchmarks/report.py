"""Write what the benchmarks measured as Markdown tables and pictures.

    python -m benchmarks.report [FOLDER] [--device cpu]

Reads `ops_<device>.json` and `models_<device>.json` in FOLDER, `benchmarks/results` unless named,
compares them with the committed ones, and writes `report_<device>.md` and the pictures beside them.
"""

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean

from benchmarks.compare import NOISE, Case, Results, Row, changes, group, number, ratio
from benchmarks.machine import OURS, RESULTS, git, read
from benchmarks.plots import draw

__all__ = ["main", "report_on", "write_report"]

HOW_TO_READ = """Times are medians in ms, the small figures 20th to 80th percentiles. The floor is
the time at this machine's measured ceilings; what lies in a cache may come below it. "Of floor" is
the floor over the time, ours in the tables of ops. The ratio is the time of the fastest provider
that runs nothing of ours over our time: above 1, in bold, ours is faster; below 1 it is slower."""


# --- Tables ---------------------------------------------------------------------------


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return ["", *("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]), ""]


def _bold(x: float | None) -> str:
    text = "-" if x is None else f"{x:.2f}"
    return f"**{text}**" if x is not None and x > 1 else text


def _time(row: Row) -> str:
    if "p50_ms" not in row:
        return "failed" if "failed" in row else "-"
    low, mid, high = (number(row[f"p{p}_ms"]) for p in (20, 50, 80))
    return f"{mid} <small>{low}-{high}</small>"


def _of_floor(row: Row) -> str:
    floor, ms = row.get("floor_ms"), row.get("p50_ms")
    return f"{100 * floor / ms:.0f} %" if floor and ms else "-"


def _failures(cases: dict[Case, dict[str, Row]]) -> list[str]:
    """Each provider's reasons once, with the cases they hold for."""
    reasons: dict[str, list[str]] = {}
    for case, rows in cases.items():
        for who, row in rows.items():
            if "failed" in row:
                why = " ".join(str(row["failed"]).split()).replace("`", "'")
                reasons.setdefault(f"{who} failed: `{why}`", []).append(str(case))
    return [f"- {reason} in {'; '.join(names)}" for reason, names in reasons.items()]


def _summary(cases: dict[Case, dict[str, Row]]) -> list[str]:
    """Geometric mean and worst of the ratios, a row for each op and a column for each way."""
    ratios: dict[str, dict[str, list[float | None]]] = {}
    for case, rows in cases.items():
        cells = ratios.setdefault(case.name, {})
        cells.setdefault(f"{case.way} {case.dtype}", []).append(ratio(rows))
    columns = list(dict.fromkeys(column for cells in ratios.values() for column in cells))
    body = [[name, *(_spread(cells.get(c, [])) for c in columns)] for name, cells in ratios.items()]
    return _table(["", *columns], body) if body else []


def _spread(ratios: list[float | None]) -> str:
    known = [r for r in ratios if r]
    if not known:
        return "-"
    count = f", {len(known)} of {len(ratios)} cases" if len(known) < len(ratios) else ""
    return f"{_bold(geometric_mean(known))} <small>worst {min(known):.2f}{count}</small>"


def _op_tables(results: Results | None) -> list[str]:
    lines, cases = [], group(results)
    for op in dict.fromkeys(case.name for case in cases):
        part = {case: rows for case, rows in cases.items() if case.name == op}
        providers = dict.fromkeys(who for rows in part.values() for who in rows)
        head = ["case", "batch", "dtype", "direction", *providers, "floor", "of floor", "ratio"]
        body = []
        for case, rows in part.items():
            ours = rows.get(OURS) or next(iter(rows.values()))
            times = [_time(rows.get(who, {})) for who in providers]
            floor = [number(ours.get("floor_ms")), _of_floor(rows.get(OURS, {}))]
            names = [case.shape, str(case.batch), case.dtype, case.way]
            body.append([*names, *times, *floor, _bold(ratio(rows))])
        lines += [f"## {op}", *_table(head, body), *_failures(part), ""]
    return lines


def _model_tables(results: Results | None) -> list[str]:
    head = ["batch", "dtype", "provider", "clips/s", "ms", "floor", "of floor", "peak MiB"]
    head += ["MiB kept for backward", "J/clip", "ratio"]
    lines, cases = [], group(results)
    for model, clip, mode in dict.fromkeys((c.name, c.shape, c.way) for c in cases):
        part = {c: r for c, r in cases.items() if (c.name, c.shape, c.way) == (model, clip, mode)}
        body, gmacs = [], None
        for case, rows in part.items():
            for who, row in rows.items():
                gmacs = row.get("gmacs", gmacs)
                costs = [number(row.get(k)) for k in ("peak_MiB", "saved_MiB", "joules_per_clip")]
                speed = [number(row.get("clips_per_s")), _time(row), number(row.get("floor_ms"))]
                last = _bold(ratio(rows)) if who == OURS else ""
                names = [str(case.batch), case.dtype, who]
                body.append([*names, *speed, _of_floor(row), *costs, last])
        lines += [f"## {model}, {mode}, {clip}", "", f"{number(gmacs)} GMACs a clip."]
        lines += [*_table(head, body), *_failures(part), ""]
    return lines


def _machine(*results: Results | None) -> list[str]:
    """Environment and ceilings; where ops and models differ, both values."""
    lines = []
    for part, title in (("environment", "Machine"), ("ceilings", "Measured ceilings")):
        values: dict[str, list[str]] = {}
        for name, value in (item for r in results if r for item in r.get(part, {}).items()):
            if part == "ceilings":
                name, _, unit = name.rpartition("_")
                value = f"{number(value)} {unit.replace('ps', '/s').replace('FLOPs', 'FLOP/s')}"
            values.setdefault(name, []).append("none" if value is None else str(value))
        listed = [f"- {name}: {'; '.join(dict.fromkeys(texts))}" for name, texts in values.items()]
        lines += [f"## {title}", "", *listed, ""]
    return lines


def _against(now: dict[str, Results | None], before: dict[str, Results | None]) -> list[str]:
    lines = ["## Against the last committed results", ""]
    for kind, new in now.items():
        old = before.get(kind)
        if not new or not old or new == old:
            why = "these are the committed results" if new and old else "nothing to compare"
            lines.append(f"- {kind}: {why}.")
            continue
        found = changes(new, old)
        moved = {case: change for case, change in found.items() if abs(change - 1) > NOISE}
        count = f"{len(found)} of our rows are in both, {len(moved)} changed"
        lines.append(f"- {kind}: {count} by more than {100 * NOISE:.0f} %; new time over old:")
        for case, change in moved.items():
            lines.append(f"  - {case}: {'fails now' if change == math.inf else f'{change:.2f}'}")
        for key in ("processor", "gpu", "torch"):
            was, now_is = (r["environment"].get(key) for r in (old, new))
            if was != now_is:
                lines.append(f"- {kind}: **another {key}**: {was} then, {now_is} now.")
    return [*lines, "", "Machines are noisy, shared ones above all: repeat before believing.", ""]


# --- Files ----------------------------------------------------------------------------


def write_report(
    ops: Results | None,
    models: Results | None,
    folder: Path,
    device: str,
    before: dict[str, Results | None],
) -> Path:
    """Write `report_<device>.md` and, where matplotlib is installed, pictures to a folder.

    Args:
        ops: results of single ops, None where there are none.
        models: results of whole models, None where there are none.
        folder: where to write; made if need be.
        device: as in the names of the files.
        before: what to compare with, by "ops" and "models".
    """
    folder.mkdir(parents=True, exist_ok=True)
    now = {"ops": ops, "models": models}
    lines = [f"# Benchmarks, {device}", "", HOW_TO_READ, ""]
    lines.append("## Ratio to the best rival, geometric means")
    lines += [*_summary(group(ops)), *_summary(group(models))]
    lines += [*_machine(ops, models), *draw(now, before, folder, device)]
    lines += [*_op_tables(ops), *_model_tables(models), *_against(now, before)]
    path = folder / f"report_{device}.md"
    path.write_text("\n".join(lines).rstrip() + "\n")
    return path


def report_on(folder: Path, device: str) -> Path:
    """Write the report of the results in a folder, beside the committed ones.

    Raises:
        FileNotFoundError: there are no results in it.
    """
    files = {kind: f"{kind}_{device}.json" for kind in ("ops", "models")}
    now = {kind: read(folder / file) for kind, file in files.items()}
    if not any(now.values()):
        names = " nor ".join(files.values())
        raise FileNotFoundError(
            f"neither {names} with results is in {folder}: run the benchmarks first"
        )
    before = {
        kind: json.loads(git("show", f"HEAD:benchmarks/results/{file}") or "null")
        for kind, file in files.items()
    }
    return write_report(now["ops"], now["models"], folder, device, before)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of the file."""
    parser = argparse.ArgumentParser(description="Write the report of benchmark results.")
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS, help="where results are")
    parser.add_argument("--device", default="cpu", help="as in the names of the files")
    args = parser.parse_args(arguments)
    try:
        print(report_on(args.folder, args.device))
    except FileNotFoundError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

"""The pictures of the report: roofline, throughput, memory, latency, and what has changed.

Each is a figure, or None where there is nothing to draw.
"""

import math
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.compare import NOISE, Case, Results, Row, changes, group, number
from benchmarks.machine import OURS

__all__ = ["draw", "latency", "memory", "regression", "roofline", "throughput"]

COLOURS = ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000")  # Okabe-Ito
MARKERS = "os^DvPX*"
COMPILED = "torch.compile of "
MOST_BARS = 30  # more are too small to read


def draw(
    now: dict[str, Results | None], before: dict[str, Results | None], folder: Path, device: str
) -> list[str]:
    """Draw what there is data for; the Markdown that shows it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return ["No pictures: matplotlib is not installed here.", ""]
    ops, models = now["ops"], now["models"]
    styles, of_models = _styles(ops), _styles(models)
    changed = changes(ops, before.get("ops")) | changes(models, before.get("models"))
    figures = {
        "roofline": roofline(ops, styles, "fp32" if device == "cpu" else "bf16"),
        "throughput": throughput(models, of_models),
        "memory": memory(models, of_models),
        "latency": latency(models, of_models),
        "regression": regression(changed),
    }
    lines = []
    for name, figure in figures.items():
        if figure:
            figure.savefig(folder / f"{name}_{device}.png")
            lines += [f"![{name}]({name}_{device}.png)", ""]
    return lines


def _styles(results: Results | None) -> dict[str, dict]:
    """Colour and marker of each provider; compiled by torch.compile it has the same, hollow."""
    found = dict.fromkeys([OURS, *(who for rows in group(results).values() for who in rows)])
    bases = list(dict.fromkeys(who.removeprefix(COMPILED) for who in found))
    styles = {}
    for who in found:
        i = bases.index(who.removeprefix(COMPILED))
        styles[who] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        styles[who]["fillstyle"] = "none" if who.startswith(COMPILED) else "full"
    return styles


def roofline(ops: Results | None, styles: dict[str, dict], dtype: str) -> Any:
    """Achieved rate over arithmetic intensity, below what the machine can do."""
    points: dict[tuple[str, str, str], tuple[float, float]] = {}
    for case, rows in sorted(group(ops).items(), key=lambda item: item[0].batch):
        for who, row in rows.items():
            if (case.way, case.dtype) == ("forward", dtype) and "p50_ms" in row and row["flops"]:
                xy = row["flops"] / row["bytes"], row["flops"] / row["p50_ms"] / 1e6
                points[case.name, case.shape, who] = xy  # the largest batch comes last
    if not ops or not points:
        return None
    figure, (axes,) = _figure([5.0])
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move")
    axes.set_ylabel(f"GFLOP/s, forward, {dtype}")
    _ceilings(axes, list(points.values()), ops["ceilings"], dtype)
    best: dict[str, tuple[float, float]] = {}
    for (op, shape, who), xy in points.items():
        axes.plot(*xy, linestyle="", label=who, zorder=3 if who == OURS else 2, **styles[who])
        kernel, found, _ = shape.partition(" C=")
        name = f"{op} {kernel}" if found else op
        if who == OURS and xy[1] > best.get(name, (0, 0))[1]:
            best[name] = xy
    place = -0.1
    line = {"arrowstyle": "-", "color": "0.7", "linewidth": 0.6, "relpos": (0, 0), "shrinkA": 0}
    for name, xy in sorted(best.items(), key=lambda item: item[1]):
        x, _ = axes.transAxes.inverted().transform(axes.transData.transform(xy))
        place = max(place + 0.045, x)  # names side by side above the plot
        axes.annotate(name, xy, (place, 1), "data", "axes fraction", line, rotation=45, zorder=1)
    return _legend(figure)


def _ceilings(axes: Any, points: list[tuple], ceilings: dict[str, float], dtype: str) -> None:
    copy = ceilings["copy_GBps"]
    tops = {name: 1e3 * ceilings[f"{name}_TFLOPs"] for name in ("fp32", dtype)}
    left = min(x for x, _ in points) / 2
    right = 2 * max(*(x for x, _ in points), *(top / copy for top in tops.values()))
    highest = max(*tops.values(), *(y for _, y in points))
    axes.set(xlim=(left, right), ylim=(min(y for _, y in points) / 2, 1.5 * highest))
    for name, top in tops.items():
        xs = (min(left, top / copy), top / copy, right)
        axes.plot(xs, [min(copy * x, top) for x in xs], color="0.4", linewidth=1, zorder=1)
        text = f" {name}\n {number(top / 1e3)} TFLOP/s"
        axes.text(right, top, text, color="0.3", va="center", fontsize=9)
    start = 1.3 * max(left, axes.get_ylim()[0] / copy)
    above = 1.25 * copy
    along = {"rotation": math.degrees(math.atan(above)), "transform_rotates_text": True}
    text = f"copy {number(copy)} GB/s"
    axes.text(start, above * start, text, color="0.3", rotation_mode="anchor", **along)


def throughput(models: Results | None, styles: dict[str, dict]) -> Any:
    """Clips a second of every provider at its own best batch, a panel for each mode."""
    best: dict[str, dict[tuple[str, str], Row]] = {}
    for case, rows in _usual_clip(group(models)).items():
        bars = best.setdefault(case.way, {})
        for who, row in rows.items():
            key = f"{case.name}\n{row['frames']} frames, {case.dtype}", who
            if row.get("clips_per_s", 0) > bars.get(key, {}).get("clips_per_s", 0):
                bars[key] = row
    if not any(best.values()):
        return None
    figure, panels = _figure([0.4 + 0.27 * len(bars) for bars in best.values()])
    for axes, (mode, bars) in zip(panels, best.items(), strict=True):
        ticks: dict[str, list[float]] = {}
        for i, ((what, who), row) in enumerate(sorted(bars.items(), key=lambda bar: bar[0][0])):
            ticks.setdefault(what, []).append(y := i + 0.7 * len(ticks))
            colour, hollow = styles[who]["color"], styles[who]["fillstyle"] == "none"
            fill = {"color": "none", "edgecolor": colour, "hatch": "///"} if hollow else {}
            axes.barh(y, row["clips_per_s"], 0.9, **({"color": colour} | fill), label=who)
            text = f" {number(row['clips_per_s'])} (B={row['batch']})"
            axes.text(row["clips_per_s"], y, text, va="center", fontsize=9)
        axes.set_yticks([fmean(ys) for ys in ticks.values()], list(ticks))
        axes.invert_yaxis()
        axes.set_xlabel(f"{mode}, clips/s")
    return _legend(figure)


def memory(models: Results | None, styles: dict[str, dict]) -> Any:
    """Memory of training over the batch: the peak, or else what is kept for the backward."""
    cases = {case: rows for case, rows in group(models).items() if case.way == "training"}
    training = _usual_clip(cases)
    kinds = {"peak_MiB": "peak memory of training, MiB", "saved_MiB": "kept for the backward, MiB"}
    for kind, title in kinds.items():
        points = [
            (f"{case.name}, {case.shape}, {case.dtype}", who, case.batch, row[kind])
            for case, rows in training.items()
            for who, row in rows.items()
            if row.get(kind)
        ]
        if points:
            return _curves(points, styles, "batch", title)
    return None


def latency(models: Results | None, styles: dict[str, dict]) -> Any:
    """Time of one clip over its frames."""
    points = [
        (f"{case.name}, {row['size']} pixels, {case.dtype}", who, row["frames"], row["p50_ms"])
        for case, rows in group(models).items()
        for who, row in rows.items()
        if (case.way, case.batch) == ("inference", 1) and "p50_ms" in row
    ]
    return _curves(points, styles, "frames", "latency of one clip, ms")


def regression(found: dict[Case, float]) -> Any:
    """New time over old of our rows, those that changed the most."""
    moved = [(str(case), x) for case, x in found.items() if x != 1 and math.isfinite(x)]
    if not moved:
        return None
    kept = sorted(moved, key=lambda item: abs(math.log(item[1])))[-MOST_BARS:]
    figure, (axes,) = _figure([0.6 + 0.22 * len(kept)])
    for case, change in sorted(kept, key=lambda item: item[1]):
        colour = "0.6" if abs(change - 1) <= NOISE else COLOURS[change > 1]
        axes.barh(case, change - 1, left=1, color=colour)
        text, side = (f" {change:.2f}", "left") if change > 1 else (f"{change:.2f} ", "right")
        axes.text(change, case, text, ha=side, va="center", fontsize=8)
    axes.axvline(1, color="0.3", linewidth=1)
    axes.tick_params("y", labelsize=8)
    axes.margins(0.15, 0.02)
    axes.set_xlabel("new time over old (right: slower)")
    return figure


def _usual_clip(cases: dict[Case, dict[str, Row]]) -> dict[Case, dict[str, Row]]:
    """The cases of the clip that each model was measured with most."""
    shapes: dict[str, Counter[str]] = {}
    for case in cases:
        shapes.setdefault(case.name, Counter())[case.shape] += 1
    usual = {(name, count.most_common(1)[0][0]) for name, count in shapes.items()}
    return {case: rows for case, rows in cases.items() if (case.name, case.shape) in usual}


def _curves(points: list[tuple], styles: dict[str, dict], xlabel: str, ylabel: str) -> Any:
    """Lines through (panel, provider, x, y), for the panels with more than one x."""
    from matplotlib.ticker import LogLocator

    xs = {name: sorted({x for n, _, x, _ in points if n == name}) for name, *_ in points}
    xs = {name: ticks for name, ticks in xs.items() if len(ticks) > 1}
    if not xs:
        return None
    figure, panels = _figure([3.0] * math.ceil(len(xs) / 2), columns=min(2, len(xs)))
    for axes in panels[len(xs) :]:
        axes.set_visible(False)
    for axes, (name, ticks) in zip(panels, xs.items(), strict=False):
        for who, style in styles.items():
            line = sorted((x, y) for n, w, x, y in points if (n, w) == (name, who))
            if line:
                axes.plot(*zip(*line, strict=True), label=who, **style)
        axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
        axes.set_title(name, fontsize=9)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_xticks(ticks, [str(x) for x in ticks])
    return _legend(figure)


def _figure(heights: list[float], columns: int = 1) -> tuple[Any, list[Any]]:
    """Panels to be shown 700 pixels wide; without pyplot they need no window system."""
    from matplotlib.figure import Figure

    figure: Any = Figure((7, sum(heights) + 0.6), dpi=200, layout="constrained")
    grid = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(grid.flat)


def _legend(figure: Any) -> Any:
    """With one legend for all panels, above them, where it covers nothing."""
    pairs = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
    handles = {name: handle for panel in pairs for handle, name in panel}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=2, frameon=False)
    return figure

"""Reports as pictures. matplotlib is imported when the first one is drawn: tables and JSON do without it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headrace.base.errors import InvalidRequestError, MissingDependencyError
from headrace.bench.limits import Roofs
from headrace.bench.report import Report, number

SUFFIXES = (".svg", ".png")
_DONE, _POSSIBLE, _INK = "#2a6f97", "#d9e2ec", "#334e68"
_COLORS = ("#2a6f97", "#e07a5f", "#3d8b5f", "#8d6a9f", "#c9a227", "#5b7083", "#b23a48", "#4f9da6")
_MARKERS = "os^Dv"
_SMALL: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": _INK}


def check_picture(path: Path) -> None:
    """Raise before anything is measured, if the picture could not be drawn afterwards.

    Raises InvalidRequestError for another kind of file, MissingDependencyError without matplotlib.
    """
    if path.suffix not in SUFFIXES:
        raise InvalidRequestError(
            f"{path.name} is neither an SVG nor a PNG.", f"End its name in {' or '.join(SUFFIXES)}."
        )
    _pyplot()


def draw_bars(report: Report, path: Path) -> None:
    """Each measurement as a bar in front of what is possible."""
    plt = _pyplot()
    found = report.findings.measurements
    units = list(dict.fromkeys(each.unit for each in found))
    counts = [sum(each.unit == unit for each in found) for unit in units]
    figure, panels = plt.subplots(
        len(units), 1, figsize=(8, 1.2 + 0.42 * len(found)), squeeze=False, height_ratios=counts, layout="constrained"
    )
    for unit, panel in zip(units, panels[:, 0], strict=True):
        own = [each for each in found if each.unit == unit]
        names = [each.name.strip() for each in own]
        panel.barh(names, [each.limit or 0 for each in own], color=_POSSIBLE, height=0.8, label="possible")
        bars = panel.barh(names, [each.median for each in own], color=_DONE, height=0.5, label="measured")
        labels = [number(e.median) + (f" ({e.share:.0%})" if e.share is not None else "") for e in own]
        panel.bar_label(bars, labels, padding=4, color=_INK, fontsize=8)
        panel.set_xlabel(unit)
        panel.invert_yaxis()
        panel.margins(x=0.15)
    panels[0, 0].legend(fontsize=8, frameon=False)
    _finish(plt, figure, report, path)


def draw_waterfall(report: Report, path: Path) -> None:
    """One step per optimization, on a logarithmic axis: equal heights are equal factors."""
    plt = _pyplot()
    found = report.findings.measurements
    medians = [each.median for each in found]
    figure, panel = plt.subplots(figsize=(9, 4.8), layout="constrained")
    floor = min(medians) / 2
    for i, value in enumerate(medians):
        before = floor if i == 0 else medians[i - 1]
        color = _INK if i == 0 else _DONE if value >= before else _COLORS[1]
        panel.bar(i, abs(value - before), bottom=min(before, value), color=color, width=0.7)
        text = number(value) if i == 0 else f"{number(value)}\n× {value / before:.2f}"
        panel.annotate(text, (i, max(before, value)), (0, 3), ha="center", **_SMALL)
        if i + 1 < len(medians):
            panel.plot([i + 0.35, i + 0.65], [value, value], color=_INK, linewidth=0.8)
    limit = found[-1].limit
    if limit is not None:
        panel.axhline(limit, color=_COLORS[4], linestyle="--", linewidth=1)
        panel.annotate(f"possible: {number(limit)}", (-0.35, limit), (0, 3), **_SMALL)
    panel.set_yscale("log")
    panel.set_ylim(floor, 2.2 * max([*medians, limit or 0]))
    panel.set_xticks(range(len(found)), [each.name for each in found], rotation=25, ha="right", fontsize=8)
    panel.set_ylabel("output tok/s")
    _finish(plt, figure, report, path)


def draw_roofline(report: Report, path: Path, roofs: Roofs) -> None:
    """Measured ceilings of this machine, and each kind of op of the model below them."""
    plt = _pyplot()
    figure, panel = plt.subplots(figsize=(9, 5.4), layout="constrained")
    points = [each for each in report.findings.measurements if each.details.get("FLOP/byte")]
    xs = [float(each.details["FLOP/byte"]) for each in points]
    top, low = max(roofs.rates.values()), min(xs) / 3
    high = max(*xs, 2 * top / min(roofs.bandwidths.values()))
    panel.set_xscale("log")
    panel.set_yscale("log")
    for label, rate in roofs.rates.items():
        panel.plot([low, high], [rate / 1e9] * 2, color=_INK, linewidth=1)
        panel.annotate(f"{label}: {number(rate / 1e9)} GFLOP/s", (high, rate / 1e9), (0, 3), ha="right", **_SMALL)
    for speed in roofs.bandwidths.values():
        panel.plot([low, top / speed], [low * speed / 1e9, top / 1e9], color=_INK, linewidth=1, linestyle="--")
    _scatter(panel, points, xs)
    for label, speed in roofs.bandwidths.items():  # along its line: the axes have their limits now
        _write_along(panel, f"{label}: {number(speed / 1e9)} GB/s", low, speed / 1e9)
    panel.set_xlabel("FLOP per byte moved (weights, KV, activations)")
    panel.set_ylabel("GFLOP/s")
    panel.legend(fontsize=8, frameon=False, loc="lower right", ncols=2)
    _finish(plt, figure, report, path)


def _scatter(panel: Any, points: Sequence[Any], xs: Sequence[float]) -> None:
    names = [each.name.split(": ") for each in points]  # work: op
    works, ops = (list(dict.fromkeys(column)) for column in zip(*names, strict=True))
    for each, x, (work, op) in zip(points, xs, names, strict=True):
        color, marker = _COLORS[ops.index(op) % 8], _MARKERS[works.index(work) % 5]
        panel.scatter(x, each.details["GFLOP/s"], color=color, marker=marker, s=42, zorder=3)
    for i, op in enumerate(ops):
        panel.plot([], [], color=_COLORS[i % 8], linewidth=6, label=op)
    for i, work in enumerate(works):
        panel.scatter([], [], color="none", edgecolor=_INK, marker=_MARKERS[i % 5], label=work)


def _write_along(panel: Any, text: str, x: float, slope: float) -> None:
    """Above the line y = `slope` × x, from `x` on."""
    (x0, y0), (x1, y1) = panel.transData.transform([(x, slope * x), (10 * x, slope * 10 * x)])
    angle = math.degrees(math.atan2(y1 - y0, x1 - x0))
    panel.annotate(text, (x, slope * x), (4, 6), rotation=angle, rotation_mode="anchor", ha="left", **_SMALL)


def _finish(plt: Any, figure: Any, report: Report, path: Path) -> None:
    machine = report.environment["machine"]
    title = f"{report.model['name']}, {machine['cpu']}, {machine['cores']} cores, {report.environment['date']}"
    figure.suptitle(title, fontsize=9, color=_INK)
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise InvalidRequestError(f"Cannot write {path}: {error.strerror}.", "Name a writable file.") from None
    finally:
        plt.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise MissingDependencyError(
            "Pictures are drawn by matplotlib, which is not installed.",
            "Run `pip install 'headrace[bench]'`, or leave out --picture: the table and --json do without it.",
        ) from None
    matplotlib.use("Agg")  # draws into files; needs no screen
    import matplotlib.pyplot as plt

    return plt

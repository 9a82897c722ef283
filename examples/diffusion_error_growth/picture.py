"""Panels of lines, as one self-contained SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10

_COLORS = ("#2a6f97", "#e07a5f", "#3d8b5f", "#8d6a9f", "#c9a227", "#b23a48")
_WIDTH, _HEIGHT, _LEFT, _TOP, _ROW = 470, 300, 52, 34, 16


@dataclass(frozen=True, slots=True)
class Line:
    """Points in the order of their x. `y` that are not above zero are left out where the axis is logarithmic."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True, slots=True)
class Panel:
    """Some lines over one pair of axes; y is logarithmic unless it is a share."""

    title: str
    x_title: str
    lines: Sequence[Line]
    is_share: bool = False


def panels_svg(panels: Sequence[Panel], *, columns: int = 2) -> str:
    """Panels row by row, each with its legend below."""
    below = _ROW * -(-max(len(panel.lines) for panel in panels) // 2) + 40
    cell = _HEIGHT + below
    drawn = "".join(
        f'<g transform="translate({_WIDTH * (i % columns)},{cell * (i // columns)})">{_panel(panel)}</g>'
        for i, panel in enumerate(panels)
    )
    width, height = _WIDTH * columns, cell * -(-len(panels) // columns)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
        f' font-size="12"><rect width="{width}" height="{height}" fill="white"/>{drawn}</svg>\n'
    )


def _panel(panel: Panel) -> str:
    right, bottom = _WIDTH - 16, _HEIGHT
    shown = [[(x, y) for x, y in zip(line.x, line.y, strict=True) if panel.is_share or y > 0] for line in panel.lines]
    xs, ys = ([point[axis] for points in shown for point in points] for axis in (0, 1))
    low_x, high_x = min(xs), max(xs)
    low, high = (0.0, 1.0) if panel.is_share else (floor(log10(min(ys))), floor(log10(max(ys))) + 1.0)

    def at(x: float, y: float) -> str:
        level = y if panel.is_share else log10(y)
        across = (right - _LEFT) * (x - low_x) / ((high_x - low_x) or 1)
        return f"{_LEFT + across:.1f},{bottom - (bottom - _TOP) * (level - low) / (high - low):.1f}"

    marks = [0.0, 0.5, 1.0] if panel.is_share else [10.0**e for e in range(int(low), int(high) + 1)]
    parts = [
        f'<text x="{(_LEFT + right) / 2}" y="20" text-anchor="middle" font-weight="bold">{escape(panel.title)}</text>',
        f'<path d="M{_LEFT},{_TOP}V{bottom}H{right}" fill="none" stroke="#888"/>',
        f'<text x="{_LEFT}" y="{bottom + 16}" text-anchor="middle">{low_x:g}</text>',
        f'<text x="{right}" y="{bottom + 16}" text-anchor="middle">{high_x:g}</text>',
        f'<text x="{(_LEFT + right) / 2}" y="{bottom + 16}" text-anchor="middle">{escape(panel.x_title)}</text>',
    ]
    for mark in marks:
        y = float(at(low_x, mark).split(",")[1])
        parts.append(f'<path d="M{_LEFT},{y}H{right}" stroke="#eee"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 4}" text-anchor="end">{mark:g}</text>')
    for i, (line, points) in enumerate(zip(panel.lines, shown, strict=True)):
        color = _COLORS[i % len(_COLORS)]
        path = " ".join(at(x, y) for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        x, y = _LEFT + (right - _LEFT) // 2 * (i % 2), bottom + 34 + _ROW * (i // 2)
        parts.append(f'<path d="M{x},{y - 4}h18" stroke="{color}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 24}" y="{y}">{escape(line.name)}</text>')
    return "".join(parts)

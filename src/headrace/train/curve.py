"""Learning curves, drawn."""

import json
from math import log

_WIDTH, _HEIGHT, _MARGIN = 640, 300, 48


def curve_svg(lines: str, title: str) -> str:
    """The loss by step, on a logarithmic scale, of a ``curve.jsonl``: a self-contained SVG."""
    entries = [json.loads(line) for line in lines.splitlines()]
    steps, losses = [entry["step"] for entry in entries], [max(entry["loss"], 1e-9) for entry in entries]
    low, high = min(losses), max(losses)
    if high / low < 1.01:
        low, high = low / 1.01, high * 1.01

    def x(step: int) -> float:
        return _MARGIN + (_WIDTH - 2 * _MARGIN) * step / max(1, steps[-1])

    def y(loss: float) -> float:
        return _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * log(loss / low) / log(high / low)

    points = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in zip(steps, losses, strict=True))
    marks = "".join(
        f'<text x="{_MARGIN - 6}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.3g}</text>' for loss in (low, high)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
        ' font-family="sans-serif" font-size="12">'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>'
        f'<text x="{_WIDTH / 2}" y="20" text-anchor="middle">{title}: loss by step</text>'
        f'<path d="M{_MARGIN},{_MARGIN}V{_HEIGHT - _MARGIN}H{_WIDTH - _MARGIN}" fill="none" stroke="#888"/>'
        f'{marks}<text x="{_WIDTH - _MARGIN}" y="{_HEIGHT - _MARGIN + 18}" text-anchor="end">{steps[-1]}</text>'
        f'<polyline points="{points}" fill="none" stroke="#0a6" stroke-width="1.5"/></svg>\n'
    )

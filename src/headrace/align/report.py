"""An alignment, told: for a terminal, as JSON, and as one HTML file; and what one side alone answered to tasks."""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import isnan, log10
from typing import Any

from headrace.align.alignment import Alignment
from headrace.align.nodes import NodeError
from headrace.align.scoring import Answers, Score, in_all

_WORST = 12
_FLOOR = 1e-9  # errors below it are drawn at it


def to_json(found: Alignment) -> str:
    """All figures; null for those that are not known."""
    tasks = None if found.tasks is None else _beside(found.tasks)
    return _json(asdict(replace(found, tasks=None)) | {"tasks": tasks})


def to_text(found: Alignment) -> str:
    """The tables of a terminal."""
    d, p = found.divergence, found.policy
    lines = [
        f"A  {found.a}",
        f"B  {found.b}",
        f"{d.num_positions:,} positions",
        "",
        *_rows(
            ("", "mean", "p50", "p99", "max"),
            [
                ("|Δ log-probability|", *map(_figure, (d.logprob_delta_mean, d.logprob_delta_p50, d.logprob_delta_p99,
                                                        d.logprob_delta_max))),
                ("KL(A || B), nats", _figure(d.kl_mean), "", _figure(d.kl_p99), _figure(d.kl_max)),
            ],
        ),
        f"same likeliest token  {_percent(d.top1_agreement)}",
        f"perplexity            {d.reference_perplexity:.4f} and {d.perplexity:.4f}",
        "",
        f"as a policy trained on B's tokens: k1 {p.k1:.3g}, k3 {p.k3:.3g}; ratio p1 {p.ratio_p1:.4f}, p50 "
        f"{p.ratio_p50:.4f}, p99 {p.ratio_p99:.4f}; clipped at 0.2: {100 * p.clipped:.2f} %; by text "
        f"{p.sequence_ratio_min:.4f} to {p.sequence_ratio_max:.4f}",
    ]  # fmt: skip
    lines += [f"not known: {said}" for said in found.unknown]
    if found.nodes:
        worst = sorted(found.nodes, key=lambda node: -_or_zero(node.own))[:_WORST]
        first = f"{found.first} departs first by itself" if found.first else "none departs by itself"
        lines += ["", f"nodes: {first}; most error of their own:", ""]
        lines += _rows(
            ("node", "op", "own", "in all", "1 - cosine"),
            [(n.name, n.op, _figure(n.own), _figure(n.total), _figure(1 - n.cosine)) for n in worst],
        )
    if found.causes:
        lines += ["", "mean |Δ log-probability| with one difference taken back:", ""]
        lines += _rows(
            ("difference", "A", "B", "left", "explains"),
            [(c.name, c.a, c.b, _figure(c.left), f"{100 * c.explains:.1f} %") for c in found.causes],
        )
    if found.tasks is not None:
        lines += ["", *_table(found.tasks)]
    return "\n".join(lines) + "\n"


def scores_to_json(title: str, scores: Mapping[str, Score]) -> str:
    """What one side answered."""
    return _json({"a": title, "tasks": {name: _held(score) for name, score in _with_all(scores).items()}})


def scores_to_text(title: str, scores: Mapping[str, Score]) -> str:
    """The same for a terminal."""
    rows = [(name, str(len(score.right)), _share(score)) for name, score in _with_all(scores).items()]
    return "\n".join([f"A  {title}", "", *_rows(("task", "items", "right, %"), rows)]) + "\n"


def to_html(found: Alignment) -> str:
    """One file, with a picture of the errors along the graph; nothing is loaded from elsewhere."""
    text = html.escape(to_text(found))
    return (
        '<!doctype html><meta charset="utf-8"><title>headrace align</title>'
        '<body style="font-family:sans-serif;max-width:60rem;margin:2rem auto">'
        f"<h1>Alignment</h1>{_picture(found.nodes) if found.nodes else ''}<pre>{text}</pre></body>\n"
    )


def _table(found: Answers) -> list[str]:
    """Both sides' answers, task by task and in all."""
    rows = []
    for name, (a, b) in _pairs(found).items():
        difference, error = b.minus(a)
        more, fewer = a.against(b)
        changed = f"{100 * difference:+.1f} ± {100 * error:.1f}"
        rows.append((name, str(len(a.right)), _share(a), _share(b), changed, str(more), str(fewer)))
    head = ("task", "items", "A right, %", "B right, %", "B - A", "A alone", "B alone")
    return _rows(head, rows)


def _beside(found: Answers) -> dict[str, Any]:
    """The same as figures."""
    told: dict[str, Any] = {}
    for name, (a, b) in _pairs(found).items():
        difference, error = b.minus(a)
        more, fewer = a.against(b)
        told[name] = {
            "a": _held(a),
            "b": _held(b),
            "difference": difference,
            "difference_error": error,
            "a_alone": more,
            "b_alone": fewer,
        }
    return told


def _pairs(found: Answers) -> dict[str, tuple[Score, Score]]:
    a, b = _with_all(found.a), _with_all(found.b)
    return {name: (a[name], b[name]) for name in a}


def _with_all(scores: Mapping[str, Score]) -> dict[str, Score]:
    return {**scores, "all": in_all(scores)}


def _held(score: Score) -> dict[str, Any]:
    return {"items": len(score.right), "accuracy": score.accuracy, "error": score.error}


def _share(score: Score) -> str:
    return f"{100 * score.accuracy:.1f} ± {100 * score.error:.1f}"


def _picture(nodes: Sequence[NodeError]) -> str:
    """Relative errors of all nodes in the graph's order, logarithmic: in all, and their own."""
    width, height, left = 900, 260, 50

    def points(errors: Sequence[float]) -> str:
        return " ".join(
            f"{left + (width - left) * i / max(1, len(errors) - 1):.1f},{_height(error, height):.1f}"
            for i, error in enumerate(errors)
            if not isnan(error)
        )

    marks = "".join(
        f'<text x="{left - 4}" y="{_height(10.0**e, height) + 4:.1f}" text-anchor="end">1e{e}</text>'
        for e in (-9, -6, -3, 0)
    )
    return (
        f'<svg viewBox="0 0 {width} {height + 20}" font-size="11">{marks}'
        f'<polyline points="{points([n.total for n in nodes])}" fill="none" stroke="#06c"/>'
        f'<polyline points="{points([n.own for n in nodes])}" fill="none" stroke="#c40"/>'
        f'<text x="{left}" y="{height + 15}" fill="#06c">in all</text>'
        f'<text x="{left + 60}" y="{height + 15}" fill="#c40">its own</text></svg>'
    )


def _height(error: float, height: int) -> float:
    return height * (1 - (log10(max(error, _FLOOR)) + 9) / 9.5) if error < 3 else 0.0


def _figure(value: float) -> str:
    if isnan(value):
        return "–"
    return "0" if value == 0 else f"{value:.3g}"


def _percent(share: float) -> str:
    return "not known" if isnan(share) else f"{100 * share:.3f} %"


def _or_zero(value: float) -> float:
    return 0.0 if isnan(value) else value


def _json(figures: dict[str, Any]) -> str:
    return json.dumps(_known(figures), indent=2, ensure_ascii=False) + "\n"


def _known(value: Any) -> Any:
    """The same without NaN, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: _known(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_known(each) for each in value]
    return None if isinstance(value, float) and isnan(value) else value


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    made = []
    for row in (head, *rows):
        name, *cells = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        made.append("  ".join((name.strip().ljust(widths[0]), *cells)).rstrip())
    return made

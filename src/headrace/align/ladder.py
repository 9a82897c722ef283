"""The ladder of precisions: weights, activations and KV, one by one and together; and what each matrix bears."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import log10
from typing import Literal

from headrace.align.alignment import compare_all
from headrace.align.divergence import Divergence
from headrace.align.subjects import Subject, matrices_of, open_subject
from headrace.executors.native_isa import isa_rounding_inputs

EXACT = {"activation": "f32", "kv": "f32"}
STEPS: tuple[tuple[str, dict[str, str]], ...] = (
    ("activations int16", {"activation": "int16"}),
    ("activations bf16", {"activation": "bf16"}),
    ("activations int8", {"activation": "int8"}),
    ("inputs fp8 by token", {"executor": "torch", "inputs": "fp8-channel"}),
    ("inputs int8 by token", {"executor": "torch", "inputs": "int8-channel"}),
    ("inputs int4-g32", {"executor": "torch", "inputs": "int4-g32"}),
    ("KV bf16", {"kv": "bf16"}),
    ("KV fp8", {"kv": "fp8"}),
    ("KV int8", {"kv": "int8"}),
    ("KV int4", {"kv": "int4"}),
    ("weights bf16", {"weights": "bf16"}),
    ("weights int8-channel", {"weights": "int8-channel"}),
    ("weights int8-g32", {"weights": "int8-g32"}),
    ("weights fp8-channel", {"weights": "fp8-channel"}),
    ("weights int4-g32", {"weights": "int4-g32"}),
    ("W8A8, KV int8", {"weights": "int8-channel", "activation": "int8", "kv": "int8"}),
    ("W4A16, KV bf16", {"weights": "int4-g32", "activation": "int16", "kv": "bf16"}),
    ("W4A8, KV int8", {"weights": "int4-g32", "activation": "int8", "kv": "int8"}),
    ("all fp8, KV fp8", {"executor": "torch", "weights": "fp8-channel", "inputs": "fp8-channel", "kv": "fp8"}),
    ("W4A4, KV int4", {"executor": "torch", "weights": "int4-g32", "inputs": "int4-g32", "kv": "int4"}),
)
"""Titles, and what they change in a subject that computes in f32 on the stored weights. Activations are
a native kernel's number format, int8 as machines without AMX have it; inputs are rounded for the torch executor."""

Part = Literal["weights", "inputs"]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Mean KL to the source if only the matrices of one kind in one layer, or what these read, are in a format:
    ``kl[layer][kind]``."""

    format: str
    part: Part
    kinds: tuple[str, ...]
    kl: tuple[tuple[float, ...], ...]


def ladder(
    model: str, tokens: Sequence[Sequence[int]], *, progress: Callable[[int], None]
) -> list[tuple[str, Divergence]]:
    """Every step beside the model in f32, by its title."""
    exact = replace(Subject(model=model), **EXACT)  # type: ignore[arg-type]
    subjects = [replace(exact, **changes) for _, changes in STEPS]  # type: ignore[arg-type]
    subjects = [replace(subject, isa=isa_rounding_inputs(subject.activation) or "") for subject in subjects]
    found = compare_all(exact, subjects, tokens, progress=progress)
    return [(title, divergence) for (title, _), divergence in zip(STEPS, found, strict=True)]


def sensitivity(
    model: str,
    format_name: str,
    tokens: Sequence[Sequence[int]],
    *,
    part: Part = "weights",
    progress: Callable[[int], None],
) -> Sensitivity:
    """One matrix after the other in a format, or the inputs of its layer; all others as they are."""
    exact = replace(Subject(model=model), **EXACT)  # type: ignore[arg-type]
    if part == "inputs":
        exact = replace(exact, executor="torch")
    graph = open_subject(exact).graph
    names = matrices_of(graph)
    by_layer: dict[str, dict[str, int]] = {}
    for i, name in enumerate(names):
        _, layer, kind = name.removesuffix(".weight").split(".", 2)
        by_layer.setdefault(layer, {})[kind] = i
    subjects = [
        replace(exact, weights=format_name, only=name)
        if part == "weights"
        else replace(exact, inputs=format_name, inputs_of=name.removesuffix(".weight"))
        for name in names
    ]
    found = compare_all(exact, subjects, tokens, progress=progress)
    kinds = tuple(next(iter(by_layer.values())))
    rows = tuple(tuple(found[of[kind]].kl_mean for kind in kinds) for of in by_layer.values())
    return Sensitivity(format_name, part, kinds, rows)


_WHAT: dict[Part, str] = {"weights": "one matrix", "inputs": "what one matrix reads"}


def sensitivity_svg(found: Sensitivity) -> str:
    """The map as a picture: a square for each matrix, darker for more KL, on a logarithmic scale over three decades."""
    cell, left, top = 22, 60, 40
    most = max(max(row) for row in found.kl) or 1.0
    squares = []
    for y, row in enumerate(found.kl):
        squares.append(f'<text x="{left - 6}" y="{top + cell * y + 15}" text-anchor="end">{y}</text>')
        for x, kl in enumerate(row):
            share = max(0.0, 1 + log10(max(kl, 1e-12) / most) / 3)
            squares.append(
                f'<rect x="{left + 3 * cell * x}" y="{top + cell * y}" width="{3 * cell - 2}" height="{cell - 2}"'
                f' fill="#c40" fill-opacity="{share:.3f}" stroke="#ddd"><title>{kl:.3g}</title></rect>'
            )
    heads = "".join(
        f'<text x="{left + 3 * cell * x + 32}" y="{top - 8}" text-anchor="middle">{kind}</text>'
        for x, kind in enumerate(found.kinds)
    )
    width, height = left + 3 * cell * len(found.kinds) + 20, top + cell * len(found.kl) + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="12">'
        f'<rect width="{width}" height="{height}" fill="white"/>'
        f'<text x="{left}" y="16">mean KL with {_WHAT[found.part]} in {found.format}; darkest {most:.2g}</text>'
        f"{heads}{''.join(squares)}</svg>\n"
    )

"""A format for each matrix: what four and a half bits buy when they go where they count.

    python examples/mixed_precision_budget.py

One pass forward and one back predict what every matrix costs in every format. Steps that save most KL per byte are
taken first, so the choices for all budgets are the rungs of one ladder. The prediction is then held against what is
measured, and both against the same size spent evenly.
"""

import tempfile
from collections import Counter
from pathlib import Path

from headrace.compress.budget import parse_budget
from headrace.compress.pipeline import Judging, judged, make_evaluator, make_planner, open_source
from headrace.compress.recipe import Recipe

EVEN = "int4-g32"  # 4.5 bits a weight, scales counted
BUDGETS = ("4.5bits", "5bits")
JUDGING = Judging(length=64, calibration_texts=2, held_out_texts=2)


def main(folder: Path) -> None:
    recipe = Recipe(format=EVEN, method="rtn")
    source = open_source(None)
    planner = make_planner(source, recipe, JUDGING)
    sizes, costs = planner.ladder.sizes, planner.ladder.costs
    print(f"{len(sizes)} rungs, from {sizes[0] / 1e6:.1f} MB (KL {costs[0]:.3f}) to {sizes[-1] / 1e6:.1f} MB (KL 0)")

    evaluator = make_evaluator(source, JUDGING)
    even = judged(source, recipe, JUDGING, evaluator, folder / EVEN)
    print(f"{'':10}{'MB':>8}{'predicted':>12}{'measured KL':>14}")
    print(row(f"all {EVEN}", even, None))
    for text in BUDGETS:
        plan = planner.within(parse_budget(text))
        outcome = judged(source, plan.recipe, JUDGING, evaluator, folder / text)
        print(row(text, outcome, plan.kl))
        for kind, formats in by_kind(plan.recipe.mixed).items():
            print(f"    {kind:8} {', '.join(f'{count} × {name}' for name, count in formats.most_common())}")
        assert kl_of(outcome) < 0.8 * kl_of(even), "the budget was spent no better than evenly"


def by_kind(mixed):
    """How often each format was chosen, by what the matrices do: ``q``, ``down``, …"""
    found = {}
    for name, format_name in mixed:
        found.setdefault(name.split(".")[-2], Counter())[format_name] += 1
    return found


def row(title, outcome, predicted):
    said = "" if predicted is None else f"{predicted:.4f}"
    return f"{title:12}{outcome.num_bytes / 1e6:6.1f}{said:>12}{kl_of(outcome):14.4f}"


def kl_of(outcome):
    return outcome.evaluation.divergence.kl_mean


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(Path(made))

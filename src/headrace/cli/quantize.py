"""``headrace quantize``: a smaller model, judged before it is written."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.base.errors import InvalidRequestError
from headrace.cli.options import add_text_arguments, memory_size, positive, text_arguments
from headrace.cli.status import status

if TYPE_CHECKING:
    from headrace.compress.budget import Budget
    from headrace.compress.pipeline import Judging, Source
    from headrace.compress.planner import Planner
    from headrace.compress.recipe import Recipe

HELP = "quantize a model into a folder or a GGUF file, with a card of what that did to it"

_FORMAT = "int4-g32"
_SHARD_BYTES = 5 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="the model to quantize")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="OUT", help="the folder, or the .gguf file, to make; must not exist"
    )
    parser.add_argument(
        "--format",
        help=f"int4-g32, int8-channel, fp8-block, … (default: {_FORMAT}); for a .gguf q8_0, q4_0, q4_1 (default: q4_0)",
    )
    parser.add_argument(
        "--max-shard-size",
        type=memory_size,
        metavar="SIZE",
        help="of one safetensors file of a folder, as 2GiB (default: 5GiB)",
    )
    parser.add_argument(
        "--budget", metavar="SIZE", help="give each matrix a format of its own, the best for 4.6bits a weight, or 110MB"
    )
    parser.add_argument(
        "--method", help="rtn, gptq, awq, awq+gptq or smoothquant (default: awq+gptq; for formats of floats awq)"
    )
    parser.add_argument(
        "--activation", choices=("f32", "int8"), help="as it is judged: int8 as served without AMX (default: f32)"
    )
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="PATTERN", help="leave matching matrices (repeatable)"
    )
    parser.add_argument("--logits", metavar="FORMAT", help="quantize the logits' matrix too (and a tied embedding)")
    parser.add_argument(
        "--compare",
        metavar="RECIPES",
        help="judge several and write none: int4-g32,4.6bits:gptq,int8-channel:smoothquant:int8",
    )
    group = parser.add_argument_group("gate")
    group.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="largest mean KL to the source (default: 0.3); without --format, the smallest model that keeps to it",
    )
    group.add_argument("--max-flips", type=float, metavar="SHARE", help="most changed likeliest tokens (default: 0.3)")
    group.add_argument(
        "--max-perplexity-growth", type=float, metavar="SHARE", help="largest growth of the perplexity (default: 0.25)"
    )
    group.add_argument("--no-gate", action="store_true", help="write it however far from its source it is")
    add_text_arguments(group)
    group.add_argument("--calibration-texts", type=positive, default=32, metavar="N", help="texts to calibrate on")
    group.add_argument("--held-out-texts", type=positive, default=16, metavar="N", help="texts to judge by")
    group.add_argument("--length", type=positive, default=256, metavar="N", help="tokens of each text")


def run(args: argparse.Namespace) -> int:
    if (args.output is None) == (args.compare is None):
        raise InvalidRequestError("Say what to do.", "Give either -o OUT to write a model, or --compare RECIPES.")
    aim = _aim(args)
    judging = _judging(args)
    if args.compare is not None:
        return _compare(args, judging)
    from headrace.compress.pipeline import quantize_model
    from headrace.compress.recipe import default_method

    format_name = args.format or ("q4_0" if args.output.suffix == ".gguf" else _FORMAT)
    if args.output.suffix == ".gguf" and args.max_shard_size is not None:
        raise InvalidRequestError("A GGUF file is written whole.", "Leave --max-shard-size out, or write a folder.")
    recipe = _recipe(args, format_name, args.method or default_method(format_name), args.activation)
    card = quantize_model(
        args.model,
        args.output,
        recipe,
        judging,
        command=["headrace", *sys.argv[1:]],
        progress=status,
        aim=aim,
        max_shard_bytes=_SHARD_BYTES if args.max_shard_size is None else args.max_shard_size,
    )
    status()
    print(card.to_markdown())
    print(f"wrote {args.output}")
    return 0


def _aim(args: argparse.Namespace) -> "Budget | float | None":
    """What formats of single matrices are chosen for, if they are."""
    from headrace.compress.budget import parse_budget

    if args.max_kl is not None and not 0 < args.max_kl < float("inf"):
        raise InvalidRequestError(f"A mean KL of {args.max_kl:g} is no limit.", "Give --max-kl a number above 0.")
    if args.output is not None and args.output.suffix == ".gguf":
        if args.budget is not None:
            raise InvalidRequestError(
                "A GGUF file has one format for all matrices.", "Write a folder, or give --format."
            )
        return None
    if args.budget is None:
        return args.max_kl if args.format is None and args.compare is None else None
    for other, given in (("--format", args.format), ("--max-kl", args.max_kl), ("--compare", args.compare)):
        if given is not None:
            raise InvalidRequestError(
                f"--budget and {other} contradict each other.",
                "Write budgets among the recipes, as in --compare 4.6bits:gptq."
                if other == "--compare"
                else "Give one of them: either says which formats are taken.",
            )
    return parse_budget(args.budget)


def _recipe(args: argparse.Namespace, format_name: str, method: str, activation: str | None) -> "Recipe":
    from headrace.compress.recipe import Recipe

    return Recipe(
        format=format_name,
        method=method,
        activation=activation or ("int8" if method == "smoothquant" else "f32"),
        ignore=tuple(args.ignore),
        logits=args.logits,
    )


def _judging(args: argparse.Namespace) -> "Judging":
    from headrace.compress.gate import Thresholds
    from headrace.compress.pipeline import Judging

    given = {"kl": args.max_kl, "flips": args.max_flips, "perplexity": args.max_perplexity_growth}
    if args.no_gate:
        if any(value is not None for value in given.values()):
            raise InvalidRequestError("--no-gate and thresholds contradict each other.", "Give one of them.")
        thresholds = Thresholds(kl=None, flips=None, perplexity=None)
    else:
        thresholds = Thresholds(**{name: value for name, value in given.items() if value is not None})
    if args.length < 2:
        raise InvalidRequestError("Texts of one token have nothing to predict.", "Give --length 2 or more.")
    return Judging(
        length=args.length,
        calibration_texts=args.calibration_texts,
        held_out_texts=args.held_out_texts,
        **text_arguments(args),
        thresholds=thresholds,
    )


def _compare(args: argparse.Namespace, judging: "Judging") -> int:
    """A table of recipes: size, quality, speed. Matrices lie in a temporary folder meanwhile."""
    with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
        return _table_of(args, judging, Path(folder))


def _table_of(args: argparse.Namespace, judging: "Judging", folder: Path) -> int:
    from headrace.compress.export import folder_bytes
    from headrace.compress.gate import decode_speed
    from headrace.compress.pipeline import judged, make_evaluator, open_source

    source = open_source(args.model)
    recipes = _recipes(args, source, judging)
    evaluator = make_evaluator(source, judging, folder)
    head = ("recipe", "MB", "predicted", "mean KL", "p99 KL", "same top 1", "perplexity", "tokens/s")
    rows = [("source", f"{folder_bytes(source.spec, source.weights, {}) / 1e6:.1f}", "", "", "", "", "", "")]
    for recipe, predicted in recipes:
        outcome = judged(source, recipe, judging, evaluator, folder / str(len(rows)))
        found = outcome.evaluation.divergence
        rows[0] = (*rows[0][:6], f"{found.reference_perplexity:.3f}", rows[0][7])
        rows.append(
            (
                recipe.title,
                f"{outcome.num_bytes / 1e6:.1f}",
                "" if predicted is None else f"{predicted:.4f}",
                f"{found.kl_mean:.4f}",
                f"{found.kl_p99:.3f}",
                f"{100 * found.top1_agreement:.2f} %",
                f"{found.perplexity:.3f}",
                f"{decode_speed(source.graph, outcome.quantized.weights, activation=recipe.executor_activation):.0f}",
            )
        )
        print(f"{recipe.title}: KL {found.kl_mean:.4f}", file=sys.stderr)
    rows[0] = (*rows[0][:7], f"{decode_speed(source.graph, source.weights):.0f}")
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        name, *cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join((name.strip().ljust(widths[0]), *cells)))
    return 0


def _recipes(args: argparse.Namespace, source: "Source", judging: "Judging") -> "list[tuple[Recipe, float | None]]":
    """Those of --compare, and the predicted KL of budgets."""
    from headrace.compress.budget import is_budget, parse_budget
    from headrace.compress.pipeline import make_planner

    found: list[tuple[Recipe, float | None]] = []
    planners: dict[tuple[str, str], Planner] = {}
    for text in args.compare.split(","):
        format_name, method, activation, *more = [*text.split(":"), "", ""][: max(3, text.count(":") + 1)]
        if more:
            raise InvalidRequestError(f"{text!r} is no recipe.", "Write FORMAT:METHOD:ACTIVATION, or less of it.")
        if not is_budget(format_name):
            found.append((_recipe(args, format_name, method or "rtn", activation or args.activation), None))
            continue
        recipe = _recipe(args, _FORMAT, method or "rtn", activation or args.activation)
        key = recipe.method, recipe.activation
        if key not in planners:
            planners[key] = make_planner(source, recipe, judging)
        planned = planners[key].within(parse_budget(format_name))
        found.append((planned.recipe, planned.kl))
    return found

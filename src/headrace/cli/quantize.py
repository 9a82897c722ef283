"""``headrace quantize``: a smaller model, judged before it is written."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.base.errors import InvalidRequestError
from headrace.cli.options import memory_size, positive
from headrace.cli.status import status

if TYPE_CHECKING:
    from headrace.compress.pipeline import Judging

HELP = "quantize a model into a folder or a GGUF file, with a card of what that did to it"

_SHARD_BYTES = 5 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="the model to quantize")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="OUT", help="the folder, or the .gguf file, to make; must not exist"
    )
    parser.add_argument(
        "--format",
        help="int4-g32, int8-channel, fp8-block, … (default: int4-g32); for a .gguf q8_0, q4_0, q4_1 (default: q4_0)",
    )
    parser.add_argument(
        "--max-shard-size",
        type=memory_size,
        metavar="SIZE",
        help="of one safetensors file of a folder, as 2GiB (default: 5GiB)",
    )
    parser.add_argument("--method", default="gptq", help="rtn, gptq or awq (default: gptq)")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="PATTERN", help="leave matching matrices (repeatable)"
    )
    parser.add_argument("--logits", metavar="FORMAT", help="quantize the logits' matrix too (and a tied embedding)")
    parser.add_argument(
        "--compare", metavar="RECIPES", help="judge several and write none: int4-g32:rtn,int4-g32:gptq,int8-channel:rtn"
    )
    group = parser.add_argument_group("gate")
    group.add_argument("--max-kl", type=float, metavar="NATS", help="largest mean KL to the source (default: 0.3)")
    group.add_argument("--max-flips", type=float, metavar="SHARE", help="most changed likeliest tokens (default: 0.3)")
    group.add_argument(
        "--max-perplexity-growth", type=float, metavar="SHARE", help="largest growth of the perplexity (default: 0.25)"
    )
    group.add_argument("--no-gate", action="store_true", help="write it however far from its source it is")
    group.add_argument("--calibration-texts", type=positive, default=32, metavar="N", help="texts to calibrate on")
    group.add_argument("--held-out-texts", type=positive, default=16, metavar="N", help="texts to judge by")
    group.add_argument("--length", type=positive, default=256, metavar="N", help="tokens of each text")


def run(args: argparse.Namespace) -> int:
    if (args.output is None) == (args.compare is None):
        raise InvalidRequestError("Say what to do.", "Give either -o OUT to write a model, or --compare RECIPES.")
    judging = _judging(args)
    if args.compare is not None:
        return _compare(args, judging)
    from headrace.compress.pipeline import quantize_model
    from headrace.compress.recipe import Recipe

    format_name = args.format or ("q4_0" if args.output.suffix == ".gguf" else "int4-g32")
    if args.output.suffix == ".gguf" and args.max_shard_size is not None:
        raise InvalidRequestError("A GGUF file is written whole.", "Leave --max-shard-size out, or write a folder.")
    recipe = Recipe(format=format_name, method=args.method, ignore=tuple(args.ignore), logits=args.logits)
    card = quantize_model(
        args.model,
        args.output,
        recipe,
        judging,
        command=["headrace", *sys.argv[1:]],
        progress=status,
        max_shard_bytes=_SHARD_BYTES if args.max_shard_size is None else args.max_shard_size,
    )
    status()
    print(card.to_markdown())
    print(f"wrote {args.output}")
    return 0


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
        thresholds=thresholds,
    )


def _compare(args: argparse.Namespace, judging: "Judging") -> int:
    """A table of recipes: size, quality, speed."""
    from headrace.compress.gate import decode_speed
    from headrace.compress.pipeline import judged, make_evaluator, open_source, stored_bytes
    from headrace.compress.recipe import Recipe

    recipes = []
    for text in args.compare.split(","):
        format_name, _, method = text.partition(":")
        recipes.append(
            Recipe(format=format_name, method=method or "rtn", ignore=tuple(args.ignore), logits=args.logits)
        )
    source = open_source(args.model)
    evaluator = make_evaluator(source, judging)
    head = ("recipe", "MB", "mean KL", "p99 KL", "same top 1", "perplexity", "tokens/s")
    rows = [("source", f"{stored_bytes(source.spec, source.weights) / 1e6:.1f}", "", "", "", "", "")]
    for recipe in recipes:
        outcome = judged(source, recipe, judging, evaluator)
        found = outcome.evaluation.divergence
        rows[0] = (*rows[0][:5], f"{found.reference_perplexity:.3f}", rows[0][6])
        rows.append(
            (
                recipe.title,
                f"{outcome.num_bytes / 1e6:.1f}",
                f"{found.kl_mean:.4f}",
                f"{found.kl_p99:.3f}",
                f"{100 * found.top1_agreement:.2f} %",
                f"{found.perplexity:.3f}",
                f"{decode_speed(source.graph, outcome.quantized.weights):.0f}",
            )
        )
        print(f"{recipe.title}: KL {found.kl_mean:.4f}", file=sys.stderr)
    rows[0] = (*rows[0][:6], f"{decode_speed(source.graph, source.weights):.0f}")
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        name, *cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join((name.strip().ljust(widths[0]), *cells)))
    return 0

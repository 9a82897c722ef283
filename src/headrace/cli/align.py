"""``headrace align``: two ways of running a model over the same tokens, and how far apart they are."""

import argparse
import sys
from pathlib import Path

from headrace.base.errors import InvalidRequestError
from headrace.cli.options import positive

HELP = "compare two ways of running a model: executors, formats, checkpoints"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="the reference: MODEL?key=value&…, or native, or torch")
    parser.add_argument("b", metavar="B", help="what is compared with it, e.g. 'smollm2-135m?activation=int8&kv=int8'")
    parser.add_argument("--texts", type=positive, default=8, metavar="N", help="how many texts (default: 8)")
    parser.add_argument("--length", type=positive, default=128, metavar="N", help="tokens of each (default: 128)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="compare on this (default: Python's documents)")
    parser.add_argument(
        "--threshold", type=float, default=1e-3, metavar="X", help="relative error at which a node departs (1e-3)"
    )
    parser.add_argument("--causes", action="store_true", help="take back one difference after the other")
    parser.add_argument("--budget", metavar="LIMITS", help="exit with 1 beyond these: kl<0.01,dlogprob_p99<0.1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report with a picture")


def run(args: argparse.Namespace) -> int:
    budget = _budget(args.budget)
    if args.length < 2:
        raise InvalidRequestError("Texts of one token have nothing to predict.", "Give --length 2 or more.")
    from headrace.align import report
    from headrace.align.alignment import align, token_windows
    from headrace.align.subjects import open_subject, subject_named

    a, b = subject_named(args.a), subject_named(args.b)
    tokenizer = open_subject(a).tokenizer
    tokens = token_windows(tokenizer, _text(args.text), args.texts, args.length)
    found = align(a, b, tokens, threshold=args.threshold, by_cause=args.causes)
    exceeded = found.exceeded(budget)
    print(report.to_text(found), end="")
    for path, made in ((args.json, report.to_json), (args.html, report.to_html)):
        if path is not None:
            path.write_text(made(found), encoding="utf-8")
    for said in exceeded:
        print(f"beyond the budget: {said}", file=sys.stderr)
    return 1 if exceeded else 0


def _budget(text: str | None) -> dict[str, float]:
    budget: dict[str, float] = {}
    for part in (text or "").split(",") if text else ():
        name, sign, limit = part.partition("<")
        try:
            budget[name.strip()] = float(limit)
        except ValueError:
            sign = ""
        if not sign:
            raise InvalidRequestError(f"The budget {part!r} is no limit.", "Write kl<0.01,dlogprob_p99<0.1.")
    return budget


def _text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"Cannot read {path}: {error}.", "Name a readable UTF-8 text file.") from None

"""``headrace align``: two ways of running a model over the same tokens and tasks, and how far apart they are."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.base.errors import InvalidRequestError
from headrace.cli.options import positive
from headrace.cli.status import status

if TYPE_CHECKING:
    from headrace.align.scoring import Question
    from headrace.align.sides import Side

HELP = "compare two ways of running a model: executors, formats, checkpoints"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "a",
        metavar="A",
        help="the reference: MODEL?key=value&…, native, torch, hf:MODEL, http://HOST:PORT/v1?model=NAME",
    )
    parser.add_argument(
        "b", nargs="?", metavar="B", help="what is compared with it, e.g. 'smollm2-135m?activation=int8&kv=int8'"
    )
    parser.add_argument("--texts", type=positive, default=8, metavar="N", help="how many texts (default: 8)")
    parser.add_argument("--length", type=positive, default=128, metavar="N", help="tokens of each (default: 128)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="compare on this (default: Python's documents)")
    parser.add_argument(
        "--threshold", type=float, default=1e-3, metavar="X", help="relative error at which a node departs (1e-3)"
    )
    parser.add_argument(
        "--tasks", action="store_true", help="let each side answer 420 small questions; A alone will do"
    )
    parser.add_argument("--causes", action="store_true", help="take back one difference after the other")
    parser.add_argument("--ladder", action="store_true", help="A alone: its precisions, one by one and together")
    parser.add_argument("--map", metavar="FORMAT", help="A alone: what each matrix by itself in a format costs")
    parser.add_argument(
        "--of", choices=("weights", "inputs"), help="of the map: matrices (the default), or what each of them reads"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the map")
    parser.add_argument("--budget", metavar="LIMITS", help="exit with 1 beyond these: kl<0.01,tasks<0.02")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report with a picture")


def run(args: argparse.Namespace) -> int:
    budget = _budget(args.budget)
    _check(args, budget)
    from headrace.align import report
    from headrace.align.alignment import align, check_budget, token_windows
    from headrace.align.documents import read_text
    from headrace.align.scoring import questions_of
    from headrace.align.sides import side_named, tokenizer_of
    from headrace.align.subjects import Subject
    from headrace.align.tasks import suite

    check_budget(budget)  # before anything takes time
    sides = [side_named(each) for each in (args.a, args.b) if each is not None]
    a, b = sides[0], sides[-1]
    if (args.ladder or args.map is not None) and not isinstance(a, Subject):
        raise InvalidRequestError("A server or transformers has no ladder or map here.", "Give a model as A.")
    tokenizer = tokenizer_of(*sides)
    questions = questions_of(tokenizer, suite()) if args.tasks else None
    if questions is not None and args.b is None:
        _answer(a, questions, args.json)
        return 0
    text = None if args.text is None else read_text(args.text)
    tokens = token_windows(tokenizer, text, args.texts, args.length)
    if args.b is None:
        _alone(args, a.model, tokens)
        return 0
    found = align(a, b, tokens, threshold=args.threshold, by_cause=args.causes, questions=questions, progress=_answered)
    status()
    exceeded = found.exceeded(budget)
    print(report.to_text(found), end="")
    for path, made in ((args.json, report.to_json), (args.html, report.to_html)):
        if path is not None:
            path.write_text(made(found), encoding="utf-8")
    for said in exceeded:
        print(f"beyond the budget: {said}", file=sys.stderr)
    return 1 if exceeded else 0


def _check(args: argparse.Namespace, budget: Mapping[str, float]) -> None:
    """Options that contradict each other, or say nothing."""
    drawn = args.ladder or args.map is not None
    if (args.b is not None) + args.ladder + (args.map is not None) != (0 if args.tasks and args.b is None else 1):
        raise InvalidRequestError("Say what to compare with.", "Give B, or --ladder, or --map FORMAT, or --tasks.")
    if drawn and (args.causes or args.budget or args.json or args.html):
        raise InvalidRequestError("A ladder or a map has no causes, budget, JSON or HTML.", "Leave them out.")
    if args.b is None and not drawn and (args.causes or args.budget or args.html or args.text is not None):
        raise InvalidRequestError("Tasks of one side have no causes, budget, HTML or text.", "Leave those out.")
    if "tasks" in budget and not args.tasks:
        raise InvalidRequestError("The budget limits tasks, which are not asked for.", "Give --tasks too.")
    if args.svg is not None and args.map is None:
        raise InvalidRequestError("--svg draws a map.", "Give --map FORMAT too, or --html FILE for a comparison.")
    if args.of is not None and args.map is None:
        raise InvalidRequestError("--of says what a map is of.", "Give --map FORMAT too.")
    if args.length < 2:
        raise InvalidRequestError("Texts of one token have nothing to predict.", "Give --length 2 or more.")


def _answer(side: "Side", questions: "Mapping[str, Sequence[Question]]", path: Path | None) -> None:
    """The tasks of one side."""
    from headrace.align.report import scores_to_json, scores_to_text
    from headrace.align.scoring import check_scorable, score
    from headrace.align.sides import open_side

    check_scorable(side)
    scores = score(open_side(side), questions, progress=_answered)
    status()
    print(scores_to_text(side.title, scores), end="")
    if path is not None:
        path.write_text(scores_to_json(side.title, scores), encoding="utf-8")


def _answered(task: str) -> None:
    status(f"{task} answered")


def _alone(args: argparse.Namespace, model: str, tokens: list[list[int]]) -> None:
    """The ladder or the map of one model."""
    from headrace.align.ladder import ladder, sensitivity, sensitivity_svg

    def progress(done: int) -> None:
        status(f"{done} compared")

    if args.ladder:
        found = ladder(model, tokens, progress=progress)
        status()
        print(f"{'':24}{'mean KL':>10}{'p99 KL':>10}{'|Δ logprob|':>13}{'same top 1':>12}")
        for title, d in found:
            top1 = f"{100 * d.top1_agreement:.2f} %"
            print(f"{title:24}{d.kl_mean:10.2e}{d.kl_p99:10.2e}{d.logprob_delta_mean:13.4f}{top1:>12}")
        return
    made = sensitivity(model, args.map, tokens, part=args.of or "weights", progress=progress)
    status()
    print("layer" + "".join(f"{kind:>11}" for kind in made.kinds))
    for layer, row in enumerate(made.kl):
        print(f"{layer:5}" + "".join(f"{kl:11.2e}" for kl in row))
    if args.svg is not None:
        args.svg.write_text(sensitivity_svg(made))


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

"""``headrace bench``: measure a model on this machine, beside what the machine could do at best."""

import argparse
from pathlib import Path
from typing import Any

from headrace.cli.options import add_model_arguments, llm_arguments, positive

HELP = "measure latency, throughput, prefill, kernels, start-up; beside the machine's limits, with checks"
EXIT_INVALID = 1

BENCHMARKS = {
    "latency": "one sequence: time to first token, time per token, decode speed",
    "throughput": "many sequences at once: decode speed, and mixed lengths",
    "prefill": "one long prompt: tokens per second to its first token",
    "kernels": "each matrix shape and format of the model by itself, per number of rows",
    "startup": "new processes: import, load, first token; peak memory",
    "waterfall": "from a naive setting to all optimizations on, one at a time",
    "roofline": "each kind of op of the model below this machine's measured ceilings",
}

COUNTS: dict[str, dict[str, tuple[Any, str]]] = {
    "latency": {"input_len": (128, "prompt tokens"), "output_len": (128, "tokens after the first")},
    "throughput": {
        "num_seqs": ([8, 32, 64], "sequences at once; the mixed lengths have as many as the greatest"),
        "input_len": (128, "prompt tokens"),
        "output_len": (128, "tokens after the first"),
    },
    "prefill": {"lengths": ([512, 2048], "prompt tokens")},
    "kernels": {"rows": ([1, 8, 64, 512], "rows to multiply at once")},
    "startup": {"input_len": (32, "prompt tokens")},
    "waterfall": {
        "num_seqs": (16, "requests"),
        "prefix_len": (128, "prompt tokens that all requests share"),
        "own_len": (32, "prompt tokens of each request alone"),
        "output_len": (32, "output tokens of each"),
        "seconds_per_bar": (10, "time after which a slow bar is cut short"),
    },
    "roofline": {
        "num_seqs": ([1, 64], "sequences that decode at once"),
        "input_len": (128, "prompt tokens; prefill is of four times as many"),
        "output_len": (32, "tokens after the first"),
    },
}
"""The counts that each benchmark takes: default and meaning. A default that is a list takes several."""

SHARED: dict[str, tuple[Any, str]] = {"repeats": (5, "samples of each figure, after a discarded one")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, text in BENCHMARKS.items():
        sub = commands.add_parser(name, help=text, description=text)
        add_model_arguments(sub)
        group = sub.add_argument_group("measurement")
        for setting, (default, meaning) in {**COUNTS[name], **SHARED}.items():
            several = isinstance(default, list)
            shown = " ".join(map(str, default)) if several else default
            group.add_argument(
                f"--{setting.replace('_', '-')}",
                type=positive,
                nargs="+" if several else None,
                default=default,
                metavar="N",
                help=f"{meaning} (default: {shown})",
            )
        group.add_argument("--json", type=Path, metavar="FILE", help="write every sample, check and setting")
        group.add_argument("--picture", type=Path, metavar="FILE", help="draw FILE.svg or FILE.png (headrace[bench])")


def run(args: argparse.Namespace) -> int:
    from headrace.bench import pictures
    from headrace.bench.session import measure

    if args.picture:
        pictures.check_picture(args.picture)
    report, roofs = measure(
        args.benchmark,
        llm_arguments(args),
        {name: getattr(args, name) for name in {**COUNTS[args.benchmark], **SHARED}},
    )
    print(report.text())
    if args.json:
        report.write_json(args.json)
    if args.picture:
        if args.benchmark == "waterfall":
            pictures.draw_waterfall(report, args.picture)
        elif args.benchmark == "roofline":
            pictures.draw_roofline(report, args.picture, roofs)
        else:
            pictures.draw_bars(report, args.picture)
    return 0 if report.is_valid else EXIT_INVALID

"""``headrace doctor``: what this machine has and how fast its memory is."""

import argparse
import json

HELP = "show cores, instruction sets, memory and measured bandwidth; warn about what costs speed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    from headrace.llm.machine import examine

    report = examine()
    if args.json:
        print(json.dumps(report.as_dict(), indent=2))
        return 0
    for name, value in report.lines():
        print(f"{name:<22} {value}")
    for warning in report.warnings:
        print(f"warning: {warning}")
    return 0

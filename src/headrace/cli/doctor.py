"""``headrace doctor``: what this machine has, what costs speed, and what is possible with a model at best."""

import argparse
import json
import sys
from typing import Any

from headrace.cli.options import positive

HELP = "measure this machine, say what costs speed and, given a model, what speed is possible at best"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="show what this machine can do with it at best")
    parser.add_argument(
        "--context", type=positive, default=256, metavar="N", help="cached tokens of each (default: 256)"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--remeasure", action="store_true", help="measure again what was measured before")


def run(args: argparse.Namespace) -> int:
    from headrace.base.settings import from_environment
    from headrace.cli.outlook import outlook
    from headrace.plan.advice import Build, advise
    from headrace.plan.calibrate import calibrate_here, pace
    from headrace.plan.load import glance
    from headrace.plan.report import machine_lines

    calibration, host = calibrate_here(remeasure=args.remeasure)
    machine = calibration.machine
    disturbance = calibration.disturbance if calibration.measured_now else glance(host)
    speed = 1.0 if calibration.measured_now else pace(machine)
    warnings = advise(calibration, host, disturbance, Build.here(), pace=speed)
    model = outlook(args.model, machine, args.context) if args.model else None
    if args.json:
        report: dict[str, Any] = machine.as_dict() | {
            "warnings": [{"code": each.code, "cause": each.cause, "remedy": each.remedy} for each in warnings]
        }
        print(json.dumps(report | ({"model": model.as_dict()} if model else {}), indent=2))
        return 0
    print("\n".join(machine_lines(machine, host, forced=from_environment().isa is not None)))
    if model:
        print("\n" + "\n".join(model.lines()))
    sys.stdout.flush()
    for warning in warnings:
        print(f"\nwarning: {warning.cause}\ntry:     {warning.remedy}")
    return 0

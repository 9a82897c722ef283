"""Parse the command line, run one command, and turn errors into a cause, a remedy and an exit code."""

import argparse
import os
import sys
from collections.abc import Sequence

from headrace import __version__
from headrace.base.errors import HeadraceError, MissingDependencyError
from headrace.cli import align, bench, chat, demo, doctor, generate, graph, plan, quantize, serve, train

EXIT_ERROR, EXIT_INTERRUPTED = 1, 130

COMMANDS = (serve, generate, chat, demo, graph, doctor, bench, plan, quantize, train, align)


def parser() -> argparse.ArgumentParser:
    """The whole command line. Importing and building it loads nothing heavy."""
    top = argparse.ArgumentParser(
        prog="headrace",
        description="Run, serve and inspect language models at the machine's own limit.",
        epilog="MODEL is a .gguf file, a Hugging Face folder, a hub id (org/name), or smollm2-135m (the default).",
    )
    top.add_argument("--version", action="version", version=f"headrace {__version__}")
    top.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        name = command.__name__.rsplit(".", 1)[-1]
        sub = commands.add_parser(name, help=command.HELP, description=command.HELP)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return top


def _run(args: argparse.Namespace) -> int:
    try:
        code: int = args.run(args)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingDependencyError(
            f"headrace {args.command} needs torch, which is not installed.",
            "Run `pip install 'headrace[torch]'`, or in a checkout `.venv/bin/pip install torch`.",
        ) from error
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit code: 0, 1 (error), 2 (usage) or 130 (interrupted)."""
    args = parser().parse_args(argv)
    try:
        code = _run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`headrace generate … | head`): not an error. Keep the interpreter from flushing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except HeadraceError as error:
        if args.debug:
            raise
        print(f"error: {error.cause}", file=sys.stderr)
        if error.remedy:
            print(f"try:   {error.remedy}", file=sys.stderr)
        return EXIT_ERROR

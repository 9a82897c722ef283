"""``headrace generate``: continue a text, once."""

import argparse
import sys

from headrace.base.errors import InvalidRequestError
from headrace.cli.options import add_model_arguments, add_sampling_arguments, llm_arguments, sampling_arguments
from headrace.cli.stats import speed_line

HELP = "continue a prompt (from --prompt, a file, or standard input)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("-p", "--prompt", help="the text to continue")
    source.add_argument("-f", "--file", help="read the prompt from this file")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    parser.add_argument("--stats", action="store_true", help="print speed to standard error afterwards")
    add_sampling_arguments(parser, temperature=0.0, max_tokens=128)


def run(args: argparse.Namespace) -> int:
    prompt = _prompt(args)
    from headrace import LLM, SamplingParams

    params = SamplingParams(**sampling_arguments(args))
    with LLM(**llm_arguments(args)) as llm:
        tokens = llm.render_chat([{"role": "user", "content": prompt}]) if args.chat else prompt
        metrics = None
        for delta in llm.stream(tokens, params):
            print(delta.text, end="", flush=True)
            metrics = delta.metrics or metrics
        print()
    if args.stats and metrics is not None:
        print(speed_line(metrics), file=sys.stderr)
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return str(args.prompt)
    if args.file:
        try:
            with open(args.file, encoding="utf-8") as file:
                return file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequestError(
                f"Cannot read {args.file}: {error}.", "Name a readable UTF-8 text file."
            ) from None
    if sys.stdin.isatty():
        raise InvalidRequestError("No prompt.", 'Give one with -p "…", -f FILE, or on standard input.')
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"Standard input is not UTF-8: {error}.", "Convert it first.") from None

"""``headrace demo``: load, ask one question, stream the answer, say how fast that was against the machine's limit."""

import argparse
from typing import TYPE_CHECKING

from headrace.cli.options import add_model_arguments, llm_arguments, positive

if TYPE_CHECKING:
    from headrace import LLM

HELP = "ask one question and show the answer, its speed and the share of the machine's limit"
QUESTION = "What is a headrace, the channel at a water mill, for? Answer in two sentences."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("-q", "--question", default=QUESTION, help="what to ask")
    parser.add_argument("--max-tokens", type=positive, metavar="N", default=160, help="longest answer (default: 160)")


def run(args: argparse.Namespace) -> int:
    from headrace import LLM, SamplingParams

    with LLM(**llm_arguments(args)) as llm:
        print(llm.describe(), end="\n\n", flush=True)
        print(f"> {args.question}\n", flush=True)
        prompt = llm.render_chat([{"role": "user", "content": args.question}])
        metrics = None
        for delta in llm.stream(prompt, SamplingParams(max_tokens=args.max_tokens, temperature=0.0)):
            print(delta.text, end="", flush=True)
            metrics = delta.metrics or metrics
        assert metrics is not None, "a stream ends with its metrics"
        print(f"\n\nTTFT {metrics.ttft * 1e3:.0f} ms for {metrics.num_prompt_tokens} prompt tokens", end="")
        if metrics.tpot:
            context = metrics.num_prompt_tokens + metrics.num_output_tokens // 2
            print(f"; decode {_against_limit(llm, 1 / metrics.tpot, context, args.activation)}", end="")
        print(".")
    return 0


def _against_limit(llm: "LLM", speed: float, context: int, activation: str) -> str:
    """Tokens per second of one sequence, and the share of what this machine allows with `context` cached tokens."""
    from headrace.graph.cost import Workload
    from headrace.llm.loader import main_kernel_kind
    from headrace.plan.calibrate import calibrate_here
    from headrace.plan.roofline import kernel_arithmetic, step_limit

    machine = calibrate_here(num_threads=llm.num_threads)[0].machine
    graph, weights = llm.model.graph, llm.model.weights
    arithmetic = kernel_arithmetic(machine.isa, activation, kind=main_kernel_kind(graph, weights))
    step = step_limit(graph, Workload.decode(1, context), llm.formats(), machine, arithmetic)
    return (
        f"{speed:.0f} tok/s = {speed * step.seconds:.0%} of the machine's limit ({1 / step.seconds:.0f} tok/s:"
        f" {step.bytes / 1e6:.0f} MB per token at {machine.bandwidth(step.bytes) / 1e9:.1f} GB/s, measured on"
        f" {machine.measured_at})"
    )

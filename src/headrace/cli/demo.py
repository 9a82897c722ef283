"""``headrace demo``: load, ask one question, stream the answer, say how fast that was against the machine's limit."""

import argparse

from headrace.cli.options import add_model_arguments, llm_arguments, positive

HELP = "ask one question and show the answer, its speed and the share of the machine's limit"
QUESTION = "What is a headrace, the channel at a water mill, for? Answer in two sentences."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("-q", "--question", default=QUESTION, help="what to ask")
    parser.add_argument("--max-tokens", type=positive, metavar="N", default=160, help="longest answer (default: 160)")


def run(args: argparse.Namespace) -> int:
    from headrace import LLM, SamplingParams
    from headrace.llm.machine import decode_limit

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
            limit = decode_limit(llm, context=metrics.num_prompt_tokens + metrics.num_output_tokens // 2)
            speed = 1 / metrics.tpot
            print(
                f"; decode {speed:.0f} tok/s = {speed / limit.tokens_per_second:.0%} of the machine's limit"
                f" ({limit.tokens_per_second:.0f} tok/s: {limit.bytes_per_token / 1e6:.0f} MB per token at"
                f" {limit.bandwidth / 1e9:.1f} GB/s, measured now)",
                end="",
            )
        print(".")
    return 0

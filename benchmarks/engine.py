"""Time the whole engine on a model: one sequence, many sequences, prefill; each beside what memory allows.

    python benchmarks/engine.py [MODEL] [--repeats 3] [--json FILE]

Prompts are random token ids from a fixed seed. Decode speed is output tokens over (time of 129 tokens − time of 1), so
prefill cancels out; figures are medians over the repeats. The limit is bytes per step over the bandwidth measured in
the same run: above a few sequences arithmetic, not memory, is what bounds, and the share says less.
"""

import argparse
import json
import random
import statistics
import time

from headrace import LLM, SamplingParams, _native
from headrace.graph.cost import Workload, graph_cost

PROMPT, OUTPUT = 128, 128


def prompts(llm: LLM, count: int, length: int, seed: int) -> list[list[int]]:
    draw = random.Random(f"{seed}-{count}-{length}")
    return [[draw.randrange(llm.tokenizer.vocab_size) for _ in range(length)] for _ in range(count)]


def seconds(llm: LLM, batch: list[list[int]], num_tokens: int) -> float:
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0.0)
    start = time.perf_counter()
    made = llm.generate(batch, params, use_tqdm=False)
    elapsed = time.perf_counter() - start
    assert all(len(result.outputs[0].token_ids) == num_tokens for result in made), "an output is short"
    return elapsed


def decode(llm: LLM, count: int, seed: int) -> float:
    """Output tokens per second of `count` sequences together, after their prefill."""
    first = seconds(llm, prompts(llm, count, PROMPT, seed), 1)
    whole = seconds(llm, prompts(llm, count, PROMPT, seed + 1000), OUTPUT + 1)
    return count * OUTPUT / (whole - first)


def prefill(llm: LLM, length: int, seed: int) -> float:
    """Prompt tokens per second of one prompt."""
    return length / seconds(llm, prompts(llm, 1, length, seed), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--activation", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--json")
    args = parser.parse_args()
    with LLM(args.model, max_model_len=4096, enable_prefix_caching=False, activation=args.activation) as llm:
        print(llm.describe(), end="\n\n")
        seconds(llm, prompts(llm, 64, 32, 99), 4)  # warm-up
        work = Workload.decode(1, PROMPT + OUTPUT // 2)
        bytes_per_step = int(graph_cost(llm.model.graph, work, llm.formats()).memory_bytes)
        bandwidth = _native.read_bandwidth(bytes_per_step, llm.num_threads)
        found: dict[str, float] = {}
        for count in (1, 8, 32, 64):
            found[f"decode{count}"] = statistics.median(decode(llm, count, seed) for seed in range(args.repeats))
        for length in (512, 2048):
            found[f"prefill{length}"] = statistics.median(prefill(llm, length, seed) for seed in range(args.repeats))
        limit = bandwidth / bytes_per_step
        for name, value in found.items():
            share = f"   {value / limit:.0%} of {limit:.0f} (memory)" if name == "decode1" else ""
            print(f"{name:<12} {value:10.1f} tok/s{share}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"tokens_per_second": found, "bandwidth": bandwidth, "bytes_per_step": bytes_per_step}, file)


if __name__ == "__main__":
    main()

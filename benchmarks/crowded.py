"""Decoding while other processes want the same cores: does the plan's spinning collapse, or keep its fair share?

    python benchmarks/crowded.py [--busy 1 2 4] [--rounds 5] [--model NAME]

Busy processes count; they are stopped and continued around turns that alternate with quiet ones. "Fair" is what a
scheduler that gives every runnable thread the same would leave: cores / (threads + busy processes), at most all of it.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time

from headrace import LLM, SamplingParams

BUSY = "while True: pass"


def decode_rate(llm: LLM, count: int) -> float:
    """Tokens per second of `count` sequences, prompts of 4 tokens included."""
    params = SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.0)
    begin = time.perf_counter()
    llm.generate([[1000 + i, 2, 3, 4] for i in range(count)], params, use_tqdm=False)
    return 24 * count / (time.perf_counter() - begin)


def crowded_rates(llm: LLM, busy: int, count: int, rounds: int) -> tuple[list[float], list[float]]:
    """Rates alone and beside `busy` processes, in turns."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    alone, beside = [], []
    try:
        for other in others:
            other.send_signal(signal.SIGSTOP)
        for _ in range(rounds):
            alone.append(decode_rate(llm, count))
            for other in others:
                other.send_signal(signal.SIGCONT)
            beside.append(decode_rate(llm, count))
            for other in others:
                other.send_signal(signal.SIGSTOP)
    finally:
        for other in others:
            other.kill()
            other.wait()
    return alone, beside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with LLM(options.model, max_num_seqs=8, enable_prefix_caching=False) as llm:
        for count in (1, 8):
            decode_rate(llm, count)
            for busy in options.busy:
                alone, beside = crowded_rates(llm, busy, count, options.rounds)
                kept = statistics.median(b / a for a, b in zip(alone, beside, strict=True))
                fair = min(1.0, cores / (cores + busy))
                print(
                    f"{count} sequences, {busy} busy processes: {statistics.median(alone):.1f} tok/s alone, "
                    f"{kept:.2f} of it beside them, fair {fair:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

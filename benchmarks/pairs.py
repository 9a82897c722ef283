"""Time settings of one model against each other, in turns, on a machine too noisy for anything else.

    python benchmarks/pairs.py activation=f32 activation=int16 activation=int8
    python benchmarks/pairs.py --workload prefill512 --rounds 31 num_threads=1 num_threads=2
    python benchmarks/pairs.py python=../before/.venv/bin/python ""

Each argument is one contender: keyword arguments of `LLM`, separated by commas, and `python`, the interpreter whose
headrace is meant, to compare two checkouts. All are loaded at once, and run each workload in short turns, forwards and
backwards; a contender's figure is the median of its turns, its ratio the median of turn by turn against the first.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

WORKLOADS = ("decode1", "decode8", "decode64", "prefill512", "prefill2048")
TOKENS = {1: 24, 8: 12, 64: 4}
"""Output tokens of a turn by the number of sequences: some tens of milliseconds of work."""


@dataclass(frozen=True)
class Contender:
    name: str
    process: subprocess.Popen[str]

    def answer(self, line: str) -> str:
        assert self.process.stdin, "started with pipes"
        assert self.process.stdout, "started with pipes"
        print(line, file=self.process.stdin, flush=True)
        reply = self.process.stdout.readline()
        if not reply:
            sys.exit(f"{self.name} ended; its message is above")
        return reply.strip()


def start(name: str, model: str | None) -> Contender:
    options = dict(pair.split("=", 1) for pair in name.split(",") if pair)
    python = options.pop("python", sys.executable)
    values = {key: int(value) if value.isdecimal() else value for key, value in options.items()}
    command = [python, __file__, "--contend", json.dumps({"model": model, **values})]
    return Contender(
        name or "default", subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    )


def contend(options: dict[str, object]) -> None:
    """Answer every workload named on standard input with its tokens per second."""
    from headrace import LLM, SamplingParams

    with LLM(max_model_len=4096, max_num_seqs=64, enable_prefix_caching=False, **options) as llm:

        def seconds(count: int, length: int, outputs: int) -> float:
            batch = [[random.randrange(1000, 30000) for _ in range(length)] for _ in range(count)]
            params = SamplingParams(max_tokens=outputs, ignore_eos=True, temperature=0.0)
            begin = time.perf_counter()
            llm.generate(batch, params, use_tqdm=False)
            return time.perf_counter() - begin

        def measure(workload: str) -> float:
            kind, number = workload.rstrip("0123456789"), int(workload.lstrip("abcdefghijklmnopqrstuvwxyz"))
            if kind == "prefill":
                return number / seconds(1, number, 1)
            return number * TOKENS[number] / seconds(number, 4, TOKENS[number])

        answer(measure)


def answer(measure: Callable[[str], float]) -> None:
    for line in sys.stdin:
        print(measure(line.strip()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", nargs="*", help="key=value,key=value; empty: the defaults")
    parser.add_argument("--model")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS[:-1]))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--contend", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contend is not None:
        contend(args.contend)
        return
    contenders = [start(name, args.model) for name in args.contender]
    for workload in args.workload:
        for each in contenders:
            each.answer(workload)  # the first is a warm-up
        turns: dict[str, list[float]] = {each.name: [] for each in contenders}
        for round_number in range(args.rounds):
            for each in contenders if round_number % 2 else contenders[::-1]:
                turns[each.name].append(float(each.answer(workload)))
        first = turns[contenders[0].name]
        for name, values in turns.items():
            ratio = statistics.median(value / base for value, base in zip(values, first, strict=True))
            print(f"{workload:<12} {name:<40} {statistics.median(values):9.1f} tok/s  {ratio:6.3f} x", flush=True)
    for each in contenders:
        assert each.process.stdin, "started with pipes"
        each.process.stdin.close()
        each.process.wait()


if __name__ == "__main__":
    main()

"""Time what the engine does around a step: schedule, build the arrays, commit. No model: the executor is simulated.

python benchmarks/scheduler.py [--seqs 64] [--steps 400]
"""

import argparse
import statistics
import time

from headrace import SamplingParams
from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.request import Request
from headrace.engine.step import Step, StepResult
from headrace.executors.simulated import SimulatedExecutor


class TimedExecutor(SimulatedExecutor):
    """Remembers how long its last step took, so that it can be taken off."""

    seconds = 0.0

    def execute(self, step: Step) -> StepResult:
        start = time.perf_counter()
        result = super().execute(step)
        self.seconds = time.perf_counter() - start
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    executor = TimedExecutor(num_blocks=100 * args.seqs, block_size=16, vocab_size=1000, verify=False)
    engine = Engine(executor, EngineConfig(max_num_seqs=args.seqs, max_num_batched_tokens=8192))
    params = SamplingParams(max_tokens=args.steps + 10, temperature=0.0)
    for i in range(args.seqs):
        engine.add(Request(request_id=str(i), prompt_ids=tuple(range(i, i + 100)), params=params))
    engine.step()
    around = []
    for _ in range(args.steps):
        start = time.perf_counter()
        engine.step()
        around.append(time.perf_counter() - start - executor.seconds)
    median = statistics.median(around)
    print(f"{args.seqs} decoding sequences: {median * 1e6:.0f} us per step around the executor (median)")


if __name__ == "__main__":
    main()

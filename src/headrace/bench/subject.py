"""Running a batch on a loaded model: how long it took, how much of that the executor took, and what came out."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.base.errors import HeadraceError
from headrace.bench.workloads import Batch
from headrace.engine.metrics import RequestMetrics
from headrace.engine.sampling import SamplingParams
from headrace.llm.llm import LLM


@dataclass(frozen=True, slots=True)
class Run:
    """One batch, once.

    Attributes:
        seconds: from submitting it to its last token.
        execute_seconds: those of them spent in the executor.
        outputs: token ids of each request.
        metrics: of each request.
    """

    seconds: float
    execute_seconds: float
    outputs: tuple[tuple[int, ...], ...]
    metrics: tuple[RequestMetrics, ...]


def greedy(length: int) -> SamplingParams:
    """Exactly `length` tokens, the likeliest each time."""
    return SamplingParams(max_tokens=length, ignore_eos=True, temperature=0.0)


def run(llm: LLM, batch: Batch) -> Run:
    """Generate a batch through the public interface."""
    params = [greedy(length) for length in batch.lengths]
    prompts = [list(prompt) for prompt in batch.prompts]
    before = execute_seconds(llm)
    start = time.perf_counter()
    results = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return Run(
        seconds,
        execute_seconds(llm) - before,
        tuple(tuple(result.outputs[0].token_ids) for result in results),
        tuple(result.metrics for result in results),
    )


def decode_rates(num_tokens: int, firsts: Sequence[float], wholes: Sequence[float]) -> tuple[float, ...]:
    """Tokens per second after the first ones: `num_tokens` / (seconds of each whole run − those of a run of one token
    each, the shortest of `firsts`: what disturbs a run only lengthens it, so this cannot flatter).

    Raises HeadraceError if a whole run was no longer than that: it was too short to say anything.
    """
    first = min(firsts)
    if min(wholes) <= first:
        raise HeadraceError(
            f"A run of {num_tokens} more tokens took no longer than one of the first alone ({first:.4f} s).",
            "Measure more tokens (--output-len), on a quieter machine.",
            code="too_short",
        )
    return tuple(num_tokens / (whole - first) for whole in wholes)


def execute_seconds(llm: LLM) -> float:
    """Seconds that the executor has taken since the model was loaded."""
    return llm.engine_snapshot().metrics.execute_seconds.total


def repeated(llm: LLM, batches: Sequence[Batch], repeats: int) -> list[list[Run]]:
    """Run the batches in turn, again and again, so that what drifts hits all of them alike.

    Returns the runs of each batch: the warm-up first, whose time does not count, then `repeats` more.
    """
    runs: list[list[Run]] = [[] for _ in batches]
    for _ in range(1 + repeats):
        for batch, own in zip(batches, runs, strict=True):
            own.append(run(llm, batch))
    return runs

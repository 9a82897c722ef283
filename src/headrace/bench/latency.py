"""``bench latency``: one sequence, as one user feels it. Time to the first token, and between the tokens after it."""

import time
from dataclasses import dataclass
from itertools import pairwise

from headrace.bench.limits import Limits
from headrace.bench.report import Findings, Measurement
from headrace.bench.samples import quantile
from headrace.bench.subject import decode_rates, execute_seconds, greedy, run
from headrace.bench.validity import check_client, check_outputs, check_spread, check_warm_up
from headrace.bench.workloads import Batch, uniform
from headrace.graph.cost import Workload
from headrace.llm.llm import LLM

QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class _Stream:
    """One streamed request: seconds to its first token, between later ones, and in all."""

    ttft: float
    gaps: tuple[float, ...]
    seconds: float
    execute_seconds: float
    tokens: tuple[int, ...]


def latency(llm: LLM, limits: Limits, *, input_len: int, output_len: int, repeats: int) -> Findings:
    """Stream one prompt of `input_len` tokens, `output_len` tokens after the first.

    Decode speed is what remains of the stream after a run of one token: prefill cancels out.
    """
    whole = uniform(1, input_len, output_len + 1, llm.model.executor.vocab_size)
    first = whole.with_lengths(1)
    streams, firsts = [], []
    for _ in range(1 + repeats):
        firsts.append(run(llm, first))
        streams.append(_stream(llm, whole))
    outputs = [(stream.tokens,) for stream in streams] + [single.outputs for single in firsts]
    kept = streams[1:]
    decode = decode_rates(output_len, [single.seconds for single in firsts[1:]], [stream.seconds for stream in kept])
    prefill_limit = limits.step_seconds(Workload.prefill(input_len))
    token_limit = limits.step_seconds(Workload.decode(1, input_len + output_len // 2))
    measurements = [
        _milliseconds("TTFT", [stream.ttft for stream in kept], prefill_limit),
        *(
            _milliseconds(f"TPOT p{q * 100:g}", [quantile(stream.gaps, q) for stream in kept], token_limit)
            for q in QUANTILES
        ),
        Measurement(name="decode", unit="tok/s", samples=decode, limit=1 / token_limit),
    ]
    checks = [
        check_outputs(whole, outputs),
        check_warm_up([stream.seconds for stream in kept]),
        check_spread([(each.name, each.samples) for each in measurements]),
        check_client(sum(s.seconds for s in kept), sum(s.execute_seconds for s in kept)),
    ]
    return Findings(measurements=measurements, checks=checks)


def _stream(llm: LLM, batch: Batch) -> _Stream:
    (prompt,), (length,) = batch.prompts, batch.lengths
    before = execute_seconds(llm)
    tokens: list[int] = []
    times: list[float] = []
    start = time.perf_counter()
    for delta in llm.stream(list(prompt), greedy(length)):
        times.append(time.perf_counter())
        tokens += delta.token_ids
    gaps = tuple(later - earlier for earlier, later in pairwise(times))
    return _Stream(times[0] - start, gaps, times[-1] - start, execute_seconds(llm) - before, tuple(tokens))


def _milliseconds(name: str, seconds: list[float], limit: float) -> Measurement:
    samples = tuple(1e3 * each for each in seconds)
    return Measurement(name=name, unit="ms", samples=samples, limit=1e3 * limit, lower_is_better=True)

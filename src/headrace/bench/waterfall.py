"""``bench waterfall``: from the naive setting to all optimizations on, one at a time, each bar measured.

The workload is one that every optimization has a part in: requests under one system prompt. Each bar loads
the model anew, by public arguments of `LLM` alone.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from headrace.bench.limits import Limits
from headrace.bench.report import Findings, Measurement
from headrace.bench.samples import median
from headrace.bench.subject import run
from headrace.bench.validity import Check, check_spread
from headrace.bench.workloads import Batch, shared_prefix
from headrace.llm.llm import LLM
from headrace.numerics.formats import FORMATS

Tokens = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How one bar runs.

    Attributes:
        name: what it has over the bar before it.
        options: all arguments of `LLM`.
        caches_kv: tokens after the first are decoded from cached keys and values; otherwise the prompt and all output
            so far are computed again for each.
        batches: requests run together; otherwise one after the other.
        keeps_tokens: against the bar before, by the determinism contract no token may change.
    """

    name: str
    options: Mapping[str, Any]
    caches_kv: bool
    batches: bool
    keeps_tokens: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """The workload: `num_seqs` requests of a common prefix, an own part and an output, and the seconds for one bar."""

    num_seqs: int
    prefix_len: int
    own_len: int
    output_len: int
    seconds_per_bar: float

    def batch(self, vocab_size: int, seed: int) -> Batch:
        return shared_prefix(self.num_seqs, self.prefix_len, self.own_len, self.output_len, vocab_size, seed)


def settings(
    stored: Sequence[str], load: Load, options: Mapping[str, Any], *, isa: str, num_threads: int
) -> list[Setting]:
    """The bars, the naive one first; those that would change nothing on this machine or model are left out.

    Args:
        stored: number formats of the model's matrices.
        options: the user's arguments of `LLM`; where they say what a bar needs, the last bars have it.
        isa, num_threads: what the last bars run on.
    """
    common = {**options, "max_model_len": load.prefix_len + load.own_len + load.output_len}
    naive = {
        **common,
        "isa": "portable",
        "num_threads": 1,
        "weight_format": "f32",
        "kv_format": "f32",
        "fuse": False,
        "max_num_seqs": 1,
        "enable_prefix_caching": False,
    }
    bars = [Setting(name="naive", options=naive, caches_kv=False, batches=False, keeps_tokens=False)]

    def add(name: str, keeps_tokens: bool, changed: Mapping[str, Any], **how: bool) -> None:
        last = bars[-1]
        bars.append(
            replace(last, name=name, options={**last.options, **changed}, keeps_tokens=keeps_tokens, **how)  # type: ignore[arg-type]
        )

    if isa != "portable":
        add(f"+ {isa}", False, {"isa": isa})
    if num_threads > 1:
        add(f"+ {num_threads} threads", True, {"num_threads": num_threads})
    add("+ KV cache", True, {}, caches_kv=True)
    if "f32" not in stored:
        add("+ bf16 weights", False, {"weight_format": "bf16"})
    if any(FORMATS[name].block_size > 1 for name in stored):
        add(f"+ {'/'.join(stored)} weights", False, {"weight_format": None})
    if options.get("kv_format") != "f32":
        add("+ bf16 KV", False, {"kv_format": "bf16"})
    add("+ fusion", True, {"fuse": True})
    add("+ batching", True, {"max_num_seqs": load.num_seqs}, batches=True)
    add("+ prefix cache", True, {"enable_prefix_caching": True})
    return bars


Place = tuple[int, int, int]
"""Of a token: pass, request, position in the request's output."""


@dataclass(slots=True)
class _Bar:
    """What one bar gave: output tokens per second of each pass, and the tokens."""

    rates: list[float]
    tokens: dict[Place, int]


def waterfall(model: str | None, bars: Sequence[Setting], load: Load, limits: Limits, *, repeats: int) -> Findings:
    """Measure all bars in turn, `repeats` times over, so that what drifts hits all of them alike.

    Each turn begins with the fastest: its outputs are what the bars without a KV cache continue. A bar that runs one
    request at a time takes as many of them as its seconds allow, two at least; one without a KV cache computes as many
    positions, evenly spread. Both are samples of the same work.
    """
    found = [_Bar([], {}) for _ in bars]
    for number in range(repeats):
        known: Mapping[Place, int] = {}
        for bar, result in zip(reversed(bars), reversed(found), strict=True):
            with LLM(model, **{**bar.options, "weight_cache": "off"}) as llm:
                _measure(llm, bar, load, number, load.seconds_per_bar / repeats, known, result)
            known = result.tokens if bar.caches_kv else known
    measurements = _measurements(bars, found, _batch_limit(load, limits))
    checks = [
        _check_tokens(bars, found),
        Check("warm-up", "ok", "one discarded request before each sample"),
        check_spread([(each.name, each.samples) for each in measurements]),
    ]
    return Findings(measurements=measurements, checks=checks, notes=_agreement(bars, found))


def _measurements(bars: Sequence[Setting], found: Sequence[_Bar], limit: float) -> list[Measurement]:
    medians = [median(result.rates) for result in found]
    factors = [1.0] + [after / before for before, after in pairwise(medians)]
    return [
        Measurement(
            name=bar.name,
            unit="tok/s",
            samples=tuple(result.rates),
            limit=limit if bar is bars[-1] else None,
            details={
                "step": f"× {factor:.2f}",
                "in all": f"× {middle / medians[0]:.1f}",
                "tokens": len(result.tokens),
            },
        )
        for bar, result, factor, middle in zip(bars, found, factors, medians, strict=True)
    ]


def _measure(
    llm: LLM, bar: Setting, load: Load, number: int, seconds: float, known: Mapping[Place, int], result: _Bar
) -> None:
    """Add one sample to `result`. `known` are the tokens of the nearest bar that keeps a KV cache."""
    batch = load.batch(llm.model.executor.vocab_size, seed=number)
    # Another request under the same prefix came before, as it does on a server; without a cache a short one will do.
    (prompt, *_) = load.batch(llm.model.executor.vocab_size, seed=-1).prompts
    run(llm, Batch((prompt if bar.options["enable_prefix_caching"] else prompt[:16],), (1,)))
    deadline = time.perf_counter() + seconds
    if bar.batches:
        _all_at_once(llm, batch, number, result)
    elif bar.caches_kv:
        _one_by_one(llm, batch, number, deadline, result)
    else:
        _recomputed(llm, batch, number, deadline, known, result)


def _all_at_once(llm: LLM, batch: Batch, number: int, result: _Bar) -> None:
    done = run(llm, batch)
    result.rates.append(batch.num_output_tokens / done.seconds)
    for request, tokens in enumerate(done.outputs):
        _keep(result, number, request, tokens)


def _one_by_one(llm: LLM, batch: Batch, number: int, deadline: float, result: _Bar) -> None:
    seconds, made = 0.0, 0
    for request, (prompt, length) in enumerate(zip(batch.prompts, batch.lengths, strict=True)):
        if request >= 2 and time.perf_counter() > deadline:
            break
        done = run(llm, Batch((prompt,), (length,)))
        seconds, made = seconds + done.seconds, made + length
        _keep(result, number, request, done.outputs[0])
    result.rates.append(made / seconds)


def _recomputed(llm: LLM, batch: Batch, number: int, deadline: float, known: Mapping[Place, int], result: _Bar) -> None:
    """Tokens of the first request, each from nothing but text: at a quarter and three quarters of the output, then at
    every odd eighth, and so on while time allows."""
    length = batch.lengths[0]
    output = [known[number, 0, position] for position in range(length)]
    seconds: list[float] = []
    for position in _spread_positions(length):
        if len(seconds) >= 2 and time.perf_counter() > deadline:
            break
        prompt = batch.prompts[0] + tuple(output[:position])
        done = run(llm, Batch((prompt,), (1,)))
        seconds.append(done.seconds)
        result.tokens[number, 0, position] = done.outputs[0][0]
    result.rates.append(len(seconds) / sum(seconds))


def _spread_positions(length: int) -> list[int]:
    """Positions 0 … length - 1 such that the mean of the first 2, 6, 14 … is about the middle."""
    places: list[int] = []
    parts = 2
    while parts <= 2 * length:
        places += [length * (2 * i + 1) // (2 * parts) for i in range(parts)]
        parts *= 2
    return list(dict.fromkeys(places))


def _keep(result: _Bar, number: int, request: int, tokens: Sequence[int]) -> None:
    for position, token in enumerate(tokens):
        result.tokens[number, request, position] = token


def _batch_limit(load: Load, limits: Limits) -> float:
    batch = load.batch(limits.vocab_size, seed=0)
    return batch.num_output_tokens / limits.batch_seconds(batch, cached=load.prefix_len)


def _same_and_all(a: _Bar, b: _Bar) -> tuple[int, int]:
    """How many of the tokens that both bars made are equal, and how many both made. A request counts up to its first
    difference: what follows continues another text."""
    same, parted = 0, set()
    common = sorted(a.tokens.keys() & b.tokens.keys())
    for number, request, position in common:
        if a.tokens[number, request, position] != b.tokens[number, request, position]:
            parted.add((number, request))
        same += (number, request) not in parted
    return same, len(common)


def _check_tokens(bars: Sequence[Setting], found: Sequence[_Bar]) -> Check:
    compared = 0
    for before, after, bar in zip(found, found[1:], bars[1:], strict=False):
        same, both = _same_and_all(before, after)
        if bar.keeps_tokens and same < both:
            return Check("outputs", "failed", f"{bar.name} changed {both - same} of {both} tokens; it may change none")
        compared += both if bar.keeps_tokens else 0
    return Check("outputs", "ok", f"{compared} tokens are the same before and after each bar that may change none")


def _agreement(bars: Sequence[Setting], found: Sequence[_Bar]) -> list[str]:
    notes = []
    for before, after, bar in zip(found, found[1:], bars[1:], strict=False):
        if not bar.keeps_tokens:
            same, both = _same_and_all(before, after)
            notes.append(
                f"{bar.name}: rounds otherwise; {same} of {both} tokens, up to first differences, are the same."
            )
    return notes

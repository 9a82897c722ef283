"""``bench roofline``: every kind of op of a model against this machine's measured ceilings.

The time of each kind comes from the executor's own profile, its arithmetic and traffic from the graph's cost model.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from headrace.base.errors import InvalidRequestError
from headrace.bench.limits import Limits
from headrace.bench.report import Findings, Measurement
from headrace.bench.samples import median
from headrace.bench.subject import Run, run
from headrace.bench.validity import Check, check_outputs, check_spread, worst
from headrace.bench.workloads import Batch, uniform
from headrace.executors.native import NativeExecutor
from headrace.graph.cost import Cost, Workload
from headrace.graph.ir import Graph
from headrace.llm.llm import LLM

Profile = Mapping[str, tuple[float, int]]
"""Seconds and runs by kind of op."""

PARTS_OF = {"prepare": "linear", "write_kv": "attention", "join": "attention"}
"""Kinds of native ops that are part of what one kind of graph node computes. All others have the node's name."""

FUSED_INTO = {"rms_norm": "linear", "glu": "linear", "add": "linear", "rope": "attention"}
"""With what each kind of node is done where the plan has no op of its own for it."""


@dataclass(frozen=True, slots=True)
class Work:
    """A kind of step to look at.

    Attributes:
        name: for people.
        batch: what is run.
        num_steps: in how many steps.
        cost: what each of them computes.
        is_decode: whether all of a prompt but its last token is in the prefix cache beforehand, so that every step
            computes one token of each sequence.
    """

    name: str
    batch: Batch
    num_steps: int
    cost: Workload
    is_decode: bool


def works(vocab_size: int, *, num_seqs: Sequence[int], input_len: int, output_len: int, block_size: int) -> list[Work]:
    """Decode of each number of sequences, and prefill of one prompt of four times `input_len`.

    Prompts to decode after are as many whole KV blocks as `input_len` holds, and one token.
    """
    cached = max(1, input_len // block_size) * block_size
    found = [
        Work(
            f"decode {count}",
            uniform(count, cached + 1, output_len, vocab_size),
            output_len,
            Workload.decode(count, cached + output_len // 2),
            True,
        )
        for count in num_seqs
    ]
    length = 4 * input_len
    return [*found, Work(f"prefill {length}", uniform(1, length, 1, vocab_size), 1, Workload.prefill(length), False)]


def roofline(load: Callable[[bool], LLM], limits: Limits, cases: Sequence[Work], *, repeats: int) -> Findings:
    """Profile each case on a model of its own, which `load` makes with a prefix cache or without."""
    measurements: list[Measurement] = []
    outputs: list[Check] = []
    cached: list[Check] = []
    notes: list[str] = []
    for case in cases:
        with load(case.is_decode) as llm:
            profiles, runs = _profiles(llm, case, repeats)
        joined = fused_ops(limits.graph, profiles[-1], case.num_steps)
        seconds = [_by_op(profile, case.num_steps, joined) for profile in profiles]
        measurements += _measurements(case, seconds, joined, limits)
        outputs.append(check_outputs(case.batch, [each.outputs for each in runs]))
        cached.append(_check_cached(case, runs))
        notes.append(_overview(case, seconds, joined))
    checks = [
        worst(outputs),
        worst(cached),
        Check("warm-up", "ok", "one discarded run of each"),
        check_spread([(each.name, each.samples) for each in measurements]),
    ]
    return Findings(measurements=measurements, checks=checks, notes=notes)


def fused_ops(graph: Graph, profile: Profile, num_steps: int) -> dict[str, str]:
    """Kinds of node of which some had no op of their own, and the kind in whose time theirs is."""
    nodes = Counter(node.op for node in graph.nodes)
    own = {op: runs for op, (_, runs) in profile.items()}
    return {op: into for op, into in FUSED_INTO.items() if own.get(op, 0) < nodes[op] * num_steps}


def _profiles(llm: LLM, case: Work, repeats: int) -> tuple[list[dict[str, tuple[float, int]]], list[Run]]:
    """What each kept run added to the profile, and those runs; the first run does not count."""
    executor = llm.model.executor
    if not isinstance(executor, NativeExecutor):
        raise InvalidRequestError("Only the native executor keeps a profile.", "Leave out --executor.")
    executor.profile(start=True)
    runs = [run(llm, case.batch)]
    profiles = []
    for _ in range(repeats):
        before = executor.profile()
        runs.append(run(llm, case.batch))
        profiles.append(_difference(before, executor.profile()))
    return profiles, runs[1:]


def _check_cached(case: Work, runs: Sequence[Run]) -> Check:
    """What was to be computed was computed, and the rest was not."""
    for each in runs:
        for prompt, metrics in zip(case.batch.prompts, each.metrics, strict=True):
            if metrics.num_cached_tokens != (len(prompt) - 1 if case.is_decode else 0):
                found = f"{metrics.num_cached_tokens} of {len(prompt)} prompt tokens"
                return Check("prefix cache", "failed", f"{case.name}: it served {found}")
    return Check("prefix cache", "ok", f"{case.name} as it should")


def _difference(before: Profile, after: Profile) -> dict[str, tuple[float, int]]:
    zero = (0.0, 0)
    return {op: (s - before.get(op, zero)[0], runs - before.get(op, zero)[1]) for op, (s, runs) in after.items()}


def _by_op(profile: Profile, num_steps: int, joined: Mapping[str, str]) -> dict[str, float]:
    """Seconds of a step in each kind of node."""
    spent: dict[str, float] = {}
    for kind, (seconds, _) in profile.items():
        op = PARTS_OF.get(kind, kind)
        op = joined.get(op, op)
        spent[op] = spent.get(op, 0.0) + seconds / num_steps
    return spent


def _measurements(
    case: Work, seconds: Sequence[Mapping[str, float]], joined: Mapping[str, str], limits: Limits
) -> list[Measurement]:
    costs: dict[str, Cost] = {}
    least: dict[str, float] = {}
    for op, alone in limits.op_seconds(case.cost).items():
        into = joined.get(op, op)
        costs[into] = costs.get(into, Cost()) + limits.op_costs(case.cost)[op]
        least[into] = least.get(into, 0.0) + alone
    return [
        _measurement(case, op, cost, [each[op] for each in seconds], least[op])
        for op, cost in costs.items()
        if op in seconds[-1] and cost.flops
    ]


def _measurement(case: Work, op: str, cost: Cost, seconds: Sequence[float], least: float) -> Measurement:
    moved = cost.memory_bytes + cost.activation_bytes
    middle = median(seconds)
    return Measurement(
        name=f"{case.name}: {op}",
        unit="us/step",
        samples=tuple(1e6 * each for each in seconds),
        limit=1e6 * least,
        lower_is_better=True,
        details={
            "FLOP/byte": cost.flops / moved,
            "GFLOP/s": cost.flops / middle / 1e9,
            "GB/s": moved / middle / 1e9,
        },
    )


def _overview(case: Work, seconds: Sequence[Mapping[str, float]], joined: Mapping[str, str]) -> str:
    spent = {op: median([each[op] for each in seconds]) for op in seconds[-1]}
    whole = sum(spent.values())
    order = sorted(spent.items(), key=lambda entry: -entry[1])
    shares = ", ".join(f"{op} {part / whole:.0%}" for op, part in order if part >= whole / 100)
    fused = "".join(f"; {op} is fused into {into}" for op, into in joined.items())
    return f"{case.name}: {1e3 * whole:.2f} ms a step: {shares}{fused}."

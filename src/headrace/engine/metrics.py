"""What the engine counts and times. Plain data: whoever serves renders it."""

import copy
from bisect import bisect_left
from dataclasses import dataclass, field

from headrace.engine.prefix_tree import MissReason

STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0)
REQUEST_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0)
BATCH_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0)

OUTCOMES = ("stop", "length", "cancelled", "failed", "rejected")


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """What one finished request took: times in seconds on the engine's clock, and counts.

    Attributes:
        ttft: from arrival to the first token of any sample.
        tpot: mean time between output tokens after the first, of the slowest sample; 0 for a single token.
        queue_time: from arrival until the first step that computed any of it.
        total_time: from arrival to the last token.
        num_prompt_tokens: prompt length.
        num_cached_tokens: prompt tokens that the prefix cache served, of the first sample.
        num_output_tokens: over all samples.
        num_preemptions: times that a sample lost its KV blocks and was recomputed.
    """

    ttft: float
    tpot: float
    queue_time: float
    total_time: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_preemptions: int


@dataclass(slots=True)
class Histogram:
    """Observations by bucket.

    Attributes:
        bounds: upper bounds of the buckets, inclusive, ascending.
        counts: observations in each bucket (not cumulative), and in one more for those above the last bound.
        total: sum of the observations.
    """

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    @property
    def count(self) -> int:
        return sum(self.counts)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


def _by_outcome() -> dict[str, int]:
    return dict.fromkeys(OUTCOMES, 0)


def _by_reason() -> dict[str, int]:
    return {reason.value: 0 for reason in MissReason}


@dataclass(slots=True)
class EngineMetrics:
    """Since the engine was made. Counters only grow.

    Attributes:
        requests: by outcome; ``length`` if any sample ran out of room, ``rejected`` before entering the engine.
        prefix_misses: by `MissReason`, how the prefix match of each sequence ended when it first ran.
        prompt_tokens: of the sequences that have run (a prompt counts once per sample).
        cached_tokens: those of them that the prefix cache served.
        computed_tokens: token rows executed, recomputation after preemption included.
        batch_sequences, batch_tokens: sequences and token rows per step.
    """

    requests: dict[str, int] = field(default_factory=_by_outcome)
    prefix_misses: dict[str, int] = field(default_factory=_by_reason)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    failed_steps: int = 0
    step_seconds: Histogram = field(default_factory=lambda: Histogram(STEP_SECONDS))
    execute_seconds: Histogram = field(default_factory=lambda: Histogram(STEP_SECONDS))
    batch_sequences: Histogram = field(default_factory=lambda: Histogram(BATCH_SIZES))
    batch_tokens: Histogram = field(default_factory=lambda: Histogram(BATCH_SIZES))
    ttft: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_SECONDS))
    tpot: Histogram = field(default_factory=lambda: Histogram(TOKEN_SECONDS))
    queue_time: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_SECONDS))
    total_time: Histogram = field(default_factory=lambda: Histogram(REQUEST_SECONDS))

    def snapshot(self) -> "EngineMetrics":
        """A copy that later steps leave alone."""
        return copy.deepcopy(self)

    def observe_request(self, request: RequestMetrics, outcome: str) -> None:
        self.requests[outcome] += 1
        self.ttft.observe(request.ttft)
        self.queue_time.observe(request.queue_time)
        self.total_time.observe(request.total_time)
        if request.tpot > 0:
            self.tpot.observe(request.tpot)


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """The engine at one moment, a copy that no later step changes.

    Attributes:
        num_running: sequences with KV blocks.
        num_waiting: sequences without: new, preempted, or held for a sibling's prompt.
        kv_blocks_in_use: held by sequences.
        kv_blocks_cached: in the prefix tree, in use or idle.
        weight_version: of the weights that the next step runs with.
        metrics: the counters and histograms so far.
    """

    num_running: int
    num_waiting: int
    kv_blocks_total: int
    kv_blocks_in_use: int
    kv_blocks_cached: int
    weight_version: int
    metrics: EngineMetrics

    @property
    def kv_usage(self) -> float:
        """Share of the pool that sequences hold, 0 to 1."""
        return self.kv_blocks_in_use / self.kv_blocks_total

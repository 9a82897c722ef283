"""Counters, gauges and histograms in the Prometheus text format, version 0.0.4.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from headrace.engine.metrics import EngineMetrics, EngineSnapshot, Histogram
from headrace.serve.access import RequestRecord

Labels = Mapping[str, str]


class ServerMetrics:
    """What the server itself counts; the engine's own figures join in `render`. One event loop."""

    def __init__(self) -> None:
        self._replies: Counter[tuple[str, int]] = Counter()

    def observe(self, record: RequestRecord) -> None:
        """Count an HTTP request that has ended."""
        self._replies[record.endpoint or "unknown", record.status] += 1

    def render(self, engine: EngineSnapshot) -> str:
        """The page that Prometheus scrapes."""
        replies = [
            ({"endpoint": endpoint, "status": str(status)}, count)
            for (endpoint, status), count in sorted(self._replies.items())
        ]
        text = "HTTP requests that have ended, by route and status; 499: the client left first."
        lines = [*_family("headrace_http_requests_total", "counter", text, replies)]
        lines.extend(_gauges(engine))
        lines.extend(_counters(engine.metrics))
        lines.extend(_histograms(engine.metrics))
        return "\n".join(lines) + "\n"


def _gauges(engine: EngineSnapshot) -> Iterator[str]:
    for name, value, text in (
        ("requests_running", engine.num_running, "Sequences that hold KV blocks."),
        ("requests_waiting", engine.num_waiting, "Sequences that wait: new, preempted, or for a sibling's prompt."),
        ("kv_blocks_total", engine.kv_blocks_total, "KV blocks in the pool."),
        ("kv_blocks_in_use", engine.kv_blocks_in_use, "KV blocks that sequences hold."),
        ("kv_blocks_cached", engine.kv_blocks_cached, "KV blocks in the prefix cache, in use or idle (evictable)."),
        ("weight_version", engine.weight_version, "Of the weights that run; 0 for those it was loaded with."),
        ("kv_usage_ratio", engine.kv_usage, "Share of the KV blocks that sequences hold, 0 to 1."),
    ):
        yield from _family(f"headrace_{name}", "gauge", text, [({}, value)])


def _counters(metrics: EngineMetrics) -> Iterator[str]:
    outcomes = [({"outcome": outcome}, count) for outcome, count in metrics.requests.items()]
    yield from _family("headrace_requests_total", "counter", "Requests that have ended, by outcome.", outcomes)
    misses = [({"reason": reason}, count) for reason, count in metrics.prefix_misses.items()]
    yield from _family("headrace_prefix_matches_total", "counter", "How prefix matches ended, by reason.", misses)
    for name, value, text in (
        ("prompt_tokens", metrics.prompt_tokens, "Prompt tokens of sequences that have run."),
        ("cached_prompt_tokens", metrics.cached_tokens, "Prompt tokens that the prefix cache served."),
        ("computed_tokens", metrics.computed_tokens, "Token rows executed, recomputation included."),
        ("output_tokens", metrics.output_tokens, "Tokens produced."),
        ("preemptions", metrics.preemptions, "Times that a sequence lost its KV blocks."),
        ("failed_steps", metrics.failed_steps, "Steps that failed."),
    ):
        yield from _family(f"headrace_{name}_total", "counter", text, [({}, value)])


def _histograms(metrics: EngineMetrics) -> Iterator[str]:
    for name, histogram, text in (
        ("time_to_first_token_seconds", metrics.ttft, "From arrival to the first token."),
        ("time_per_output_token_seconds", metrics.tpot, "Mean time between output tokens, by request."),
        ("queue_time_seconds", metrics.queue_time, "From arrival to the first step."),
        ("request_duration_seconds", metrics.total_time, "From arrival to the last token."),
        ("step_duration_seconds", metrics.step_seconds, "One step, scheduling included."),
        ("step_execution_seconds", metrics.execute_seconds, "One step in the executor."),
        ("step_sequences", metrics.batch_sequences, "Sequences per step."),
        ("step_tokens", metrics.batch_tokens, "Token rows per step."),
    ):
        yield from _render_histogram(f"headrace_{name}", histogram, text)


def _render_histogram(name: str, histogram: Histogram, text: str) -> Iterator[str]:
    yield from _header(name, "histogram", text)
    bounds = [*(f"{bound:g}" for bound in histogram.bounds), "+Inf"]
    for bound, count in zip(bounds, itertools.accumulate(histogram.counts), strict=True):
        yield _sample(f"{name}_bucket", count, {"le": bound})
    yield _sample(f"{name}_sum", histogram.total, {})
    yield _sample(f"{name}_count", histogram.count, {})


def _family(name: str, kind: str, text: str, samples: Sequence[tuple[Labels, float]]) -> Iterator[str]:
    yield from _header(name, kind, text)
    for labels, value in samples:
        yield _sample(name, value, labels)


def _header(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"


def _sample(name: str, value: float, labels: Labels) -> str:
    """Label values are routes, statuses and words of our own making: nothing in them needs escaping."""
    pairs = ",".join(f'{key}="{label}"' for key, label in labels.items())
    return f"{name}{{{pairs}}} {value}" if pairs else f"{name} {value}"

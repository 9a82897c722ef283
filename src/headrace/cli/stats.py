"""One line about a finished request."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace.engine.metrics import RequestMetrics


def speed_line(metrics: "RequestMetrics") -> str:
    """Tokens in and out, TTFT, tokens per second."""
    cached = f" ({metrics.num_cached_tokens} cached)" if metrics.num_cached_tokens else ""
    speed = f", {1 / metrics.tpot:.1f} tok/s" if metrics.tpot else ""
    return (
        f"{metrics.num_prompt_tokens} tokens in{cached}, {metrics.num_output_tokens} out,"
        f" TTFT {metrics.ttft * 1e3:.0f} ms{speed}"
    )

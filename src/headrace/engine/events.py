"""What a step tells the engine's caller."""

from dataclasses import dataclass

from headrace.base.errors import HeadraceError
from headrace.engine.metrics import RequestMetrics
from headrace.engine.request import FinishReason


@dataclass(slots=True)  # not frozen: one is made per token, and that would take three times as long
class TokenEvent:
    """A sample produced a token.

    Attributes:
        logprob: of the token under the raw distribution; None where no logprobs were asked.
        top: (token id, logprob) of the most likely tokens, best first, as many as were asked.
        weight_version: of the weights that the step ran with (`Engine.install_weights`).
    """

    request_id: str
    index: int
    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    weight_version: int = 0


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """A sample ended. It follows the `TokenEvent` of its last token.

    Attributes:
        reason: ``stop`` (end of sequence, stop token or stop string) or ``length``.
        stop_reason: the stop token id or string that ended it; None for end of sequence and length.
        metrics: the whole request's, on its last sample's event; None on the others.
    """

    request_id: str
    index: int
    reason: FinishReason
    stop_reason: str | int | None = None
    metrics: RequestMetrics | None = None


@dataclass(frozen=True, slots=True)
class FailedEvent:
    """A request ended with an error, all its samples with it. Nothing follows for this request."""

    request_id: str
    error: HeadraceError


Event = TokenEvent | FinishedEvent | FailedEvent

"""What a caller gets back: whole results, increments of a stream, and their measurements."""

from dataclasses import dataclass, field

from headrace.engine.metrics import RequestMetrics


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One produced token and the alternatives to it, by the model's raw distribution (before any processing).

    Attributes:
        token_id: the chosen token.
        logprob: its natural-log probability.
        top: (token id, logprob) of the most likely tokens, best first, as many as ``SamplingParams.logprobs`` asked.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sample of a request.

    Attributes:
        index: 0 … n - 1.
        text: detokenized output, ending before a stop string.
        token_ids: every token produced, including the one that ended it.
        logprobs: one entry per token, or None where none were asked.
        finish_reason: ``stop`` (end of sequence, stop token or stop string) or ``length``.
        stop_reason: the stop string or stop token id that ended it; None for end of sequence and length.
        weight_versions: of the weights that gave each token (`LLM.update_weights`).
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: str
    stop_reason: str | int | None = None
    weight_versions: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished request.

    Attributes:
        prompt_logprobs: one entry per token of the prompt, where a server was asked for them. NaN for the first token,
            which nothing precedes.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprob] | None = None


@dataclass(slots=True)  # not frozen: one is made per token, and that would take three times as long
class Delta:
    """What one sample of a request gained since its last `Delta`.

    Text lags tokens where a character or a possible stop string is incomplete; joined over a stream, the texts, tokens
    and logprobs are those of the finished `CompletionOutput`.

    Attributes:
        index: which sample.
        text: new text, possibly empty.
        token_ids: new tokens.
        logprobs: one entry per new token, or None where none were asked.
        finish_reason: set on the sample's last delta.
        stop_reason: see `CompletionOutput`.
        metrics: set on the last delta of the whole request.
        weight_versions: one entry per new token.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    metrics: RequestMetrics | None = None
    weight_versions: list[int] = field(default_factory=list)

"""What a user may ask of sampling, checked when it is made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from headrace.base.errors import InvalidRequestError

MAX_LOGPROBS = 20
MAX_BIAS = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    Logits are processed in this order: bias, repetition, presence and frequency penalties, temperature, then
    the truncations top-k, top-p, min-p, each over what the one before it left. Logprobs are reported from the raw
    logits, before any of these.

    Attributes:
        n: independent samples of the prompt.
        max_tokens: tokens to produce at most; None: as many as the context window holds.
        min_tokens: no end-of-sequence or stop token is chosen before this many are produced.
        temperature: divides the logits; 0 picks the most likely token (greedy; ties go to the lower id).
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output
            (CTRL, arXiv:1909.05858); 1 is off.
        presence_penalty: subtracted once from the logits of tokens already produced; -2 to 2.
        frequency_penalty: subtracted once per occurrence from the logits of tokens already produced; -2 to 2.
        logit_bias: token id to a value added to its logit; -100 to 100.
        seed: makes the samples reproducible; None draws a seed from the system.
        stop: strings that end the output; the output ends before the string.
        stop_token_ids: tokens that end the output.
        ignore_eos: go on after the model's end-of-sequence tokens.
        forced_ids: the first tokens produced, as unlikely as they may be (teacher forcing): logprobs then say what the
            model gives a text. They count towards max_tokens and end nothing, but in a stop string. One that is less
            likely than the likeliest by e^-100 cannot be forced; another token then stands in its place.
        logprobs: also report this many most likely alternatives per token (0: the chosen token alone); None: nothing.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    forced_ids: tuple[int, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "forced_ids", tuple(self.forced_ids or ()))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        self._check_types()
        self._check_ranges()

    def forcing(self, token_id: int) -> "SamplingParams":
        """What chooses this very token, and reports as many logprobs."""
        return SamplingParams(temperature=0.0, logprobs=self.logprobs, logit_bias={token_id: MAX_BIAS})

    @property
    def has_penalties(self) -> bool:
        """Whether sampling depends on the tokens so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def _check_types(self) -> None:
        for name in ("n", "min_tokens", "top_k"):
            _require_int(name, getattr(self, name))
        for name in ("max_tokens", "seed", "logprobs"):
            if getattr(self, name) is not None:
                _require_int(name, getattr(self, name))
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            _require_number(name, getattr(self, name))
        for token, bias in self.logit_bias.items():
            _require_int("logit_bias key", token)
            _require_number("logit_bias value", bias)
        for token in self.stop_token_ids:
            _require_int("stop_token_ids entry", token)
        for token in self.forced_ids:
            _require_int("forced_ids entry", token)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidRequestError(f"ignore_eos must be true or false, not {self.ignore_eos!r}.")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InvalidRequestError(f"stop must hold non-empty strings, not {text!r}.")

    def _check_ranges(self) -> None:
        _require("n", self.n, 1, 128)
        if self.max_tokens is not None:
            _require("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _require("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}.")
        if self.max_tokens is not None and len(self.forced_ids) > self.max_tokens:
            raise InvalidRequestError(f"{len(self.forced_ids)} forced_ids exceed max_tokens {self.max_tokens}.")
        _require("temperature", self.temperature, 0.0, 100.0)
        _require("top_k", self.top_k, 0, 2**31 - 1)
        _require("top_p", self.top_p, 1e-9, 1.0)
        _require("min_p", self.min_p, 0.0, 1.0)
        _require("repetition_penalty", self.repetition_penalty, 1e-3, 100.0)
        _require("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for token, bias in self.logit_bias.items():
            _require("logit_bias key", token, 0, 2**31 - 1)
            _require(f"logit_bias of token {token}", bias, -MAX_BIAS, MAX_BIAS)
        if self.seed is not None:
            _require("seed", self.seed, -(2**63), 2**63 - 1)
        if self.logprobs is not None:
            _require("logprobs", self.logprobs, 0, MAX_LOGPROBS)


def _require_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequestError(f"{name} must be an integer, not {value!r}.")


def _require_number(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise InvalidRequestError(f"{name} must be a finite number, not {value!r}.")


def _require(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InvalidRequestError(f"{name} must be between {low} and {high}, not {value}.")

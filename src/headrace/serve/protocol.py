"""The requests of the OpenAI API that this server takes, field by field.

Every field that is accepted stands here. One that OpenAI defines and this server cannot honor is typed `Unsupported`:
null is fine, a value is an error. Anything else is unknown and an error too. Ranges are checked by `SamplingParams`.
"""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from headrace.base.errors import InvalidRequestError
from headrace.engine.sampling import SamplingParams
from headrace.serve.scoring import Scoring

Unsupported: TypeAlias = None


UNKNOWN_FIELD = "unknown_field"
"""Type of the validation error for a field that is in no model; its context has the ``field``."""

# A body may hold millions of items, and validation keeps an error for each wrong one: what can be long is bounded, or
# checked as a whole.
MAX_STOPS = 64
MAX_STOP_LENGTH = 4096
MAX_STOP_TOKENS = 1024
MAX_LOGIT_BIASES = 1024
MAX_METADATA = 16


class Strict(BaseModel):
    """A body in which every field is known and of its very type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _name_the_first_unknown_field(cls, value: Any) -> Any:
        """``forbid`` by itself would collect all of them."""
        if isinstance(value, dict):
            for field in value:
                if field not in cls.model_fields:
                    raise PydanticCustomError(UNKNOWN_FIELD, "unknown", {"field": field})
        return value


def _as_strings(value: Any) -> Any:
    """One string or a list of them."""
    strings = [value] if isinstance(value, str) else value
    if strings is not None and not (isinstance(strings, list) and all(type(item) is str for item in strings)):
        raise ValueError("should be a string or a list of strings")
    if strings and (len(strings) > MAX_STOPS or max(map(len, strings)) > MAX_STOP_LENGTH):
        raise ValueError(f"should hold at most {MAX_STOPS} strings of at most {MAX_STOP_LENGTH} characters")
    return strings


def _as_token_ids(value: Any) -> Any:
    if value is not None and not (isinstance(value, list) and all(type(item) is int for item in value)):
        raise ValueError("should be a list of token ids")
    if value and len(value) > MAX_STOP_TOKENS:
        raise ValueError(f"should hold at most {MAX_STOP_TOKENS} token ids")
    return value


def _at_most(limit: int) -> BeforeValidator:
    """Bounds an object before its members are looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            raise ValueError(f"should hold at most {limit} entries")
        return value

    return BeforeValidator(check)


def _no_items(value: Any) -> Any:
    """An empty list asks for nothing."""
    return None if value == [] else value


def _join_text_parts(value: Any) -> Any:
    """Content in parts becomes one string, a line break between parts."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str) or part.keys() != {"type", "text"}:
            shown = f" of type {kind!r}" if isinstance(kind, str) and kind != "text" else ""
            raise ValueError(f"only parts {{'type': 'text', 'text': …}} are supported, not a part{shown[:60]}")
        texts.append(part["text"])
    return "\n".join(texts)


def _as_prompts(value: Any) -> Any:
    """One prompt or several, each text or token ids, become a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if all(type(item) is str for item in value):
            return value
        if all(type(item) is list and all(type(token) is int for token in item) for item in value):
            return value
    raise ValueError("should be a string, a list of strings, a list of token ids, or a list of such lists")


Strings = Annotated[list[str] | None, BeforeValidator(_as_strings)]
TokenIds = Annotated[list[int] | None, BeforeValidator(_as_token_ids)]
Empty = Annotated[None, BeforeValidator(_no_items)]


class StreamOptions(Strict):
    """What a stream carries besides its increments."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ResponseFormat(Strict):
    """Free text is the only format."""

    type: Literal["text"]


class SamplingFields(Strict):
    """Fields that both endpoints share; null means the default."""

    model: str
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, _at_most(MAX_LOGIT_BIASES)] = None
    seed: int | None = None
    stop: Strings = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Extensions, named as in `SamplingParams`.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: TokenIds = None
    # Taken without effect: they label a request or tune what this server does not have.
    user: str | None = None
    metadata: Annotated[dict[str, str] | None, _at_most(MAX_METADATA)] = None

    @property
    def scoring(self) -> Scoring:
        """What is asked of the prompts' logprobs."""
        return "none"

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _sampling(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "stream_options is given, but stream is not true.", "Set stream, or leave it out."
            )
        return SamplingParams(
            **{name: value for name in _PASSED_ON if (value := getattr(self, name)) is not None},
            max_tokens=max_tokens,
            logprobs=logprobs,
            logit_bias=_token_biases(self.logit_bias or {}),
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
        )


_PASSED_ON = (
    *("n", "temperature", "top_p", "top_k", "min_p", "min_tokens", "ignore_eos", "seed"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)


def _token_biases(biases: dict[str, float]) -> dict[int, float]:
    for key in biases:
        if not (key.isascii() and key.isdecimal() and len(key) < 11):
            raise InvalidRequestError(
                f"logit_bias key {key[:40]!r} is not a token id.", "Use decimal token ids as keys."
            )
    return {int(key): bias for key, bias in biases.items()}


class Message(Strict):
    """One turn. What an assistant's message carries besides text may be null, so that answers can be sent back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_join_text_parts)]
    name: str | None = None
    refusal: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    annotations: Empty = None
    tool_calls: Empty = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it; ``developer`` is OpenAI's newer word for ``system``."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": self.content}
        return message if self.name is None else {**message, "name": self.name}


class ChatRequest(SamplingFields):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1), FailFast()]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    # Taken without effect.
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    parallel_tool_calls: bool | None = None
    tool_choice: Literal["none", "auto"] | None = None
    tools: Empty = None
    functions: Empty = None
    function_call: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None
    prompt_cache_retention: Unsupported = None
    moderation: Unsupported = None

    def sampling(self) -> SamplingParams:
        """Raises `InvalidRequestError` for what is out of range or contradicts itself."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs is given, but logprobs is not true.", "Set logprobs to true.")
        limits = {limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None}
        if len(limits) > 1:
            raise InvalidRequestError("max_tokens and max_completion_tokens differ.", "Give one of them.")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling(max_tokens=next(iter(limits), None), logprobs=logprobs)


class CompletionRequest(SamplingFields):
    """``POST /v1/completions``."""

    prompt: Annotated[
        list[str | list[int]],
        PlainValidator(_as_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: Unsupported = None
    return_tokens_as_token_ids: bool | None = None  # an extension: logprobs name tokens ``token_id:N``

    @property
    def scoring(self) -> Scoring:
        """Whether logprobs of the prompts are asked for, too, or nothing else."""
        if not self.echo or self.logprobs is None:
            return "none"
        return "alone" if self.max_tokens == 0 else "too"

    def sampling(self) -> SamplingParams:
        """Raises `InvalidRequestError` for what is out of range or contradicts itself."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequestError("best_of other than n is not supported.", "Leave it out, and use n.")
        if self.scoring != "none" and self.stream:
            raise InvalidRequestError("Logprobs of a prompt are not streamed.", "Leave out echo, logprobs or stream.")
        max_tokens = SamplingParams().max_tokens if self.max_tokens is None else self.max_tokens
        if self.scoring == "alone":
            max_tokens = 1  # it is left out of the reply
        return self._sampling(max_tokens=max_tokens, logprobs=self.logprobs)

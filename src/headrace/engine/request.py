"""What a user asked (`Request`), and one sample of it while it lives in the engine (`Sequence`)."""

import os
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from headrace.engine.kv_manager import SequenceBlocks
from headrace.engine.sampling import SamplingParams
from headrace.engine.step import SampleRow

FinishReason = Literal["stop", "length"]

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A prompt and how to continue it.

    Attributes:
        request_id: chosen by the caller, unique among the requests in the engine.
        prompt_ids: the prompt's tokens, at least one.
        params: how to sample and when to stop. Stop strings are the caller's to find (`Engine.finish_sequence`).
        eos_ids: the model's end-of-sequence tokens; ignored where ``params.ignore_eos``.
        arrival_time: seconds on the engine's clock; None: when it is added.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    eos_ids: tuple[int, ...] = ()
    arrival_time: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", tuple(self.prompt_ids))
        object.__setattr__(self, "eos_ids", tuple(self.eos_ids))


class SequenceState(Enum):
    """Where a sequence is. A preempted sequence is `WAITING` again, with ``num_preemptions`` above 0."""

    HELD = "held"  # for a sibling that computes the prompt which they will share
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One sample of a request.

    ``tokens`` is the prompt followed by the output::

        0 ............... num_prompt_tokens ............... len(tokens)
        |---- prompt ----|------------- output -------------|
        |---------- KV computed ---------|----- wanted -----|
        0 ......................... num_computed ..... len(tokens)

    While it decodes, exactly the newest token is wanted. Whenever nothing would be left to want, a token is sampled.

    Attributes:
        serial: number of its request in order of arrival.
        index: which sample of its request.
        seed: the sequence's own random seed, 63 bits.
        max_len: length of ``tokens`` at which it ends.
        blocks: its KV blocks while it runs; None otherwise.
        end_ids: tokens that end it once ``min_tokens`` are produced.
        num_cached_tokens: prompt tokens that the prefix cache served when it first ran.
        steady_row: one `SampleRow` for all its steps, if only the logits decide (greedy, no penalties, nothing banned).
    """

    __slots__ = (
        "blocks",
        "end_ids",
        "finish_reason",
        "first_token_time",
        "index",
        "last_token_time",
        "max_len",
        "num_cached_tokens",
        "num_computed",
        "num_preemptions",
        "num_prompt_tokens",
        "order",
        "request",
        "scheduled_time",
        "seed",
        "serial",
        "state",
        "steady_row",
        "stop_reason",
        "tokens",
    )

    def __init__(self, request: Request, *, serial: int, index: int, seed: int, max_len: int) -> None:
        self.request = request
        self.serial = serial
        self.index = index
        self.seed = seed
        self.max_len = max_len
        self.tokens: list[int] = list(request.prompt_ids)
        self.num_prompt_tokens = len(request.prompt_ids)
        self.num_computed = 0
        self.blocks: SequenceBlocks | None = None
        self.state = SequenceState.WAITING
        self.order: tuple[float, ...] = ()  # given by the policy when the scheduler takes it
        eos_ids = () if request.params.ignore_eos else request.eos_ids
        self.end_ids = frozenset((*eos_ids, *request.params.stop_token_ids))
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.scheduled_time: float | None = None
        self.first_token_time: float | None = None
        self.last_token_time: float | None = None
        self.steady_row = SampleRow(request.params, 0, 0) if _is_steady(request.params) else None

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

    @property
    def tpot(self) -> float:
        """Mean seconds between its output tokens after the first; 0 for fewer than two."""
        if self.first_token_time is None or self.last_token_time is None or self.num_output_tokens < 2:
            return 0.0
        return (self.last_token_time - self.first_token_time) / (self.num_output_tokens - 1)

    def sample_row(self) -> SampleRow:
        """How to choose its next token; where there is a `steady_row`, that says the same."""
        num_outputs = len(self.tokens) - self.num_prompt_tokens
        params = self.request.params
        if num_outputs < len(params.forced_ids):
            return SampleRow(params.forcing(params.forced_ids[num_outputs]), 0, 0)
        banned = tuple(sorted(self.end_ids)) if num_outputs < params.min_tokens else ()
        if not params.has_penalties:
            return SampleRow(params, self.seed, num_outputs, banned_ids=banned)
        return SampleRow(params, self.seed, num_outputs, self.request.prompt_ids, tuple(self.output_ids), banned)

    def append(self, token_id: int) -> FinishReason | None:
        """Take a sampled token; the reason if it ends the sequence."""
        self.tokens.append(token_id)
        params = self.request.params
        if token_id in self.end_ids and self.num_output_tokens >= max(params.min_tokens, len(params.forced_ids) + 1):
            if token_id in params.stop_token_ids:
                self.stop_reason = token_id
            return "stop"
        return "length" if len(self.tokens) >= self.max_len else None


def derive_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a request: 63 bits, unrelated for neighboring seeds and indices.

    Two rounds of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014).
    """
    return _splitmix64(_splitmix64(seed & _MASK64) + index) >> 1


def make_sequences(request: Request, *, serial: int, max_len: int) -> list[Sequence]:
    """The ``params.n`` samples of a request. Without a seed, one is drawn from the system's entropy."""
    seed = int.from_bytes(os.urandom(8), "little") >> 1 if request.params.seed is None else request.params.seed
    return [
        Sequence(request, serial=serial, index=index, seed=derive_seed(seed, index), max_len=max_len)
        for index in range(request.params.n)
    ]


def _is_steady(params: SamplingParams) -> bool:
    """Whether the choice depends on nothing but the logits, so that one row object serves every step."""
    return params.temperature == 0.0 and not params.has_penalties and params.min_tokens == 0 and not params.forced_ids


def _splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)

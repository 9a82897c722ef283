"""How much an engine takes on at once."""

from dataclasses import dataclass

from headrace.base.errors import InvalidRequestError


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Limits of the scheduler, checked when made.

    Attributes:
        max_num_seqs: sequences that may run at once; the rest wait.
        max_num_batched_tokens: tokens that one step may compute. At least `max_num_seqs`, so that every running
            sequence can advance in every step.
        max_model_len: the context window: prompt and output tokens of one sequence together.
        enable_prefix_caching: keep the KV of finished and preempted sequences for others that begin alike.
        max_prefill_chunk: tokens that one sequence may compute in one step; None: the whole budget. Smaller chunks
            shorten the steps that decoding sequences share with a long prompt, and lengthen that prompt's prefill.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_model_len: int = 4096
    enable_prefix_caching: bool = True
    max_prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        _require_positive("max_num_seqs", self.max_num_seqs)
        _require_positive("max_num_batched_tokens", self.max_num_batched_tokens)
        if self.max_prefill_chunk is not None:
            _require_positive("max_prefill_chunk", self.max_prefill_chunk)
        if not isinstance(self.max_model_len, int) or self.max_model_len < 2:
            raise InvalidRequestError(
                f"max_model_len must be at least 2 (a prompt token and an output token), not {self.max_model_len!r}."
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidRequestError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than max_num_seqs {self.max_num_seqs}, "
                "so some running sequences could not advance.",
                f"Raise max_num_batched_tokens to {self.max_num_seqs} or more, or lower max_num_seqs.",
            )


def _require_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidRequestError(f"{name} must be a whole number of 1 or more, not {value!r}.")

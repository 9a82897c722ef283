"""What `LLM` and `AsyncLLM` take besides the model's name."""

from dataclasses import dataclass, fields
from typing import Any

from headrace.base.errors import InvalidRequestError
from headrace.base.settings import ISA_NAMES
from headrace.numerics.kv_formats import KV_FORMATS

EXECUTORS = ("native", "torch")
WEIGHT_FORMATS = ("f32", "bf16")
ACTIVATIONS = ("auto", "f32", "int16", "bf16", "int8")
WEIGHT_CACHES = ("auto", "off")


@dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """How to run a model.

    Attributes:
        max_model_len: context window in tokens; None: the model's own, or what fits in memory if that is less.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: tokens that one step computes at most; longer prompts are prefilled in chunks.
        max_prefill_chunk: tokens that one prompt computes in a step at most; None: the whole step. Smaller chunks make
            the steps that decoding sequences share with a long prompt shorter, and that prompt's first token later.
        enable_prefix_caching: keep the KV of finished requests and reuse it for prompts that begin alike.
        kv_cache_memory: bytes for the KV cache; None: what `max_num_seqs` full contexts need, or half of the memory
            that is free if that is less.
        block_size: tokens per KV block.
        kv_format: how cached keys and values are kept: ``f32``; ``bf16``; ``int8``, a little over half of bf16's
            memory; ``fp8`` (e4m3), as much and less exact; or ``int4``, a third of the memory and a visible loss. What
            each does to the outcome: docs/quantization.md.
        activation: precision in which linear layers read their input (native executor): ``f32``; ``int16`` or ``int8``,
            fixed point of the largest magnitude in each group of a quantized weight; ``bf16``; or ``auto``, the
            fastest on this machine of f32 and int16. With AMX both fixed points read inputs in 16 bits of each row's
            largest, and quantized weights in 16 (int16) or 8 (int8) of each of their rows' largest, or as they are
            where they are 8 bits of one scale a row.
        executor: ``native`` (C++, CPU) or ``torch`` (reference; needs the extra ``torch``).
        num_threads: threads of the native executor; None: HEADRACE_THREADS, or the cores this process may use.
        isa: instruction set of the native executor; None: HEADRACE_ISA, or the best of this machine.
        fuse: merge ops that read or write the same values, in the graph and in the executor's plan. Off, the results
            are the same, slower: for comparison.
        weight_format: ``f32`` or ``bf16``: turn all matrices into it at load, whatever the file holds, to compare with;
            None: as they are stored.
        weight_cache: ``auto`` keeps packed weights in the user's cache folder, where that makes the next start faster,
            and reads them from there; ``off`` packs at every start (native executor).
    """

    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_prefill_chunk: int | None = None
    enable_prefix_caching: bool = True
    kv_cache_memory: int | None = None
    block_size: int = 16
    kv_format: str = "bf16"
    activation: str = "auto"
    executor: str = "native"
    num_threads: int | None = None
    isa: str | None = None
    fuse: bool = True
    weight_format: str | None = None
    weight_cache: str = "auto"

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            _require_count(name, getattr(self, name))
        for name in ("max_model_len", "max_prefill_chunk", "kv_cache_memory", "num_threads"):
            if getattr(self, name) is not None:
                _require_count(name, getattr(self, name))
        _require_choice("executor", self.executor, EXECUTORS)
        _require_choice("kv_format", self.kv_format, KV_FORMATS)
        _require_choice("activation", self.activation, ACTIVATIONS)
        if self.isa is not None:
            _require_choice("isa", self.isa, ISA_NAMES)
        if self.weight_format is not None:
            _require_choice("weight_format", self.weight_format, WEIGHT_FORMATS)
        _require_choice("weight_cache", self.weight_cache, WEIGHT_CACHES)
        if self.max_model_len == 1:
            raise InvalidRequestError("max_model_len 1 has no room for both a prompt and an output.", "Use 2 or more.")
        native_only = self.activation not in ("auto", "f32") or self.num_threads is not None or self.isa is not None
        if self.executor == "torch" and native_only:
            raise InvalidRequestError(
                "The torch executor takes no activation, num_threads or isa: it is the f32 reference.",
                "Leave them out, or use the native executor.",
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidRequestError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than max_num_seqs {self.max_num_seqs}.",
                "A step must hold one token of every running sequence: raise the one or lower the other.",
            )

    @classmethod
    def of(cls, options: dict[str, Any]) -> "LLMConfig":
        """From keyword arguments; an unknown one is an error that names it."""
        known = {field.name for field in fields(cls)}
        for name in options:
            if name not in known:
                raise InvalidRequestError(f"Unknown option {name!r}.", f"LLM takes {', '.join(sorted(known))}.")
        return cls(**options)


def _require_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidRequestError(f"{name} must be a whole number of 1 or more, not {value!r}.")


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidRequestError(f"{name} {value!r} does not exist.", f"Use one of {', '.join(choices)}.")

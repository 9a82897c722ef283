"""Typed, strict reads of a checkpoint's own description: Hugging Face `config.json` or GGUF metadata.

A key that is missing or of the wrong type is an error that names it. So is a key that asks for mathematics that the
family does not have: `Config.finish` holds what was not read against what is known to be harmless.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from headrace.base.errors import CheckpointError, UnsupportedModelError
from headrace.models.sources import StoredTensors

_log = logging.getLogger(__name__)


class Config:
    """A mapping that is read once, key by key, and remembers what nobody asked for.

    A key whose value is null counts as missing: configs write null for "not set".

    Args:
        values: the mapping.
        where: what to call it in errors: ``config.json``.
        prefix: put before every key that is read: GGUF's ``llama.``.
    """

    def __init__(self, values: Mapping[str, object], where: str, prefix: str = "") -> None:
        self.where = where
        self.prefix = prefix
        self._values = values
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the key is there and not null. Does not count as reading it."""
        return self._values.get(self.prefix + key) is not None

    def is_integer(self, key: str) -> bool:
        """Whether the key holds a whole number, where it may also hold a list. Does not count as reading it."""
        value = self._values.get(self.prefix + key)
        return isinstance(value, Integral) and not isinstance(value, bool)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of 0 or more; the default, if there is one, where the key is missing."""
        value = self._get(key, default)
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
            raise self.wrong(key, "a whole number", value)
        return int(value)

    def positive(self, key: str, default: int | None = None) -> int:
        """A whole number of 1 or more."""
        value = self.integer(key, default)
        if value == 0:
            raise self.wrong(key, "1 or more", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._get(key, default)
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise self.wrong(key, "a finite number", value)
        return float(value)

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false", value)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string", value)
        return value

    def items(self, key: str) -> Sequence[object]:
        """A list."""
        value = self._get(key, None)
        if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
            raise self.wrong(key, "a list", value)
        return value

    def numbers(self, key: str, length: int) -> list[float]:
        """A list of `length` numbers."""
        values = [float(v) for v in self.items(key) if isinstance(v, Real)]
        if len(values) != length or len(self.items(key)) != length:
            raise self.wrong(key, f"{length} numbers", self._get(key, None))
        return values

    def section(self, key: str) -> "Config":
        """A nested mapping, as a config whose own keys are then read."""
        value = self._get(key, None)
        if not isinstance(value, Mapping):
            raise self.wrong(key, "a mapping", value)
        return Config(value, f"{key} of {self.where}")

    def with_defaults(self, defaults: Mapping[str, object]) -> "Config":
        """The same mapping over a family's defaults, which checkpoints may leave out."""
        return Config({**defaults, **self._values}, self.where, self.prefix)

    def overridden(self, values: Mapping[str, object]) -> "Config":
        """The same mapping with some keys replaced."""
        return Config({**self._values, **values}, self.where, self.prefix)

    def require(self, key: str, *accepted: object) -> None:
        """Refuse by name a key that is set to anything but what is accepted."""
        value = self._get(key, accepted[0])
        if value not in accepted:
            raise UnsupportedModelError(
                f"{self.prefix}{key} = {value!r} in {self.where} is not supported.",
                f"Supported: {', '.join(repr(each) for each in accepted)}.",
            )

    def require_all(self, key: str, accepted: object) -> None:
        """Refuse by name a list that holds anything but what is accepted."""
        for value in self.items(key):
            if value != accepted:
                raise UnsupportedModelError(
                    f"{self.prefix}{key} with {value!r} in {self.where} is not supported.",
                    f"Supported in this family: {accepted!r} throughout.",
                )

    def skip(self, *keys: str) -> None:
        """Keys that are known not to matter to the graph."""
        self._read.update(self.prefix + key for key in keys)

    def unread(self) -> list[str]:
        """Keys under the prefix that are set (neither null nor false nor empty) and that nobody read."""
        return [
            key
            for key, value in self._values.items()
            if key.startswith(self.prefix) and key not in self._read and not _is_off(value)
        ]

    def refuse_unread(self) -> None:
        """For mappings that hold nothing but mathematics: a key that nobody read is refused by name."""
        if keys := self.unread():
            raise UnsupportedModelError(
                f"{', '.join(sorted(keys))} in {self.where} is not supported.",
                "The model needs something that this version does not build.",
            )

    def warn_unread(self) -> None:
        """For `config.json`, which anyone may add to: keys that nobody read are named in the log."""
        if keys := self.unread():
            _log.warning("%s: not understood, and so without effect: %s", self.where, ", ".join(sorted(keys)))

    def wrong(self, key: str, expected: str, found: object) -> CheckpointError:
        """The error for a value of the wrong kind."""
        return CheckpointError(
            f"{self.prefix}{key} in {self.where} must be {expected}, not {found!r}.", "The file is damaged or edited."
        )

    def _get(self, key: str, default: object) -> object:
        self._read.add(self.prefix + key)
        value = self._values.get(self.prefix + key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(
                f"{self.where} has no {self.prefix}{key}.", "The file is incomplete, or not of the model that it names."
            )
        return value


def _is_off(value: object) -> bool:
    return value is None or value is False or (isinstance(value, Sequence | Mapping) and len(value) == 0)


_HF_HARMLESS = (
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "label2id",
    "max_window_layers",
    "model_type",
    "name_or_path",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "tokenizer_class",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
)
"""Keys that do not change what the graph computes. `pretraining_tp` splits a matmul and is exact without the split;
`max_window_layers` matters only beside `use_sliding_window`, whose family reads it."""

_HF_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_multiplier": (1.0, 1),
    "attn_logit_softcapping": (None,),
    "embedding_multiplier": (1.0, 1),
    "final_logit_softcapping": (None,),
    "is_encoder_decoder": (False,),
    "logits_scaling": (1.0, 1),
    "mlp_bias": (False,),
    "num_experts": (0,),
    "num_local_experts": (0, 1),
    "partial_rotary_factor": (1.0, 1),
    "quantization_config": (None,),
    "qkv_bias": (False,),
    "residual_multiplier": (1.0, 1),
    "rope_interleaved": (False,),
    "use_bidirectional_attention": (False,),
    "use_sliding_window": (False,),
    "sliding_window": (None,),
}
"""Keys that change the mathematics, and the values under which they do not: any other value is refused, unless the
family has read the key for itself."""

_GGUF_HARMLESS = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "vocab_size",
)

_GGUF_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (1.0, 0.0),
    "use_parallel_residual": (False,),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """All that a family reads a spec from.

    Attributes:
        config: `config.json`, or GGUF metadata under the architecture's prefix.
        tensors: the checkpoint's tensors by stored name; none where only the config is at hand.
        context_length: the longest context to be served; None: the model's own.
    """

    config: Config
    tensors: StoredTensors
    context_length: int | None


def finish_hf(config: Config) -> None:
    """After a family has read what it knows: refuse what it cannot do, and name in the log what is left."""
    config.skip(*_HF_HARMLESS)
    for key in config.unread():
        if key in _HF_NEUTRAL:
            config.require(key, *_HF_NEUTRAL[key])
        elif key == "layer_types":
            config.require_all(key, "full_attention")
    config.skip(*(key for key in config.unread() if key.startswith("_")))
    config.warn_unread()


def finish_gguf(config: Config) -> None:
    """After a family has read what it knows: every other key under the architecture's prefix is refused by name."""
    config.skip(*_GGUF_HARMLESS)
    for key, accepted in _GGUF_NEUTRAL.items():
        if config.has(key):
            config.require(key, *accepted)
    config.refuse_unread()

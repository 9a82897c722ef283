"""Rotary frequencies from a checkpoint's config, for every scaling that the supported families use.

Frequencies are f32, rounded where Hugging Face transformers rounds (`modeling_rope_utils.py`), so that both agree to
the last bit or the one beside it.

``dynamic`` and ``longrope`` choose frequencies by the length of the sequence. A key is rotated once, when it enters
the KV cache, and its block may be shared by sequences of any length: so the choice is made once, from the longest
context that will be served (`context_length`), and holds for every sequence. transformers instead decides anew as a
sequence grows, and leaves the keys it has cached with the rotation of before.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.base.errors import CheckpointError, UnsupportedModelError
from headrace.graph.ir import RopeTable
from headrace.models.config import Config
from headrace.models.sources import StoredTensors

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Float32 = npt.NDArray[np.float32]


def hf_rope_section(config: Config) -> tuple[Config, float]:
    """The mapping that describes rotation, and its base: ``rope_parameters`` (transformers 5) or ``rope_scaling``
    beside ``rope_theta`` (before)."""
    theta = config.number("rope_theta", 10_000.0)
    section = Config({}, config.where)
    for key in ("rope_parameters", "rope_scaling"):  # where there are both, the latter rules
        if config.has(key):
            section = config.section(key)
    if config.has("original_max_position_embeddings"):  # some configs hold it outside, and then it rules
        original = config.positive("original_max_position_embeddings")
        section = section.overridden({"original_max_position_embeddings": original})
    return section, section.number("rope_theta", theta)


@dataclass(frozen=True, kw_only=True, slots=True)
class HfRope:
    """One kind of layer's rotation, as `config.json` asks for it.

    Attributes:
        section: its mapping, flat: ``rope_type`` and what that type takes.
        theta: the base.
        head_dim: features of a head, all of which are rotated.
        max_positions: the config's ``max_position_embeddings``.
        context_length: the longest context to be served.
    """

    section: Config
    theta: float
    head_dim: int
    max_positions: int
    context_length: int

    def table(self) -> RopeTable:
        """Compute it.

        Raises:
            UnsupportedModelError: an unknown type, or a key that its type does not take.
            CheckpointError: a key that its type needs is missing or of the wrong type.
        """
        section = self.section
        kind = section.text("rope_type", section.text("type", "default"))
        if kind not in _HF_TYPES:
            known = ", ".join(sorted(_HF_TYPES))
            raise UnsupportedModelError(
                f"rope_type {kind!r} in {section.where} is not supported.", f"Supported: {known}."
            )
        section.require("partial_rotary_factor", 1.0, 1)
        section.skip("original_max_position_embeddings")  # types that do not read it do not depend on it
        inv_freq, scale = _HF_TYPES[kind](self)
        section.refuse_unread()
        return RopeTable(tuple(inv_freq.tolist()), scale)

    @property
    def original_positions(self) -> int:
        """Positions the model was made for before its context was stretched."""
        return self.section.positive("original_max_position_embeddings", self.max_positions)


def plain_rope(theta: float, head_dim: int) -> RopeTable:
    """The unscaled table: ``inv_freq[i] = theta ** (-2i / head_dim)``."""
    return RopeTable(tuple(_inverse(theta, head_dim).tolist()))


def _powers(theta: float, dim: int) -> "Float32":
    """``theta ** (2i / dim)``, correctly rounded to f32."""
    import numpy as np

    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.power(np.float64(np.float32(theta)), exponents.astype(np.float64)).astype(np.float32)


def _inverse(theta: float, dim: int) -> "Float32":
    import numpy as np

    return np.float32(1) / _powers(theta, dim)


def _default(ask: HfRope) -> tuple["Float32", float]:
    return _inverse(ask.theta, ask.head_dim), 1.0


def _linear(ask: HfRope) -> tuple["Float32", float]:
    import numpy as np

    return _inverse(ask.theta, ask.head_dim) / np.float32(ask.section.number("factor")), 1.0


def _dynamic(ask: HfRope) -> tuple["Float32", float]:
    """NTK-aware scaling of the base by how far the context exceeds what the model was made for."""
    factor, dim = ask.section.number("factor"), ask.head_dim
    ratio = factor * max(ask.context_length, ask.max_positions) / ask.max_positions - (factor - 1)
    return _inverse(ask.theta * ratio ** (dim / (dim - 2)), dim), 1.0


def _llama3(ask: HfRope) -> tuple["Float32", float]:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between are blended."""
    import numpy as np

    inv_freq = _inverse(ask.theta, ask.head_dim)
    factor, original = ask.section.number("factor"), ask.original_positions
    low, high = ask.section.number("low_freq_factor"), ask.section.number("high_freq_factor")
    wavelength = np.float32(2 * math.pi) / inv_freq
    long, short = wavelength > np.float32(original / low), wavelength < np.float32(original / high)
    stretched = np.where(long, inv_freq / np.float32(factor), inv_freq)
    smooth = (np.float32(original) / wavelength - np.float32(low)) / np.float32(high - low)
    blended = (np.float32(1) - smooth) * stretched / np.float32(factor) + smooth * stretched
    return np.where(long | short, stretched, blended), 1.0


def _yarn(ask: HfRope) -> tuple["Float32", float]:
    """YaRN (arXiv:2309.00071): interpolate slow dimensions, keep fast ones, ramp between; and sharpen attention."""
    section, original = ask.section, ask.original_positions
    factor = section.number("factor", ask.max_positions / original)
    mscale, mscale_all = section.number("mscale", 0.0), section.number("mscale_all_dim", 0.0)
    scale = _yarn_scale(factor)
    if mscale and mscale_all:
        scale = _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all)
    inv_freq = _yarn_frequencies(
        ask.theta,
        ask.head_dim,
        factor=factor,
        original=original,
        beta_fast=section.number("beta_fast", 0.0) or 32.0,
        beta_slow=section.number("beta_slow", 0.0) or 1.0,
        truncate=section.boolean("truncate", True),
    )
    return inv_freq, section.number("attention_factor", scale)


def _yarn_scale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_frequencies(
    theta: float, dim: int, *, factor: float, original: int, beta_fast: float, beta_slow: float, truncate: bool = True
) -> "Float32":
    """Dimensions that turn more often than `beta_fast` within `original` positions are kept, those that turn less
    often than `beta_slow` are slowed by `factor`; `truncate` rounds the ramp's ends outwards to whole dimensions."""
    import numpy as np

    def dimension(rotations: float) -> float:
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    powers, one = _powers(theta, dim), np.float32(1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep: Float32 = one - np.minimum(np.maximum(ramp, np.float32(0)), one)
    blended: Float32 = one / (np.float32(factor) * powers) * (one - keep) + one / powers * keep
    return blended


def _longrope(ask: HfRope) -> tuple["Float32", float]:
    """LongRoPE (arXiv:2402.13753): one searched factor per frequency, for short and for long contexts."""
    import numpy as np

    section, original, dim = ask.section, ask.original_positions, ask.head_dim
    factor = section.number("factor", ask.max_positions / original)
    scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = section.numbers("short_factor", dim // 2), section.numbers("long_factor", dim // 2)
    factors = np.asarray(long if ask.context_length > original else short, np.float32)
    return np.float32(1) / (factors * _powers(ask.theta, dim)), section.number("attention_factor", scale)


_HF_TYPES: Mapping[str, Callable[[HfRope], tuple["Float32", float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # its name in the first Phi-3 configs
    "llama3": _llama3,
}


def rope_from_gguf(
    config: Config, tensors: StoredTensors, *, head_dim: int, max_positions: int, context_length: int | None
) -> RopeTable:
    """The table that a GGUF file asks for: metadata under ``<arch>.rope.``, and factors held as tensors.

    ``rope_freqs.weight`` divides the frequencies (how converters store Llama 3.1's scaling);
    ``rope_factors_long.weight`` and ``rope_factors_short.weight`` are LongRoPE's.
    """
    import numpy as np

    config.require("rope.dimension_count", head_dim)
    theta = config.number("rope.freq_base", 10_000.0)
    factor = config.number("rope.scaling.factor", 0.0) or config.number("rope.scale_linear", 0.0) or 1.0
    kind = config.text("rope.scaling.type", "linear")
    original = config.positive("rope.scaling.original_context_length", max_positions)
    scale = config.number("rope.scaling.attn_factor", 1.0)
    inv_freq = _inverse(theta, head_dim)
    if kind == "linear":
        inv_freq = inv_freq / np.float32(factor)
    elif kind == "yarn":
        fast = config.number("rope.scaling.yarn_beta_fast", 32.0)
        slow = config.number("rope.scaling.yarn_beta_slow", 1.0)
        inv_freq = _yarn_frequencies(theta, head_dim, factor=factor, original=original, beta_fast=fast, beta_slow=slow)
        scale *= _yarn_scale(factor)
    elif kind not in ("none", "longrope"):
        raise UnsupportedModelError(
            f"{config.prefix}rope.scaling.type {kind!r} in {config.where} is not supported.",
            "Supported: none, linear, yarn, longrope.",
        )
    length = "long" if (context_length or max_positions) > original else "short"
    for name in ("rope_freqs.weight", f"rope_factors_{length}.weight"):
        if name in tensors:
            inv_freq = inv_freq / _factors(tensors, name, head_dim // 2)
    return RopeTable(tuple(inv_freq.tolist()), scale)


def _factors(tensors: StoredTensors, name: str, count: int) -> "Float32":
    factors = tensors[name].to_f32().reshape(-1)
    if factors.size != count or not (factors > 0).all():
        raise CheckpointError(f"Tensor {name} does not hold {count} positive factors.", "The file is damaged.")
    return factors

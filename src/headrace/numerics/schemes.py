"""Quantization schemes: into which numbers a matrix is rounded, and by which rule. What `quantize` is asked for."""

import re
from dataclasses import dataclass
from typing import Final, Literal

from headrace.base.errors import InvalidRequestError

WHOLE = 0
"""In place of a group or block size: all of the row, all of the rows."""

ScaleType = Literal["f32", "bf16", "f16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class IntegerScheme:
    """Integers in groups under one scale.

    Attributes:
        bits: 4 or 8.
        group_size: values under one scale; `WHOLE` for one scale a row ("channel").
        symmetric: without zero points; else with integer ones.
        clip: of symmetric codes. "narrow": within ±(2^(bits-1) - 1), the scale being the largest magnitude by that: the
            rule of the published INT4 QAT pipelines, [-7, 7] and max / 7. "full": from -2^(bits-1), the scale being the
            largest magnitude / (2^bits - 1) * 2: compressed-tensors' min-max rule, [-8, 7] and max / 7.5, which rounds
            a largest magnitude that is positive down by half a step.
        scale: the type that a scale is rounded to, before codes are computed from it.
    """

    bits: Literal[4, 8] = 4
    group_size: int = 32
    symmetric: bool = True
    clip: Literal["narrow", "full"] = "narrow"
    scale: ScaleType = "bf16"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise InvalidRequestError(f"Integers of {self.bits} bits are not known.", "Use 4 or 8.")
        if self.clip not in ("narrow", "full"):
            raise InvalidRequestError(f"Clipping range {self.clip!r} is not known.", "Use narrow or full.")
        if self.clip == "full" and not self.symmetric:
            raise InvalidRequestError("Codes with zero points have one range only.", "Leave clip out.")
        _check_scale(self.scale)

    @property
    def code_range(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        if not self.symmetric:
            return 0, (1 << self.bits) - 1
        half = 1 << (self.bits - 1)
        return (1 - half if self.clip == "narrow" else -half), half - 1

    @property
    def steps(self) -> float:
        """How many scales the largest magnitude is; without symmetry, the distance from least to largest value."""
        low, high = self.code_range
        return float(high - low) / (2 if self.symmetric else 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Float8Scheme:
    """e4m3 under scales of blocks: a scale is the block's largest magnitude / 448.

    Attributes:
        block: rows and columns under one scale, either may be `WHOLE`: (128, 128); (1, WHOLE), "channel"; (WHOLE,
            WHOLE), "tensor". The last block of a row or column may be partial.
        scale: the type that a scale is rounded to, before codes are computed from it.
    """

    block: tuple[int, int] = (1, WHOLE)
    scale: ScaleType = "f32"

    def __post_init__(self) -> None:
        if min(self.block) < 0:
            raise InvalidRequestError(f"A block of {self.block} is none.", "Give rows and columns, 0 for all of them.")
        _check_scale(self.scale)

    def block_of(self, rows: int, features: int) -> tuple[int, int]:
        """Rows and columns of a block in a matrix of that size."""
        return self.block[0] or rows, self.block[1] or features


@dataclass(frozen=True, slots=True)
class Mxfp4Scheme:
    """e2m1 in groups of 32 under a power of two: that of the largest magnitude's exponent, less 2.

    The rule of the OCP microscaling specification (MX, version 1.0), section 6.3: magnitudes above 6 scales, up to 8,
    become 6.
    """

    @property
    def group_size(self) -> int:
        return 32


@dataclass(frozen=True, slots=True)
class Nvfp4Scheme:
    """e2m1 in groups of 16, each under an e4m3 scale, all under one f32 divisor.

    compressed-tensors' rule: the divisor is 6 * 448 / the tensor's largest magnitude, a group's scale its largest
    magnitude / 6 * the divisor, rounded to e4m3.

    Attributes:
        peak: the largest magnitude that the divisor is for; None: the matrix's own. Matrices that an engine multiplies
            as one (q, k and v; gate and up) have to share it: vLLM has one divisor for them.
    """

    peak: float | None = None

    @property
    def group_size(self) -> int:
        return 16


@dataclass(frozen=True, slots=True)
class GgufScheme:
    """Blocks of 32 that GGUF files hold, their scales in f16.

    Attributes:
        name: "q8_0": multiples of the scale within ±127, the scale being the largest magnitude / 127. "q4_0": from -8
            to 7, the scale being the value of largest magnitude / -8, so negative where that is positive: ggml's rule.
            "q4_1": 0 to 15 steps up from a minimum, the group's least value in f16, a step being the distance to the
            largest / 15.
    """

    name: Literal["q8_0", "q4_0", "q4_1"]

    @property
    def group_size(self) -> int:
        return 32

    @property
    def code_range(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return {"q8_0": (-127, 127), "q4_0": (-8, 7), "q4_1": (0, 15)}[self.name]


GGUF_NAMES: Final = ("q8_0", "q4_0", "q4_1")
"""Of the schemes that a GGUF file holds; folders hold all others."""

Scheme = IntegerScheme | Float8Scheme | Mxfp4Scheme | Nvfp4Scheme | GgufScheme

SCHEME_NAMES = (
    "int4-g32, int4-g64, int4-g128 (or any group), int8-channel, int8-g128, each with -asym; fp8-tensor, fp8-channel, "
    "fp8-block; mxfp4, nvfp4; for a GGUF file q8_0, q4_0, q4_1"
)
_INTEGER = re.compile(r"int(4|8)-(?:g([1-9][0-9]{0,5})|channel)(-asym)?")
_FLOAT8 = {"fp8-tensor": (WHOLE, WHOLE), "fp8-channel": (1, WHOLE), "fp8-block": (128, 128)}
_FLOAT4: dict[str, Mxfp4Scheme | Nvfp4Scheme] = {"mxfp4": Mxfp4Scheme(), "nvfp4": Nvfp4Scheme()}


def scheme_named(name: str) -> Scheme:
    """The scheme of a format's name: ``int4-g32``, ``int8-channel``, ``int4-g128-asym``, ``fp8-block``, ``q4_0``.

    Symmetric integers keep within ±(2^(bits-1) - 1); scales are bf16, of fp8 f32. Raises InvalidRequestError.
    """
    if name in _FLOAT4:
        return _FLOAT4[name]
    for gguf_name in GGUF_NAMES:
        if name == gguf_name:
            return GgufScheme(gguf_name)
    if name in _FLOAT8:
        return Float8Scheme(block=_FLOAT8[name])
    found = _INTEGER.fullmatch(name)
    if found is None:
        raise InvalidRequestError(f"Format {name!r} is not known.", f"Use {SCHEME_NAMES}.")
    bits, group, asymmetric = found.groups()
    return IntegerScheme(
        bits=4 if bits == "4" else 8, group_size=int(group) if group else WHOLE, symmetric=asymmetric is None
    )


def group_size_in(scheme: IntegerScheme | Mxfp4Scheme | Nvfp4Scheme | GgufScheme, features: int) -> int:
    """Values under one scale in rows of `features`. Raises InvalidRequestError if they do not divide them."""
    group_size = scheme.group_size or features
    if group_size < 0 or features % group_size:
        sizes = [size for size in (32, 64, 128) if features % size == 0]
        remedy = f"Use one that does ({', '.join(map(str, sizes)) or 'none of 32, 64, 128 does'}), or whole rows."
        raise InvalidRequestError(f"Groups of {group_size} do not divide rows of {features} values.", remedy)
    if isinstance(scheme, IntegerScheme) and scheme.bits == 4 and group_size % 2:
        raise InvalidRequestError(
            f"Groups of {group_size} 4-bit codes fill no whole number of bytes.", "Use an even size, or 8 bits."
        )
    return group_size


def _check_scale(scale: str) -> None:
    if scale not in ("f32", "bf16", "f16"):
        raise InvalidRequestError(f"Scales in {scale!r} are not known.", "Use f32, bf16 or f16.")

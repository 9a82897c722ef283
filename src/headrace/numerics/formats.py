"""The number formats that tensors come in, and one rule for reading each."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from types import MappingProxyType

import numpy as np

from headrace.base.errors import InvalidRequestError
from headrace.numerics import k_quants, legacy_quants, row_blocks
from headrace.numerics.bitfields import Bytes, Float32
from headrace.numerics.float8 import e4m3_to_f32, e8m0_to_f32
from headrace.numerics.rounding import bf16_to_f32, f16_to_f32

_CHUNK_VALUES = 1 << 16
"""Values decoded at a time: few enough that the temporaries of a block format stay in the cache."""


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """How values are stored in the rows of a tensor.

    Attributes:
        name: what `format_named` finds it by; the native kernels use the same names.
        block_size: values per block; a row is a whole number of blocks. 1 for plain values.
        block_bytes: bytes per block.
    """

    name: str
    block_size: int
    block_bytes: int

    def row_bytes(self, features: int) -> int:
        """Bytes of a row of `features` values, which must be a whole number of blocks."""
        assert features % self.block_size == 0, f"{features} values are no whole number of {self.name} blocks"
        return features // self.block_size * self.block_bytes


FORMATS: Mapping[str, NumberFormat] = MappingProxyType(
    {
        number_format.name: number_format
        for number_format in (
            NumberFormat("f32", 1, 4),
            NumberFormat("f16", 1, 2),
            NumberFormat("bf16", 1, 2),
            NumberFormat("q4_0", 32, 18),
            NumberFormat("q4_1", 32, 20),
            NumberFormat("q5_0", 32, 22),
            NumberFormat("q5_1", 32, 24),
            NumberFormat("q8_0", 32, 34),
            NumberFormat("q2_k", 256, 84),
            NumberFormat("q3_k", 256, 110),
            NumberFormat("q4_k", 256, 144),
            NumberFormat("q5_k", 256, 176),
            NumberFormat("q6_k", 256, 210),
        )
    }
)

PARTS: Mapping[str, NumberFormat] = MappingProxyType(
    {
        number_format.name: number_format
        for number_format in (
            NumberFormat("i8", 1, 1),
            NumberFormat("u8", 1, 1),
            NumberFormat("i32", 1, 4),
            NumberFormat("i64", 1, 8),
            NumberFormat("f8_e4m3", 1, 1),
            NumberFormat("f8_e8m0", 1, 1),
        )
    }
)
"""What the codes, scales and zero points of quantized weights are stored in: parts, which are no weights by themselves.
"""

_BLOCK_DECODERS: Mapping[str, Callable[[Bytes], Float32]] = {
    "f16": lambda data: f16_to_f32(data.view("<u2")),
    "bf16": lambda data: bf16_to_f32(data.view("<u2")),
    "q4_0": legacy_quants.decode_q4_0,
    "q4_1": legacy_quants.decode_q4_1,
    "q5_0": legacy_quants.decode_q5_0,
    "q5_1": legacy_quants.decode_q5_1,
    "q8_0": legacy_quants.decode_q8_0,
    "q2_k": k_quants.decode_q2_k,
    "q3_k": k_quants.decode_q3_k,
    "q4_k": k_quants.decode_q4_k,
    "q5_k": k_quants.decode_q5_k,
    "q6_k": k_quants.decode_q6_k,
    "i8": lambda data: data.view(np.int8).astype(np.float32),
    "u8": lambda data: data.astype(np.float32),
    "i32": lambda data: data.view("<i4").astype(np.float32),
    "i64": lambda data: data.view("<i8").astype(np.float32),
    "f8_e4m3": e4m3_to_f32,
    "f8_e8m0": e8m0_to_f32,
}


@lru_cache(maxsize=256)
def format_named(name: str) -> NumberFormat:
    """The number format of that name: one of `FORMATS`, of `PARTS`, or of the family of `row_blocks`.

    Raises InvalidRequestError for any other name.
    """
    if found := FORMATS.get(name) or PARTS.get(name):
        return found
    layout = row_blocks.row_blocks(name)
    if layout is None:
        raise InvalidRequestError(
            f"Number format {name!r} is not known.",
            f"Known: {', '.join(FORMATS)}, mxfp4, nvfp4, names such as int4_g32_bf16, uint4_g128_f16, fp8_g64_f32.",
        )
    return NumberFormat(name, layout.group_size, layout.block_bytes)


def dequantize(number_format: NumberFormat, data: Bytes, shape: tuple[int, ...]) -> Float32:
    """The values of a stored tensor.

    Args:
        number_format: how `data` is to be read.
        data: uint8 ``[rows, bytes per row]``.
        shape: the tensor's shape; its last dimension is a row's number of values.

    Returns:
        float32 of `shape`. For f32 it is a view of `data`, read-only where that is; otherwise it is new.
    """
    features = shape[-1] if shape else 1
    expected = (math.prod(shape[:-1]), number_format.row_bytes(features))
    assert data.shape == expected, f"{number_format.name} data of {data.shape}, not {expected}"
    if number_format.name == "f32":
        return np.ascontiguousarray(data).view("<f4").reshape(shape)
    layout = row_blocks.row_blocks(number_format.name)
    decode = partial(row_blocks.decode, layout) if layout else _BLOCK_DECODERS[number_format.name]
    blocks = np.ascontiguousarray(data).reshape(-1, number_format.block_bytes)
    values = np.empty((len(blocks), number_format.block_size), dtype=np.float32)
    step = max(1, _CHUNK_VALUES // number_format.block_size)
    with np.errstate(over="ignore", invalid="ignore"):  # damaged scales decode to infinities and NaNs, as stored
        for start in range(0, len(blocks), step):
            values[start : start + step] = decode(blocks[start : start + step])
    return values.reshape(shape)

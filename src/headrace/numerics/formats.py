"""The number formats that tensors come in, and one rule for reading each."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from headrace.numerics import k_quants, legacy_quants
from headrace.numerics.bitfields import Bytes, Float32
from headrace.numerics.rounding import bf16_to_f32, f16_to_f32

_CHUNK_VALUES = 1 << 16
"""Values decoded at a time: few enough that the temporaries of a block format stay in the cache."""


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """How values are stored in the rows of a tensor.

    Attributes:
        name: a key of `FORMATS`; the native kernels use the same names.
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
}


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
    decode = _BLOCK_DECODERS[number_format.name]
    blocks = np.ascontiguousarray(data).reshape(-1, number_format.block_bytes)
    values = np.empty((len(blocks), number_format.block_size), dtype=np.float32)
    step = _CHUNK_VALUES // number_format.block_size
    with np.errstate(over="ignore", invalid="ignore"):  # damaged scales decode to infinities and NaNs, as stored
        for start in range(0, len(blocks), step):
            values[start : start + step] = decode(blocks[start : start + step])
    return values.reshape(shape)

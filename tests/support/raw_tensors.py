"""Tensors for tests, in any number format."""

from typing import Any

import numpy as np

from headrace.numerics.formats import FORMATS, format_named
from headrace.numerics.quantize import quantize
from headrace.numerics.rounding import f32_to_bf16, f32_to_f16
from headrace.numerics.row_blocks import row_blocks
from headrace.numerics.schemes import IntegerScheme
from headrace.numerics.tensor import RawTensor

HALF_OFFSETS = {
    "q4_0": [0],
    "q4_1": [0, 2],
    "q5_0": [0],
    "q5_1": [0, 2],
    "q8_0": [0],
    "q2_k": [80, 82],
    "q3_k": [108],
    "q4_k": [0, 2],
    "q5_k": [0, 2],
    "q6_k": [208],
}
"""Where each block format keeps its f16 scales and minimums."""


def quantized(values: np.ndarray[Any, Any], format_name: str) -> RawTensor:
    """Values rounded to a plain format, to integer row blocks, or to one that the gguf package can quantize to (not the
    k-quants)."""
    values = np.ascontiguousarray(values, np.float32)
    if (layout := row_blocks(format_name)) is not None:
        scheme = IntegerScheme(
            bits=layout.bits, group_size=layout.group_size, symmetric=not layout.has_zero_point, scale=layout.scale
        )
        return RawTensor.from_groups(quantize(values, scheme))
    number_format = FORMATS[format_name]
    if format_name == "f32":
        return RawTensor.from_f32(values)
    if format_name in ("f16", "bf16"):
        data = (f32_to_f16 if format_name == "f16" else f32_to_bf16)(values).view(np.uint8)
    else:
        import gguf  # a machine that only tests a GPU may lack it

        data = gguf.quantize(values, gguf.GGMLQuantizationType[format_name.upper()])
    return RawTensor(number_format, values.shape, data.reshape(-1, number_format.row_bytes(values.shape[-1])))


def random_tensor(format_name: str, shape: tuple[int, ...], seed: int = 0) -> RawTensor:
    """A tensor of random bytes in any format, with finite scales (of about 1e-2) so that its values are finite."""
    rng = np.random.default_rng(seed)
    number_format = FORMATS[format_name]
    if number_format.block_size == 1:
        return quantized(rng.normal(size=shape).astype(np.float32), format_name)
    rows, row_bytes = int(np.prod(shape[:-1])), number_format.row_bytes(shape[-1])
    data = rng.integers(0, 256, (rows, row_bytes), np.uint8)
    blocks = data.reshape(-1, number_format.block_bytes)
    for offset in HALF_OFFSETS[format_name]:
        scales = rng.normal(scale=1e-2, size=len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales[:, None].view(np.uint8)
    return RawTensor(number_format, shape, data)


def part(format_name: str, array: np.ndarray[Any, Any]) -> RawTensor:
    """An array of a plain or a part's format (codes as their bytes), as it is stored."""
    stored = format_named(format_name)
    row_bytes = stored.row_bytes(array.shape[-1] if array.ndim else 1)
    return RawTensor(stored, array.shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, row_bytes))

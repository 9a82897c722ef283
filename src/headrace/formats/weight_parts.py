"""From the parts of a quantized weight to row blocks: the arrangements that compressed-tensors and others share.

Each function checks names, types and shapes at once and reads the bytes when the weight is read. Each raises
CheckpointError, naming part and scheme, where these do not fit.
"""

import math
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from headrace.base.errors import UnsupportedModelError
from headrace.formats.quantized_module import FLOATS, QuantizedModule, transcoded
from headrace.numerics.bitfields import Bytes, Float32
from headrace.numerics.float8 import e8m0_to_f32
from headrace.numerics.row_blocks import MXFP4, NVFP4, Groups, RowBlocks, repeat_scales, unpack_nibbles
from headrace.numerics.tensor import RawTensor

Block = tuple[int | None, int | None]
"""Rows and columns that share a scale; None stands for all of them."""

_SIGN = np.uint8(0x80)
T = TypeVar("T", bound=np.generic)


def packed_integers(module: QuantizedModule, bits: int, symmetric: bool, group_size: int | None) -> RawTensor:
    """compressed-tensors' pack-quantized: codes in offset binary, 32 bits' worth in an int32, lowest first.

    ``weight_packed`` i32 ``[out, ceil(in * bits / 32)]``, ``weight_shape`` of the weight, ``weight_scale`` ``[out,
    groups]``, and unless symmetric ``weight_zero_point`` i32 ``[ceil(out * bits / 32), groups]``, packed along the
    outputs.
    """
    rows, features = shape = _stored_shape(module)
    words = -(-features * bits // 32)
    packed = module.shaped("weight_packed", (rows, words), "i32")
    group_size = module.group_size_of(features, group_size)
    scales = module.shaped("weight_scale", (rows, features // group_size), *FLOATS)
    zeros = None
    if not symmetric:
        zero_words = -(-rows * bits // 32)
        zeros = module.shaped("weight_zero_point", (zero_words, features // group_size), "i32")
    layout = integer_layout(module, bits, symmetric, group_size, scales.format.name)

    def read() -> Groups:
        codes = codes_in(packed.data, bits)[:, :features]
        if symmetric and bits == 8:
            codes = codes ^ _SIGN
        by_output = None if zeros is None else codes_in(transposed_words(zeros), bits)[:, :rows].T
        return Groups(layout, codes, scales.to_f32(), by_output)

    return transcoded(layout, shape, read)


def plain_integers(module: QuantizedModule, symmetric: bool, block: Block) -> RawTensor:
    """compressed-tensors' int-quantized: ``weight`` i8, ``weight_scale``, unless symmetric ``weight_zero_point`` i8.

    The last two have one entry per block.
    """
    weight = module.matrix("weight", "i8")
    rows, features = shape = _two(weight)
    block_rows, block_columns = block[0] or rows, block[1] or features
    extents = (-(-rows // block_rows), features // module.group_size_of(features, block_columns))
    scales = _one_per_block(module, "weight_scale", extents, *FLOATS)
    zeros = None if symmetric else _one_per_block(module, "weight_zero_point", extents, "i8")
    layout = integer_layout(module, 8, symmetric, block_columns, scales.format.name)

    def read() -> Groups:
        codes = weight.data if symmetric else weight.data ^ _SIGN
        by_row = None if zeros is None else _by_row(zeros.data.reshape(extents) ^ _SIGN, rows)
        return Groups(layout, codes, _by_row(scales.to_f32().reshape(extents), rows), by_row)

    return transcoded(layout, shape, read)


def float8(module: QuantizedModule, scale_part: str, block: Block) -> RawTensor:
    """``weight`` f8_e4m3 and the factors of its blocks.

    The last block of a row or column may be partial.
    """
    weight = module.matrix("weight", "f8_e4m3")
    rows, features = shape = _two(weight)
    block_rows, block_columns = block[0] or rows, block[1] or features
    extents = (-(-rows // block_rows), -(-features // block_columns))
    formats = (*FLOATS, "f8_e8m0")
    scales = _one_per_block(module, scale_part, extents, *formats)
    stored_scale = scales.format.name if scales.format.name in FLOATS else "f32"
    layout = RowBlocks("fp8", math.gcd(block_columns, features), stored_scale)

    def read() -> Groups:
        by_block = scales.to_f32().reshape(extents)
        return Groups(layout, weight.data, repeat_scales(by_block, (block_rows, block_columns), shape)[1])

    return transcoded(layout, shape, read)


def mxfp4(module: QuantizedModule) -> RawTensor:
    """``weight_packed`` u8, two codes to a byte, that of even index low, and ``weight_scale`` u8, e8m0."""
    packed = module.matrix("weight_packed", "u8")
    rows, features = shape = _nibble_shape(packed)
    groups = features // module.group_size_of(features, MXFP4.group_size)
    scales = module.shaped("weight_scale", (rows, groups), "u8", "f8_e8m0")

    def read() -> Groups:
        return Groups(MXFP4, unpack_nibbles(packed.data), e8m0_to_f32(scales.data))

    return transcoded(MXFP4, shape, read)


def nvfp4(module: QuantizedModule, packed_part: str, tensor_scale_part: str, *, divides: bool) -> RawTensor:
    """Packed codes as in `mxfp4`, ``weight_scale`` f8_e4m3, and the tensor's scale, f32: a factor, or it divides."""
    packed = module.matrix(packed_part, "u8")
    rows, features = shape = _nibble_shape(packed)
    groups = features // module.group_size_of(features, NVFP4.group_size)
    scales = module.shaped("weight_scale", (rows, groups), "f8_e4m3")
    tensor_scale = module.scalar(tensor_scale_part, "f32")

    def read() -> Groups:
        factor = tensor_scale.to_f32().reshape(())
        with np.errstate(all="ignore"):  # a damaged scale shows in the values
            product: Float32 = scales.to_f32() / factor if divides else scales.to_f32() * factor
        return Groups(NVFP4, unpack_nibbles(packed.data), product)

    return transcoded(NVFP4, shape, read)


def integer_layout(
    module: QuantizedModule, bits: int, symmetric: bool, group_size: int, scale_format: str
) -> RowBlocks:
    """The row blocks of integer codes. Raises UnsupportedModelError for an odd number of nibbles."""
    if bits == 4 and group_size % 2:
        raise UnsupportedModelError(
            f"{module.name} ({module.scheme}) has {group_size} 4-bit codes under a scale: no whole number of bytes.",
            "Quantize it to 8 bits, or leave it as it is.",
        )
    return RowBlocks(f"{'' if symmetric else 'u'}int{bits}", group_size, scale_format)


def codes_in(packed: Bytes, bits: int) -> Bytes:
    """Codes of 4 or 8 bits from little-endian words, lowest first: ``[n, bytes]`` to ``[n, bytes * 8 / bits]``."""
    return packed if bits == 8 else unpack_nibbles(packed)


def transposed_words(tensor: RawTensor) -> Bytes:
    """The bytes of a matrix of int32, transposed: ``[columns, 4 * rows]``."""
    return np.ascontiguousarray(tensor.data.view("<u4").T).view(np.uint8)


def _stored_shape(module: QuantizedModule) -> tuple[int, int]:
    stored = module.shaped("weight_shape", (2,), "i64", "i32")
    rows, features = stored.data.view("<i8" if stored.format.name == "i64" else "<i4").reshape(2).tolist()
    if rows < 1 or features < 1 or rows != module.matrix("weight_packed", "i32").shape[0]:
        raise module.error("weight_shape", f"is {rows} by {features}, which its weight_packed is not")
    return rows, features


def _one_per_block(module: QuantizedModule, part: str, extents: tuple[int, int], *formats: str) -> RawTensor:
    return module.scalar(part, *formats) if extents == (1, 1) else module.shaped(part, extents, *formats)


def _by_row(entries: npt.NDArray[T], rows: int) -> npt.NDArray[T]:
    """One row of entries, or one per row, as one per row."""
    return np.broadcast_to(entries, (rows, entries.shape[1]))


def _two(tensor: RawTensor) -> tuple[int, int]:
    rows, features = tensor.shape
    return rows, features


def _nibble_shape(packed: RawTensor) -> tuple[int, int]:
    rows, num_bytes = packed.shape
    return rows, 2 * num_bytes

"""Row blocks: groups of codes under one scale, the one form that quantized checkpoints of every kind are read into.

A row is consecutive blocks without padding, a block is one group of a row, and a group is either some of a row's
values or all of them ("channel"). The fields of a block, without padding between them:

    scale       little-endian f16, bf16 (2 bytes) or f32 (4); e8m0 (1) in mxfp4
    zero point  1 byte, unsigned; only in uint4 and uint8
    codes       8 bits each; or 4 bits each, two to a byte, that of even index in the low nibble

    format                          codes                             block bytes
    int4_g{group}_{f16|bf16|f32}    offset binary: 0 to 15 are -8..7  scale + group / 2
    uint4_g{group}_{f16|bf16|f32}   0 to 15                           scale + 1 + group / 2
    int8_g{group}_{f16|bf16|f32}    two's complement, -128 to 127     scale + group
    uint8_g{group}_{f16|bf16|f32}   0 to 255                          scale + 1 + group
    fp8_g{group}_{f16|bf16|f32}     e4m3 (`float8`)                   scale + group
    mxfp4                           e2m1 (`float4`), groups of 32     1 + 16
    nvfp4                           e2m1 (`float4`), groups of 16     4 + 8; the scale is f32

A 4-bit group has an even size. A value is (code - zero point) * scale: the difference (a small integer) and the scale
are exact in float32, and their product is rounded once.

nvfp4 files hold an e4m3 scale per group and an f32 one per tensor. Here the two are multiplied out, since checkpoints
disagree about how (ModelOpt multiplies by the latter, compressed-tensors divides by its inverse): f32 holds either
result exactly, and the e4m3 scale alone could not.

Groups of GGUF's q4_1 (`MINIMA`) are no row blocks: they are packed as GGUF has them (`gguf_blocks`). A value is code *
scale + minimum, product and sum rounded one by one.
"""

import math
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from headrace.numerics.bitfields import Bytes, Float32
from headrace.numerics.float4 import E2M1_VALUES
from headrace.numerics.float8 import E4M3_VALUES, e8m0_to_f32, f32_to_e8m0
from headrace.numerics.rounding import bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16

_CODE_VALUES = {
    "int4": np.arange(-8, 8, dtype=np.float32),
    "uint4": np.arange(16, dtype=np.float32),
    "int8": np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32),
    "uint8": np.arange(256, dtype=np.float32),
    "fp8": E4M3_VALUES,
    "fp4": E2M1_VALUES,
    "above4": np.arange(16, dtype=np.float32),
}
_SCALE_BYTES = {"f16": 2, "bf16": 2, "f32": 4, "e8m0": 1}
_NAME = re.compile(r"(u?int[48]|fp8)_g([1-9][0-9]{0,8})_(f16|bf16|f32)")


@dataclass(frozen=True, slots=True)
class RowBlocks:
    """One layout of the family.

    Attributes:
        element: int4, uint4, int8, uint8, fp8, fp4, or above4 (steps up from a minimum): what a code means.
        group_size: values under one scale.
        scale: f16, bf16, f32 or e8m0: how a scale is stored.
    """

    element: str
    group_size: int
    scale: str

    def __post_init__(self) -> None:
        assert self.element in _CODE_VALUES, self.element
        assert self.scale in _SCALE_BYTES, self.scale
        assert self.group_size > 0, "an empty group"
        assert self.bits == 8 or self.group_size % 2 == 0, f"{self.group_size} nibbles fill no whole number of bytes"

    @property
    def name(self) -> str:
        """The name of the number format."""
        return _NAMES.get(self) or f"{self.element}_g{self.group_size}_{self.scale}"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4 if self.element.endswith("4") else 8

    @property
    def has_zero_point(self) -> bool:
        return self.element.startswith("uint")

    @property
    def has_minimum(self) -> bool:
        return self.element == "above4"

    @property
    def codes_at(self) -> int:
        """Where in a block its codes begin."""
        return _SCALE_BYTES[self.scale] + self.has_zero_point

    @property
    def block_bytes(self) -> int:
        return self.codes_at + self.group_size * self.bits // 8


MXFP4 = RowBlocks("fp4", 32, "e8m0")
NVFP4 = RowBlocks("fp4", 16, "f32")
MINIMA = RowBlocks("above4", 32, "f16")
_NAMES = {MXFP4: "mxfp4", NVFP4: "nvfp4"}


@lru_cache(maxsize=256)
def row_blocks(name: str) -> RowBlocks | None:
    """The layout of a number format's name; None for a name that is not of this family."""
    for layout, layout_name in _NAMES.items():
        if name == layout_name:
            return layout
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    element, group_size, scale = found.groups()
    if element.endswith("4") and int(group_size) % 2:
        return None
    return RowBlocks(element, int(group_size), scale)


@dataclass(frozen=True, slots=True)
class Groups:
    """A quantized matrix before it is packed.

    Attributes:
        layout: what the codes mean and how the scales are stored.
        codes: uint8 ``[rows, features]``, as a block stores them (int8 codes as their bytes), 4-bit ones unpacked.
        scales: float32 ``[rows, groups]``, each a value of the layout's scale type.
        zeros: uint8 ``[rows, groups]`` where the layout has zero points, else None.
        minima: float32 ``[rows, groups]`` where the layout has minima, each a value of its scale type, else None.
    """

    layout: RowBlocks
    codes: Bytes
    scales: Float32
    zeros: Bytes | None = None
    minima: Float32 | None = None

    def __post_init__(self) -> None:
        rows, features = self.codes.shape
        groups = (rows, features // self.layout.group_size)
        assert features % self.layout.group_size == 0, f"{features} values in groups of {self.layout.group_size}"
        assert self.scales.shape == groups, f"scales of {self.scales.shape}, not {groups}"
        assert (self.zeros is not None) == self.layout.has_zero_point
        assert self.zeros is None or self.zeros.shape == groups, "zero points of another shape than the scales"
        assert (self.minima is not None) == self.layout.has_minimum
        assert self.minima is None or self.minima.shape == groups, "minima of another shape than the scales"

    def to_f32(self) -> Float32:
        """The values, float32 ``[rows, features]``."""
        codes = self.codes.reshape(-1, self.layout.group_size)
        zeros = None if self.zeros is None else self.zeros.reshape(-1, 1)
        values = _values(self.layout, codes, self.scales.reshape(-1, 1), zeros)
        if self.minima is not None:
            values += self.minima.reshape(-1, 1)
        return values.reshape(self.codes.shape)

    def encode(self) -> Bytes:
        """The matrix in row blocks, uint8 ``[rows, bytes per row]``."""
        layout = self.layout
        assert not layout.has_minimum, "no row block has room for minima"
        blocks = np.empty((self.scales.size, layout.block_bytes), np.uint8)
        scale_bytes = _SCALE_BYTES[layout.scale]
        blocks[:, :scale_bytes] = _stored_scales(layout.scale, self.scales.reshape(-1, 1))
        if self.zeros is not None:
            blocks[:, scale_bytes] = self.zeros.reshape(-1)
        codes = self.codes.reshape(-1, layout.group_size)
        blocks[:, layout.codes_at :] = codes if layout.bits == 8 else pack_nibbles(codes)
        return blocks.reshape(len(self.codes), -1)


def decode(layout: RowBlocks, blocks: Bytes) -> Float32:
    """The values of blocks ``[n, block_bytes]``, float32 ``[n, group_size]``."""
    return groups_in(layout, blocks).to_f32()


def groups_in(layout: RowBlocks, stored: Bytes) -> Groups:
    """The inverse of `Groups.encode`: codes, scales and zero points of rows, uint8 ``[rows, bytes per row]``."""
    rows = len(stored)
    blocks = stored.reshape(-1, layout.block_bytes)
    scale_bytes = _SCALE_BYTES[layout.scale]
    scales = _read_scales(layout.scale, np.ascontiguousarray(blocks[:, :scale_bytes])).reshape(rows, -1)
    zeros = blocks[:, scale_bytes].reshape(rows, -1) if layout.has_zero_point else None
    packed = blocks[:, layout.codes_at :]
    codes = packed if layout.bits == 8 else unpack_nibbles(packed)
    return Groups(layout, codes.reshape(rows, -1), scales, zeros)


def pack_nibbles(codes: Bytes) -> Bytes:
    """Two 4-bit codes to a byte, that of even index in the low nibble: ``[..., 2n]`` to ``[..., n]``."""
    return codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))


def unpack_nibbles(packed: Bytes) -> Bytes:
    """The inverse of `pack_nibbles`."""
    return np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1).reshape(*packed.shape[:-1], -1)


def repeat_scales(scales: Float32, block: tuple[int, int], shape: tuple[int, int]) -> tuple[int, Float32]:
    """Scales of two-dimensional blocks as scales of groups of each row: the same values.

    Args:
        scales: float32 ``[row blocks, column blocks]``; the last of either may be partial.
        block: rows and columns of a block.
        shape: rows and features of the matrix.

    Returns:
        The group size, which divides the features, and scales, float32 ``[rows, groups]``.
    """
    rows, features = shape
    block_rows, block_columns = block
    assert scales.shape == (-(-rows // block_rows), -(-features // block_columns))
    group_size = math.gcd(block_columns, features)
    by_row = np.repeat(scales, block_rows, axis=0)[:rows]
    return group_size, np.repeat(by_row, block_columns // group_size, axis=1)[:, : features // group_size]


def _values(layout: RowBlocks, codes: Bytes, scales: Float32, zeros: Bytes | None) -> Float32:
    values = _CODE_VALUES[layout.element][codes]
    if zeros is not None:
        values -= zeros.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # damaged scales decode to infinities and NaNs, as stored
        values *= scales
    return values


def _stored_scales(scale: str, scales: Float32) -> Bytes:
    match scale:
        case "bf16":
            stored = f32_to_bf16(scales).view(np.uint8)
        case "f16":
            stored = f32_to_f16(scales).view(np.uint8)
        case "f32":
            stored = np.ascontiguousarray(scales, "<f4").view(np.uint8)
        case _:
            stored = f32_to_e8m0(scales)
    assert np.array_equal(_read_scales(scale, stored), scales, equal_nan=True), f"a scale is no {scale}"
    return stored


def _read_scales(scale: str, stored: Bytes) -> Float32:
    match scale:
        case "bf16":
            return bf16_to_f32(stored.view("<u2"))
        case "f16":
            return f16_to_f32(stored.view("<u2"))
        case "f32":
            return stored.view("<f4")
    return e8m0_to_f32(stored)

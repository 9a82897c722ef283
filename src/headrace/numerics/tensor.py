"""A tensor as a checkpoint holds it: bytes in a number format, usually memory-mapped, not yet decoded."""

import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.numerics.formats import FORMATS, NumberFormat, dequantize, format_named
from headrace.numerics.rounding import f32_to_bf16, f32_to_f16
from headrace.numerics.row_blocks import Groups


@dataclass(frozen=True, slots=True)
class RawTensor:
    """Bytes and how to read them.

    Attributes:
        format: the number format of the bytes.
        shape: logical shape, outermost first (``[out_features, in_features]``).
        source: the bytes, uint8, C-contiguous, ``[rows, bytes per row]`` with rows = the product of all but the last
            dimension; or a function that makes them, where a file holds them in another arrangement. May be a read-only
            view of a memory-mapped file: keep the tensor alive while the bytes are in use.
        interleaved_heads: if not 0, the first dimension is that of so many heads, and each head's entries are stored as
            rotary pairs: entries 2i, 2i + 1 are those that stand at i, i + head_dim / 2.
    """

    format: NumberFormat
    shape: tuple[int, ...]
    source: npt.NDArray[np.uint8] | Callable[[], npt.NDArray[np.uint8]]
    interleaved_heads: int = 0

    @property
    def stored(self) -> npt.NDArray[np.uint8]:
        """The bytes as they are stored. Made anew on each call where `source` is a function: ask once, and let go."""
        return self.source() if callable(self.source) else self.source

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        """The bytes in the order of `shape`: `stored` itself, or a copy of it where heads are interleaved."""
        stored = self.stored
        if not self.interleaved_heads:
            return stored
        paired = stored.reshape(self.interleaved_heads, self.shape[0] // self.interleaved_heads // 2, 2, -1)
        return paired.swapaxes(1, 2).reshape(stored.shape)

    @classmethod
    def from_f32(cls, values: npt.NDArray[np.float32]) -> "RawTensor":
        """A tensor that holds these values as they are, in f32. Contiguous values are viewed, not copied."""
        features = values.shape[-1] if values.ndim else 1
        rows = math.prod(values.shape[:-1])
        data = np.ascontiguousarray(values, dtype="<f4").reshape(rows, features).view(np.uint8)
        return cls(FORMATS["f32"], values.shape, data)

    @classmethod
    def from_groups(cls, groups: Groups) -> "RawTensor":
        """A quantized matrix in row blocks."""
        return cls(format_named(groups.layout.name), groups.codes.shape, groups.encode())

    def rows(self, chosen: slice | npt.NDArray[np.int64]) -> "RawTensor":
        """Some rows of a matrix, in the same format."""
        data = self.data[chosen]
        return RawTensor(self.format, (len(data), self.shape[-1]), data)

    def in_plain(self, name: str) -> "RawTensor":
        """The same tensor in f32, bf16 or f16, each value rounded to the nearest; itself if it is so already."""
        if self.format.name == name:
            return self
        exact = RawTensor.from_f32(self.to_f32())
        if name == "f32":
            return exact
        bits = {"bf16": f32_to_bf16, "f16": f32_to_f16}[name](exact.data.view(np.float32))
        return RawTensor(FORMATS[name], self.shape, bits.view(np.uint8))

    @property
    def num_bytes(self) -> int:
        features = self.shape[-1] if self.shape else 1
        return math.prod(self.shape[:-1]) * self.format.row_bytes(features)

    @property
    def is_mapped(self) -> bool:
        """Whether the bytes are those of a mapped file, and so can leave memory and come back."""
        base: object = self.source
        while isinstance(base, np.ndarray):
            base = base.base
        return isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)

    def to_f32(self) -> npt.NDArray[np.float32]:
        """The values, exactly as the format defines them, as float32 of `shape`."""
        return dequantize(self.format, self.data, self.shape)

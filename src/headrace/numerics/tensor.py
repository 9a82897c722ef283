"""A tensor as a checkpoint holds it: bytes in a number format, usually memory-mapped, not yet decoded."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.numerics.formats import FORMATS, NumberFormat, dequantize


@dataclass(frozen=True, slots=True)
class RawTensor:
    """Bytes and how to read them.

    Attributes:
        format: the number format of `data`.
        shape: logical shape, outermost first (``[out_features, in_features]``).
        data: uint8, C-contiguous, ``[rows, bytes per row]`` with rows = the product of all but the last dimension.
            May be a read-only view of a memory-mapped file: keep the tensor alive while the bytes are in use.
    """

    format: NumberFormat
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]

    @classmethod
    def from_f32(cls, values: npt.NDArray[np.float32]) -> "RawTensor":
        """A tensor that holds these values as they are, in f32. Contiguous values are viewed, not copied."""
        features = values.shape[-1] if values.ndim else 1
        rows = math.prod(values.shape[:-1])
        data = np.ascontiguousarray(values, dtype="<f4").reshape(rows, features).view(np.uint8)
        return cls(FORMATS["f32"], values.shape, data)

    @property
    def num_bytes(self) -> int:
        return int(self.data.nbytes)

    def to_f32(self) -> npt.NDArray[np.float32]:
        """The values, exactly as the format defines them, as float32 of `shape`."""
        return dequantize(self.format, self.data, self.shape)

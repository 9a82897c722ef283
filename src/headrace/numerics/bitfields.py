"""Taking apart packed integers, for every block format that stores values narrower than a byte."""

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]


def unpack_fields(packed: Bytes, bits: int, count: int) -> Bytes:
    """The `count` lowest fields of `bits` bits of each byte, lowest first: ``[..., m]`` to ``[..., count, m]``."""
    shifts = np.arange(count, dtype=np.uint8)[:, None] * np.uint8(bits)
    return (packed[..., None, :] >> shifts) & np.uint8((1 << bits) - 1)


def half_at(blocks: Bytes, offset: int) -> Float32:
    """The little-endian binary16 that every block ``[n, block_bytes]`` holds at a byte offset: float32 ``[n, 1]``."""
    return blocks[:, offset : offset + 2].view("<f2").astype(np.float32)

"""GGML's first family of block formats: 32 values, one scale, in q*_1 also one minimum.

Layouts follow ``block_q*`` in ggml's ``ggml-common.h``. Each function takes blocks ``uint8 [n, block_bytes]`` and gives
their values ``float32 [n, 32]``. Products and sums are rounded one by one (no fused multiply-add): that is the rule
which the kernels are held to.
"""

import numpy as np

from headrace.numerics.bitfields import Bytes, Float32, half_at, unpack_fields


def _nibbles(qs: Bytes) -> Bytes:
    """Low nibbles are values 0 to 15 of a block, high nibbles are values 16 to 31."""
    return unpack_fields(qs, bits=4, count=2).reshape(-1, 32)


def _fifth_bits(qh: Bytes) -> Bytes:
    """Bit 4 of each value of a block, in its place."""
    return np.unpackbits(qh, axis=-1, bitorder="little") << np.uint8(4)


def decode_q4_0(blocks: Bytes) -> Float32:
    """Bytes: scale (f16), 16 of nibbles. value = scale * (q - 8)."""
    q = _nibbles(blocks[:, 2:18]).astype(np.float32) - np.float32(8)
    return half_at(blocks, 0) * q


def decode_q4_1(blocks: Bytes) -> Float32:
    """Bytes: scale (f16), minimum (f16), 16 of nibbles. value = scale * q + minimum."""
    q = _nibbles(blocks[:, 4:20]).astype(np.float32)
    return half_at(blocks, 0) * q + half_at(blocks, 2)


def decode_q5_0(blocks: Bytes) -> Float32:
    """Bytes: scale (f16), 4 of fifth bits, 16 of nibbles. value = scale * (q - 16)."""
    q = (_nibbles(blocks[:, 6:22]) | _fifth_bits(blocks[:, 2:6])).astype(np.float32) - np.float32(16)
    return half_at(blocks, 0) * q


def decode_q5_1(blocks: Bytes) -> Float32:
    """Bytes: scale (f16), minimum (f16), 4 of fifth bits, 16 of nibbles. value = scale * q + minimum."""
    q = (_nibbles(blocks[:, 8:24]) | _fifth_bits(blocks[:, 4:8])).astype(np.float32)
    return half_at(blocks, 0) * q + half_at(blocks, 2)


def decode_q8_0(blocks: Bytes) -> Float32:
    """Bytes: scale (f16), 32 of int8. value = scale * q."""
    return half_at(blocks, 0) * blocks[:, 2:34].view(np.int8).astype(np.float32)

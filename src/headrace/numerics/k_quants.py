"""GGML's k-quants: super-blocks of 256 values, whose sub-blocks have small integer scales under one f16 scale.

Layouts follow ``block_q*_K`` in ggml's ``ggml-common.h``. Each function takes blocks ``uint8 [n, block_bytes]`` and
gives their values ``float32 [n, 256]``. Products and sums are rounded one by one (no fused multiply-add), in the order
written: that is the rule which the kernels are held to.
"""

import numpy as np

from headrace.numerics.bitfields import Bytes, Float32, half_at, unpack_fields

BLOCK_SIZE = 256


def decode_q2_k(blocks: Bytes) -> Float32:
    """Bytes: 16 of 4-bit (scale, minimum) pairs, 64 of 2-bit values, scale of scales (f16), scale of minimums (f16)."""
    pairs = blocks[:, 0:16]
    scales = half_at(blocks, 80) * (pairs & np.uint8(15)).astype(np.float32)
    minimums = half_at(blocks, 82) * (pairs >> np.uint8(4)).astype(np.float32)
    # 2 runs of 32 bytes, 4 values to a byte: a run's fields are 4 consecutive runs of 32 values.
    q = unpack_fields(blocks[:, 16:80].reshape(-1, 2, 32), bits=2, count=4).reshape(-1, 16, 16).astype(np.float32)
    return (scales[:, :, None] * q - minimums[:, :, None]).reshape(-1, BLOCK_SIZE)


def decode_q3_k(blocks: Bytes) -> Float32:
    """Bytes: 32 of third bits (inverted), 64 of low bits, 12 of 6-bit scales, scale of scales (f16)."""
    scales: Float32 = half_at(blocks, 108) * (_q3_scales(blocks[:, 96:108]).astype(np.float32) - np.float32(32))
    low = unpack_fields(blocks[:, 32:96].reshape(-1, 2, 32), bits=2, count=4).reshape(-1, 16, 16)
    high = unpack_fields(blocks[:, 0:32], bits=1, count=8).reshape(-1, 16, 16)
    q = (low | (high << np.uint8(2))).astype(np.float32) - np.float32(4)
    return (scales[:, :, None] * q).reshape(-1, BLOCK_SIZE)


def decode_q4_k(blocks: Bytes) -> Float32:
    """Bytes: scale of scales (f16), scale of minimums (f16), 12 of 6-bit scales and minimums, 128 of nibbles."""
    scales, minimums = _scaled_pairs(blocks)
    q = unpack_fields(blocks[:, 16:144].reshape(-1, 4, 32), bits=4, count=2).reshape(-1, 8, 32).astype(np.float32)
    return (scales[:, :, None] * q - minimums[:, :, None]).reshape(-1, BLOCK_SIZE)


def decode_q5_k(blocks: Bytes) -> Float32:
    """Bytes: as q4_k, with 32 of fifth bits before the nibbles."""
    scales, minimums = _scaled_pairs(blocks)
    low = unpack_fields(blocks[:, 48:176].reshape(-1, 4, 32), bits=4, count=2).reshape(-1, 8, 32)
    high = unpack_fields(blocks[:, 16:48], bits=1, count=8)
    q = (low | (high << np.uint8(4))).astype(np.float32)
    return (scales[:, :, None] * q - minimums[:, :, None]).reshape(-1, BLOCK_SIZE)


def decode_q6_k(blocks: Bytes) -> Float32:
    """Bytes: 128 of low nibbles, 64 of high bit pairs, 16 of int8 scales, scale of scales (f16)."""
    scales = half_at(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    low = unpack_fields(blocks[:, 0:128].reshape(-1, 2, 64), bits=4, count=2).reshape(-1, 16, 16)
    high = unpack_fields(blocks[:, 128:192].reshape(-1, 2, 32), bits=2, count=4).reshape(-1, 16, 16)
    q = (low | (high << np.uint8(4))).astype(np.float32) - np.float32(32)
    return (scales[:, :, None] * q).reshape(-1, BLOCK_SIZE)


def _q3_scales(packed: Bytes) -> Bytes:
    """16 scales of 6 bits: bytes 0 to 7 hold the low nibbles, bytes 8 to 11 the high pairs; both lowest field first."""
    low = unpack_fields(packed[:, 0:8], bits=4, count=2).reshape(-1, 16)
    high = unpack_fields(packed[:, 8:12], bits=2, count=4).reshape(-1, 16)
    return low | (high << np.uint8(4))


def _scaled_pairs(blocks: Bytes) -> tuple[Float32, Float32]:
    """Scales and minimums of the 8 sub-blocks of q4_k and q5_k, float32 ``[n, 8]`` each.

    Sub-blocks 0 to 3 have their 6 bits in one byte: scales in bytes 0 to 3, minimums in bytes 4 to 7. The two top
    bits of those bytes are the top bits of sub-blocks 4 to 7, whose low nibbles share bytes 8 to 11.
    """
    first_scales, first_minimums, low = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    top = np.uint8(0x30)
    scales = np.concatenate([first_scales & np.uint8(63), (low & np.uint8(15)) | ((first_scales >> 2) & top)], axis=1)
    minimums = np.concatenate([first_minimums & np.uint8(63), (low >> 4) | ((first_minimums >> 2) & top)], axis=1)
    return half_at(blocks, 0) * scales.astype(np.float32), half_at(blocks, 2) * minimums.astype(np.float32)

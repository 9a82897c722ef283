"""Rotation by a Hadamard matrix: it keeps dot products, and spreads what is large in one feature over many.

Keys that have large values in few channels lose less when they are rounded after such a rotation (QuaRot,
arXiv:2404.00456); queries are rotated alike, so that their products stay what they were.
"""

import math

import numpy as np

from headrace.numerics.rounding import Float32


def rotate(values: Float32) -> Float32:
    """Each run along the last axis times Sylvester's Hadamard matrix, divided by the root of its size.

    The size is the largest power of two that divides the run; a longer run is several, each by itself. Additions in
    float32, of halves, then of quarters, ...: the same bits wherever they are computed. Applied twice it gives back
    the values, to rounding.

    Args:
        values: float32 ``[..., n]``.
    """
    features = values.shape[-1]
    size = features & -features
    rotated = np.ascontiguousarray(values, dtype=np.float32)
    half = size // 2
    while half >= 1:
        pairs = rotated.reshape(*values.shape[:-1], -1, 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        rotated = np.stack([first + second, first - second], axis=-2)
        half //= 2
    return rotated.reshape(values.shape) * np.float32(1 / math.sqrt(size))

"""Rounding float32 to 8-bit integers that share a scale, symmetric around zero."""

import numpy as np
import numpy.typing as npt

from headrace.numerics.rounding import Float32, nearest_multiples

Int8 = npt.NDArray[np.int8]
LARGEST = np.float32(127)


def quantize_int8(values: Float32) -> tuple[Int8, Float32]:
    """Each run along the last axis as multiples of one scale: ``values ≈ codes * scales[..., None]``.

    The scale is the largest magnitude / 127, a code the nearest multiple, ties to even. A run that holds an infinity or
    a NaN gets the scale NaN, so that the damage shows.

    Args:
        values: float32 ``[..., n]``.

    Returns:
        codes, int8 ``[..., n]``, and scales, float32 ``[...]``.
    """
    values = np.asarray(values, dtype=np.float32)
    peaks = np.abs(values).max(axis=-1)
    scales = np.where(np.isfinite(peaks), peaks / LARGEST, np.float32(np.nan))
    multiples = nearest_multiples(values, scales[..., None])
    return multiples.clip(-LARGEST, LARGEST).astype(np.int8), scales


def dequantize_int8(codes: Int8, scales: Float32) -> Float32:
    """The value of each code, rounded to float32."""
    return codes.astype(np.float32) * scales[..., None]

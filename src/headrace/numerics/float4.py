"""The 4-bit float of mxfp4 and nvfp4: e2m1 of the OCP microscaling specification (MX, version 1.0).

One bit of sign, two of exponent with bias 1, one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. It has
neither infinities nor NaNs.
"""

import numpy as np

from headrace.numerics.bitfields import Bytes, Float32

E2M1_MAX = np.float32(6)
E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The value of each code, float32 ``[16]``."""

_TIES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)
E2M1_BOUNDS = np.where(np.arange(7) % 2 == 0, _TIES, np.nextafter(_TIES, np.float32(0)))
"""A magnitude's code is how many of these lie below it: a tie goes to the even code beside it."""


def f32_to_e2m1(values: Float32) -> Bytes:
    """The code of the nearest value, ties to even, sign of zero kept. What is larger than 6 becomes 6, a NaN too."""
    magnitudes = np.abs(values)
    codes = np.searchsorted(E2M1_BOUNDS, magnitudes, side="left").astype(np.uint8)
    return codes | (np.signbit(values).astype(np.uint8) << np.uint8(3))


def e2m1_to_f32(codes: Bytes) -> Float32:
    """The exact value of each code."""
    return E2M1_VALUES[codes]

"""The 8-bit floats of quantized weights: e4m3 for values and scales, e8m0 for scales that are powers of two.

e4m3 is the "fn" kind of the OCP 8-bit floating point specification (OFP8, revision 1.0): 4 bits of exponent with bias
7, no infinities, NaN at 0x7F and 0xFF, largest value 448. e8m0 is that of the OCP microscaling specification (MX,
version 1.0): 2^(code - 127), NaN at 255.
"""

import numpy as np

from headrace.numerics.bitfields import Bytes, Float32

E4M3_MAX = np.float32(448)
_E4M3_NAN = 0x7F
_E8M0_NAN = 0xFF
_E8M0_BIAS = 127


def _e4m3_values() -> Float32:
    codes = np.arange(128)
    exponents, mantissas = codes >> 3, codes & 7
    magnitudes = np.where(exponents == 0, mantissas * 2.0**-9, (8 + mantissas) * 2.0 ** (exponents - 10.0))
    magnitudes[_E4M3_NAN] = np.nan
    return np.concatenate([magnitudes, -magnitudes]).astype(np.float32)


E4M3_VALUES = _e4m3_values()
"""The value of each e4m3 code, float32 ``[256]``."""

E8M0_VALUES = np.append(np.ldexp(1.0, np.arange(255) - _E8M0_BIAS), np.nan).astype(np.float32)
"""The value of each e8m0 code, float32 ``[256]``; that of code 0 is a denormal."""


def f32_to_e4m3(values: Float32) -> Bytes:
    """The code of the nearest e4m3 value, ties to even. What is larger than 448 becomes 448; a NaN stays one."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    magnitude_bits = np.minimum(bits & np.uint32(0x7FFFFFFF), E4M3_MAX.view(np.uint32))
    # As for bf16: just under half of the last kept bit, plus that bit. 120 is the difference of the exponents' biases.
    kept = (magnitude_bits + (np.uint32(0x7FFFF) + ((magnitude_bits >> np.uint32(20)) & np.uint32(1)))) >> np.uint32(20)
    normal = kept.astype(np.int32) - (120 << 3)
    magnitudes = magnitude_bits.view(np.float32)
    denormal = np.rint(magnitudes * np.float32(2.0**9)).astype(np.int32)
    codes = np.where(magnitudes < np.float32(2.0**-6), denormal, normal)
    codes = np.where(np.isnan(values), _E4M3_NAN, codes)
    return codes.astype(np.uint8) | ((bits >> np.uint32(24)) & np.uint32(0x80)).astype(np.uint8)


def e4m3_to_f32(codes: Bytes) -> Float32:
    """The exact value of each e4m3 code."""
    return E4M3_VALUES[codes]


def f32_to_e8m0(scales: Float32) -> Bytes:
    """The code of each scale, which must be a power of two from 2^-127 to 2^127, or NaN."""
    is_nan = np.isnan(scales)
    mantissas, exponents = np.frexp(np.where(is_nan, np.float32(1), scales))
    codes = exponents.astype(np.int32) - 1 + _E8M0_BIAS
    assert (mantissas == 0.5).all(), "a scale is no power of two"
    assert ((codes >= 0) & (codes < _E8M0_NAN)).all(), "a scale is out of e8m0's range"
    return np.where(is_nan, _E8M0_NAN, codes).astype(np.uint8)


def e8m0_to_f32(codes: Bytes) -> Float32:
    """The exact value of each e8m0 code."""
    return E8M0_VALUES[codes]

"""Rounding float32 to the 16-bit formats, and back: to the nearest value, ties to the one with an even last bit."""

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Bits16 = npt.NDArray[np.uint16]


def f32_to_bf16(values: Float32) -> Bits16:
    """The bits of the nearest bf16. Overflow gives infinity; a NaN stays one (made quiet); denormals are kept."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # Adding just under half of the last kept bit, plus that bit, carries exactly when rounding goes up. It cannot wrap:
    # only NaNs come near the top of the range, and they are replaced below.
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, quiet, rounded).astype(np.uint16)


def bf16_to_f32(bits: Bits16) -> Float32:
    """The exact value of each bf16."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_f16(values: Float32) -> Bits16:
    """The bits of the nearest binary16. Overflow gives infinity; denormals are kept."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(values, dtype=np.float32).astype(np.float16).view(np.uint16)


def f16_to_f32(bits: Bits16) -> Float32:
    """The exact value of each binary16."""
    return bits.view(np.float16).astype(np.float32)


def nearest_multiples(values: Float32, scales: Float32) -> Float32:
    """How many times its scale each value is, rounded to a whole number, ties to even: both steps in float32.

    0 where the scale is 0 or not a number. May be infinite: a scale that was rounded to a denormal can be too small for
    what it scales.
    """
    return np.rint(quotients(values, scales))


def quotients(values: Float32, scales: Float32) -> Float32:
    """Each value divided by its scale, rounded to float32; 0 where the scale is 0 or not a number."""
    usable = scales > 0
    with np.errstate(over="ignore"):
        return np.divide(np.where(usable, values, np.float32(0)), np.where(usable, scales, np.float32(1)))


def round_to(dtype: str, values: Float32) -> Float32:
    """The nearest values of a plain format (f32, bf16, f16), as float32. What overflows becomes infinite."""
    match dtype:
        case "bf16":
            return bf16_to_f32(f32_to_bf16(values))
        case "f16":
            return f16_to_f32(f32_to_f16(values))
    assert dtype == "f32", f"{dtype} is no plain format"
    return values

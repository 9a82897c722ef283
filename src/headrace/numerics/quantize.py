"""Rounding a matrix to a quantization scheme: the one rule per format that packing, training and reference share.

In every scheme: a scale is computed in float32 and rounded to its own type, then a code is the nearest multiple of that
scale (of the distance to the minimum, where groups have one), ties to even, clipped to the codes there are. A group of
zeros, or of values so small that its scale rounds to zero, is zero; or its minimum. A group that holds an infinity or a
NaN, or whose scale overflows its type, gets the scale NaN, so that the damage shows and stays within the group.
Outliers need no rule: they set their group's scale.
"""

import numpy as np

from headrace.base.errors import InvalidRequestError
from headrace.numerics.bitfields import Bytes, Float32
from headrace.numerics.float4 import E2M1_MAX, f32_to_e2m1
from headrace.numerics.float8 import E4M3_MAX, e4m3_to_f32, f32_to_e4m3
from headrace.numerics.rounding import nearest_multiples, quotients, round_to
from headrace.numerics.row_blocks import MINIMA, MXFP4, NVFP4, Groups, RowBlocks, repeat_scales
from headrace.numerics.schemes import (
    Float8Scheme,
    GgufScheme,
    IntegerScheme,
    Mxfp4Scheme,
    Nvfp4Scheme,
    Scheme,
    group_size_in,
)

_NAN = np.float32(np.nan)


def quantize(values: Float32, scheme: Scheme) -> Groups:
    """Round a matrix, float32 ``[rows, features]``.

    Raises InvalidRequestError for an empty or no matrix, or for groups that do not divide its rows.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    if values.ndim != 2 or values.size == 0:
        raise InvalidRequestError(f"Values of shape {list(values.shape)} are no matrix.", "Quantize matrices only.")
    match scheme:
        case IntegerScheme(symmetric=True):
            return _symmetric(values, scheme)
        case IntegerScheme():
            return _asymmetric(values, scheme)
        case Float8Scheme():
            return _float8(values, scheme)
        case Mxfp4Scheme():
            return _mxfp4(values)
        case Nvfp4Scheme():
            return nvfp4_groups(values, *nvfp4_scales(values, scheme))
        case GgufScheme(name="q8_0"):
            return _symmetric(values, IntegerScheme(bits=8, group_size=scheme.group_size, scale="f16"))
        case GgufScheme(name="q4_0"):
            return _down_to_minus_eight(values, scheme)
        case GgufScheme():
            return _above_minima(values, scheme)


def nvfp4_scales(values: Float32, scheme: Nvfp4Scheme) -> tuple[Bytes, np.float32]:
    """The two levels of nvfp4's scales: e4m3 codes ``[rows, groups]``, and the tensor's divisor.

    Groups that are not finite have the code of NaN, and no part in the divisor.
    """
    peaks = _peaks(_grouped(values, group_size_in(scheme, values.shape[1])))
    finite = np.isfinite(peaks)
    usable = np.where(finite, peaks, np.float32(0))
    divisor = nvfp4_divisor(usable.max() if scheme.peak is None else scheme.peak)
    return f32_to_e4m3(np.where(finite, usable / E2M1_MAX * divisor, _NAN)), divisor


def nvfp4_divisor(peak: float | np.float32) -> np.float32:
    """6 * 448 / the largest magnitude, at most the largest f32; 1 for zeros."""
    if peak == 0:
        return np.float32(1)
    with np.errstate(over="ignore"):
        return min(E2M1_MAX * E4M3_MAX / np.float32(peak), np.finfo(np.float32).max)


def nvfp4_groups(values: Float32, scale_codes: Bytes, divisor: np.float32) -> Groups:
    """Round a matrix to nvfp4 under given scales, which are divided out: each quotient is rounded once."""
    return _float4(NVFP4, values, e4m3_to_f32(scale_codes) / divisor)


def _symmetric(values: Float32, scheme: IntegerScheme) -> Groups:
    group_size = group_size_in(scheme, values.shape[1])
    groups = _grouped(values, group_size)
    scales = _finite(round_to(scheme.scale, _peaks(groups) / np.float32(scheme.steps)))
    low, high = scheme.code_range
    codes = nearest_multiples(groups, scales[..., None]).clip(low, high).astype(np.int8)
    if scheme.bits == 4:
        codes += np.int8(8)
    layout = RowBlocks(f"int{scheme.bits}", group_size, scheme.scale)
    return Groups(layout, codes.view(np.uint8).reshape(values.shape), scales)


def _asymmetric(values: Float32, scheme: IntegerScheme) -> Groups:
    """The range of a group always holds 0, which then is a code: the zero point."""
    group_size = group_size_in(scheme, values.shape[1])
    groups = _grouped(values, group_size)
    least, most = np.minimum(groups.min(axis=-1), np.float32(0)), np.maximum(groups.max(axis=-1), np.float32(0))
    with np.errstate(over="ignore", invalid="ignore"):
        scales = _finite(round_to(scheme.scale, (most - least) / np.float32(scheme.steps)))
    low, high = scheme.code_range
    zeros = nearest_multiples(-least, scales).clip(low, high)
    codes = (nearest_multiples(groups, scales[..., None]) + zeros[..., None]).clip(low, high)
    layout = RowBlocks(f"uint{scheme.bits}", group_size, scheme.scale)
    return Groups(layout, codes.astype(np.uint8).reshape(values.shape), scales, zeros.astype(np.uint8))


def _down_to_minus_eight(values: Float32, scheme: GgufScheme) -> Groups:
    groups = _grouped(values, group_size_in(scheme, values.shape[1]))
    least, most = groups.min(axis=-1), groups.max(axis=-1)
    low, high = scheme.code_range
    magnitudes = _finite(round_to("f16", np.maximum(-least, most) / np.float32(-low)))
    turned = np.where(-least >= most, np.float32(1), np.float32(-1))
    codes = nearest_multiples(groups * turned[..., None], magnitudes[..., None]).clip(low, high).astype(np.int8) + 8
    scales = np.where(magnitudes > 0, magnitudes * turned, magnitudes)
    return Groups(RowBlocks("int4", scheme.group_size, "f16"), codes.astype(np.uint8).reshape(values.shape), scales)


def _above_minima(values: Float32, scheme: GgufScheme) -> Groups:
    groups = _grouped(values, group_size_in(scheme, values.shape[1]))
    least, most = groups.min(axis=-1), groups.max(axis=-1)
    low, high = scheme.code_range
    minima = round_to("f16", least)
    with np.errstate(over="ignore", invalid="ignore"):
        scales = round_to("f16", (most - least) / np.float32(high))
    damaged = ~(np.isfinite(scales) & np.isfinite(minima))
    scales, minima = np.where(damaged, _NAN, scales), np.where(damaged, np.float32(0), minima)
    codes = nearest_multiples(groups - minima[..., None], scales[..., None]).clip(low, high)
    return Groups(MINIMA, codes.astype(np.uint8).reshape(values.shape), scales, minima=minima)


def _float8(values: Float32, scheme: Float8Scheme) -> Groups:
    block = scheme.block_of(*values.shape)
    peaks = _peaks_of_blocks(np.abs(values), block)
    group_size, scales = repeat_scales(_finite(round_to(scheme.scale, peaks / E4M3_MAX)), block, values.shape)
    codes = f32_to_e4m3(quotients(_grouped(values, group_size), scales[..., None]))
    return Groups(RowBlocks("fp8", group_size, scheme.scale), codes.reshape(values.shape), scales)


def _mxfp4(values: Float32) -> Groups:
    peaks = _peaks(_grouped(values, group_size_in(Mxfp4Scheme(), values.shape[1])))
    finite = np.isfinite(peaks)
    _, exponents = np.frexp(np.where(finite & (peaks > 0), peaks, np.float32(2.0**-127)))
    # frexp's exponent is one more than the largest power of two within; 2 is that of 6, the largest element.
    exponents = np.maximum(exponents - 1 - 2, -127)
    return _float4(MXFP4, values, np.where(finite, np.ldexp(np.float32(1), exponents), _NAN).astype(np.float32))


def _float4(layout: RowBlocks, values: Float32, scales: Float32) -> Groups:
    codes = f32_to_e2m1(quotients(_grouped(values, layout.group_size), scales[..., None]))
    return Groups(layout, codes.reshape(values.shape), scales)


def _grouped(values: Float32, group_size: int) -> Float32:
    return values.reshape(len(values), -1, group_size)


def _peaks(groups: Float32) -> Float32:
    peaks: Float32 = np.abs(groups).max(axis=-1)
    return peaks


def _finite(scales: Float32) -> Float32:
    return np.where(np.isfinite(scales), scales, _NAN)


def _peaks_of_blocks(magnitudes: Float32, block: tuple[int, int]) -> Float32:
    """The largest of each block, the last of which may be partial."""
    rows, columns = (np.arange(0, size, step) for size, step in zip(magnitudes.shape, block, strict=True))
    by_row = np.maximum.reduceat(magnitudes, rows, axis=0)
    return np.maximum.reduceat(by_row, columns, axis=1)

"""Rounding keys and values to the formats of the KV cache that have scales: one rule for every executor.

A head of one token is rounded by itself, in groups along its features. In every format a scale is computed in float32,
rounded to its own type, and a code is the nearest multiple of it, ties to even. A group that holds an infinity or a
NaN, or is too wide for its scale's type, decodes to NaN, so that the damage shows and stays within it.

    fp8   e4m3, one f32 scale per head: the largest magnitude / 448
    int8  -127 … 127, one f32 scale per head: the largest magnitude / 127
    int4  0 … 15 from the lowest value up, a bf16 scale and a bf16 lowest value for 32 features; keys are rotated first
          (`headrace.numerics.hadamard`)
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.numerics.float8 import E4M3_MAX, e4m3_to_f32, f32_to_e4m3
from headrace.numerics.hadamard import rotate
from headrace.numerics.int8 import dequantize_int8, quantize_int8
from headrace.numerics.kv_formats import INT4_GROUP
from headrace.numerics.rounding import Float32, bf16_to_f32, f32_to_bf16, nearest_multiples, quotients

_INT4_LARGEST = np.float32(15)


@dataclass(frozen=True, slots=True)
class RoundedHeads:
    """Heads of keys or values, rounded.

    Attributes:
        codes: one integer per value, ``[..., head_dim]``: int8, or uint8 (of e4m3, the byte; of int4, 0 … 15).
        scales: float32 ``[..., groups]``.
        lowest: float32 ``[..., groups]``, what code 0 stands for; None where that is 0.
    """

    codes: npt.NDArray[np.int8] | npt.NDArray[np.uint8]
    scales: Float32
    lowest: Float32 | None = None


def round_heads(values: Float32, kv_format: str, *, keys: bool) -> RoundedHeads:
    """Round heads, float32 ``[..., head_dim]``, to one of `kv_formats.SCALED_FORMATS`."""
    match kv_format:
        case "fp8":
            return _round_fp8(values)
        case "int8":
            codes, scales = quantize_int8(values)
            return RoundedHeads(codes, scales[..., None])
    assert kv_format == "int4", f"{kv_format} has no scales"
    return _round_int4(rotate(values) if keys else values)


def widen_heads(heads: RoundedHeads, kv_format: str, *, keys: bool) -> Float32:
    """The values that rounded heads stand for, float32 ``[..., head_dim]``."""
    match kv_format:
        case "fp8":
            return e4m3_to_f32(heads.codes.view(np.uint8)) * heads.scales
        case "int8":
            return dequantize_int8(heads.codes.view(np.int8), heads.scales[..., 0])
    assert kv_format == "int4", f"{kv_format} has no scales"
    assert heads.lowest is not None, "int4 has lowest values"
    head_dim = heads.codes.shape[-1]
    scales, lowest = (np.repeat(x, INT4_GROUP, axis=-1)[..., :head_dim] for x in (heads.scales, heads.lowest))
    values = heads.codes.astype(np.float32) * scales + lowest
    return rotate(values) if keys else values


def _round_fp8(values: Float32) -> RoundedHeads:
    peaks = np.abs(values).max(axis=-1, keepdims=True)
    scales = np.where(np.isfinite(peaks), peaks / E4M3_MAX, np.float32(np.nan))
    return RoundedHeads(f32_to_e4m3(quotients(values, scales)), scales)


def _round_int4(values: Float32) -> RoundedHeads:
    """Groups of 32; the last of a head may be smaller."""
    head_dim = values.shape[-1]
    starts = np.arange(0, head_dim, INT4_GROUP)
    least, most = (of.reduceat(values, starts, axis=-1) for of in (np.minimum, np.maximum))
    finite = np.isfinite(least) & np.isfinite(most)
    with np.errstate(over="ignore", invalid="ignore"):
        lowest = bf16_to_f32(f32_to_bf16(least))
        scales = bf16_to_f32(f32_to_bf16((most - lowest) / _INT4_LARGEST))
    finite &= np.isfinite(scales)
    scales, lowest = (np.where(finite, x, np.float32(np.nan)) for x in (scales, lowest))
    wide_scales, wide_lowest = (np.repeat(x, INT4_GROUP, axis=-1)[..., :head_dim] for x in (scales, lowest))
    with np.errstate(over="ignore", invalid="ignore"):
        codes = nearest_multiples(values - wide_lowest, wide_scales).clip(0, _INT4_LARGEST)
    return RoundedHeads(codes.astype(np.uint8), scales, lowest)

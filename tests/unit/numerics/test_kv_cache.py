"""Rounding keys and values to the KV cache's formats, and the rotation of int4's keys."""

import numpy as np
import pytest

from headrace.numerics.bitfields import Float32
from headrace.numerics.hadamard import rotate
from headrace.numerics.kv_cache import round_heads, widen_heads
from headrace.numerics.kv_formats import SCALED_FORMATS, scales_per_head


def heads(*shape: int) -> Float32:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32) * np.float32(3)


def there_and_back(values: Float32, kv_format: str, *, keys: bool) -> Float32:
    return widen_heads(round_heads(values, kv_format, keys=keys), kv_format, keys=keys)


@pytest.mark.parametrize("dim", [64, 80, 7, 128])
def test_rotation_is_the_product_with_hadamards_matrix(dim: int) -> None:
    size = dim & -dim
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    values = heads(5, dim)
    expected = values.reshape(5, -1, size).astype(np.float64) @ matrix / np.sqrt(size)
    np.testing.assert_allclose(rotate(values), expected.reshape(5, dim), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(rotate(rotate(values)), values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("dim", [64, 80, 7])
def test_every_value_is_within_what_the_format_allows(dim: int, keys: bool) -> None:
    values = heads(40, 3, dim)
    peaks = np.abs(values).max(axis=-1, keepdims=True)
    fp8_error = np.abs(there_and_back(values, "fp8", keys=keys) - values)
    assert (fp8_error <= np.maximum(np.abs(values), peaks / 2**14) / 16).all()
    assert (np.abs(there_and_back(values, "int8", keys=keys) - values) <= 0.50001 * peaks / 127).all()
    # int4: half a step of the scale, and the lowest value's own rounding (2^-9 of it) where values are clipped.
    seen = rotate(values) if keys else values
    rounded = round_heads(values, "int4", keys=keys)
    assert rounded.scales.shape == (40, 3, scales_per_head("int4", dim))
    assert rounded.codes.min() == 0
    assert rounded.codes.max() == 15
    steps = np.repeat(rounded.scales, 32, axis=-1)[..., :dim]
    back = there_and_back(values, "int4", keys=keys)
    error = np.abs((rotate(back) if keys else back) - seen)
    assert (error <= 0.5 * steps + np.abs(seen).max() / 2**8).all()


def test_int4_by_hand() -> None:
    """Lowest value -3, scale 1: codes are the values' distances from -3, ties to even."""
    rounded = round_heads(np.array([[-3, 12, 0.5, 1.5, -2.4]], np.float32), "int4", keys=False)
    assert rounded.lowest is not None
    assert (rounded.scales.item(), rounded.lowest.item()) == (1, -3)
    assert rounded.codes.tolist() == [[0, 15, 4, 4, 1]]
    assert widen_heads(rounded, "int4", keys=False).tolist() == [[-3, 12, 1, 1, -2]]


def test_the_groups_of_int4_are_their_own() -> None:
    values = heads(1, 64)
    values[0, 32:] *= 1000
    np.testing.assert_allclose(there_and_back(values, "int4", keys=False)[0, :32], values[0, :32], atol=0.6)


def test_a_constant_group_is_kept() -> None:
    for constant in (0.0, 1.5, -2.0):
        values = np.full((2, 32), constant, np.float32)
        assert (there_and_back(values, "int4", keys=False) == values).all()


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("kv_format", SCALED_FORMATS)
def test_what_is_not_finite_shows(kv_format: str, bad: float, keys: bool) -> None:
    values = heads(2, 32)
    values[0, 3] = bad
    with np.errstate(invalid="ignore"):
        back = there_and_back(values, kv_format, keys=keys)
    assert np.isnan(back[0]).all()
    assert np.isfinite(back[1]).all()


def test_what_is_too_wide_for_a_bf16_scale_shows() -> None:
    values = np.zeros((1, 32), np.float32)
    values[0, :2] = -3.4e38, 3.4e38
    assert np.isnan(there_and_back(values, "int4", keys=False)).all()

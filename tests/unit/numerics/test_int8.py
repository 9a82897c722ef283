"""Rounding to int8 with one scale per run."""

import numpy as np
import pytest

from headrace.numerics.int8 import dequantize_int8, quantize_int8


def test_every_value_is_within_half_a_step() -> None:
    values = np.random.default_rng(0).standard_normal((40, 3, 64)).astype(np.float32) * np.float32(7)
    codes, scales = quantize_int8(values)
    assert codes.dtype == np.int8
    assert scales.shape == (40, 3)
    error = np.abs(dequantize_int8(codes, scales).astype(np.float64) - values)
    assert (error <= 0.5000001 * scales[..., None]).all()
    assert (np.abs(codes).max(axis=-1) == 127).all(), "the largest magnitude takes the largest code"


def test_ties_go_to_even() -> None:
    codes, scales = quantize_int8(np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5], np.float32))
    assert scales == 1
    assert codes.tolist() == [127, 0, 2, 2, 0, -2, -126]


def test_zeros_stay_zeros() -> None:
    codes, scales = quantize_int8(np.zeros((2, 5), np.float32))
    assert not codes.any()
    assert not scales.any()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_shows(bad: float) -> None:
    codes, scales = quantize_int8(np.array([[1, bad, 2], [1, 2, 3]], np.float32))
    assert np.isnan(scales).tolist() == [True, False]
    assert not codes[0].any()
    assert np.isnan(dequantize_int8(codes, scales)[0]).all()


def test_a_denormal_scale_does_not_wrap() -> None:
    """180 denormal steps / 127 rounds to one step, so the largest value would be 180 of them."""
    codes, scales = quantize_int8(np.array([180, -180, 1], np.float32) * np.float32(2.0**-149))
    assert scales == np.float32(2.0**-149)
    assert codes.tolist() == [127, -127, 1]

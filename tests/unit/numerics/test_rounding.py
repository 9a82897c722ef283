"""Rounding to 16 bits: the nearest value, ties to even, and every special value in its place."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.numerics.rounding import bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16


def bits(*values):
    return np.array(values, np.uint32).view(np.float32)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0x3F800000, 0x3F80),  # 1
        (0x3F808000, 0x3F80),  # a tie, down to even
        (0x3F818000, 0x3F82),  # a tie, up to even
        (0x3F808001, 0x3F81),  # just above a tie
        (0x3F80FFFF, 0x3F81),
        (0x7F7FFFFF, 0x7F80),  # the largest f32 overflows to infinity
        (0xFF800000, 0xFF80),  # minus infinity
        (0x80000000, 0x8000),  # minus zero
        (0x00008001, 0x0001),  # denormals are kept
        (0x7F800001, 0x7FC0),  # a NaN whose payload would be cut off stays a NaN
        (0xFFFFFFFF, 0xFFFF),
    ],
)
def test_f32_to_bf16(value, expected):
    assert f32_to_bf16(bits(value))[0] == expected


@given(st.floats(width=32, min_value=-(2.0**127), max_value=2.0**127))
def test_bf16_is_the_nearest(value):
    here = f32_to_bf16(np.array([value], np.float32))
    error = abs(np.float64(bf16_to_f32(here)[0]) - value)
    for step in (-1, 1):
        neighbor = np.float64(bf16_to_f32((here + np.array(step).astype(np.uint16)).astype(np.uint16))[0])
        assert not error > abs(neighbor - value)


@given(st.integers(0, 0xFFFF))
def test_16_bits_survive_the_round_trip(pattern):
    stored = np.array([pattern], np.uint16)
    for widen, narrow in ((bf16_to_f32, f32_to_bf16), (f16_to_f32, f32_to_f16)):
        value = widen(stored)
        if not np.isnan(value[0]):
            assert narrow(value)[0] == pattern


def test_f32_to_f16_overflows_without_a_warning(recwarn):
    np.testing.assert_array_equal(
        f16_to_f32(f32_to_f16(np.array([1e6, -1e6, 65504, 1e-8], np.float32))), [np.inf, -np.inf, 65504, 0]
    )
    assert not recwarn.list


def test_shapes_are_kept():
    values = np.ones((2, 3), np.float32)
    assert f32_to_bf16(values).shape == f32_to_f16(values).shape == (2, 3)
    assert f32_to_bf16(values.T).shape == (3, 2)

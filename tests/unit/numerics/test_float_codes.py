"""The small floats: every code, every tie, what overflows, and what torch makes of the same values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.numerics.float4 import E2M1_VALUES, e2m1_to_f32, f32_to_e2m1
from headrace.numerics.float8 import (
    E4M3_VALUES,
    E8M0_VALUES,
    e4m3_to_f32,
    e8m0_to_f32,
    f32_to_e4m3,
    f32_to_e8m0,
)

ALL_CODES = np.arange(256, dtype=np.uint8)
FLOATS = st.floats(width=32, allow_nan=False)


def test_e4m3_by_hand():
    codes = np.array([0x00, 0x01, 0x07, 0x08, 0x38, 0x3C, 0x7E, 0x80, 0xFE], np.uint8)
    expected = [0, 2.0**-9, 7 * 2.0**-9, 2.0**-6, 1, 1.5, 448, -0.0, -448]
    np.testing.assert_array_equal(e4m3_to_f32(codes), np.array(expected, np.float32))
    assert np.isnan(e4m3_to_f32(np.array([0x7F, 0xFF], np.uint8))).all()
    assert np.isfinite(E4M3_VALUES).sum() == 254


def test_e4m3_codes_survive_the_round_trip():
    finite = np.isfinite(E4M3_VALUES)
    np.testing.assert_array_equal(f32_to_e4m3(E4M3_VALUES)[finite], ALL_CODES[finite])
    np.testing.assert_array_equal(f32_to_e4m3(np.array([np.nan, -np.nan], np.float32)) & 0x7F, [0x7F, 0x7F])


def test_e4m3_ties_go_to_even_and_overflow_saturates():
    values = np.sort(E4M3_VALUES[:127])
    ties = (values[1:].astype(np.float64) + values[:-1]) / 2
    codes = f32_to_e4m3(ties.astype(np.float32))
    assert (codes % 2 == 0).all()
    for step, expected in ((-1, np.arange(126)), (1, np.arange(1, 127))):
        beside = np.nextafter(ties.astype(np.float32), np.float32(step * np.inf))
        np.testing.assert_array_equal(f32_to_e4m3(beside), expected)
    np.testing.assert_array_equal(f32_to_e4m3(np.array([449, 1e38, np.inf, -np.inf], np.float32)), [126, 126, 126, 254])


def test_e4m3_is_torchs():
    torch = pytest.importorskip("torch", reason="the foreign implementation")
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, np.uint32)
    values = bits.view(np.float32)[np.abs(bits.view(np.float32)) <= 448]
    values = np.concatenate([values, np.linspace(-448, 448, 20_001, dtype=np.float32)])
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(f32_to_e4m3(values), expected.view(torch.uint8).numpy())
    every = torch.from_numpy(ALL_CODES.copy()).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(E4M3_VALUES, every)


def test_e8m0():
    assert e8m0_to_f32(np.array([0, 127, 254], np.uint8)).tolist() == [2.0**-127, 1, 2.0**127]
    np.testing.assert_array_equal(f32_to_e8m0(E8M0_VALUES), ALL_CODES)
    for wrong in (3.0, 2.0**-128, 0.0, -1.0):
        with pytest.raises(AssertionError, match=r"power of two|range"):
            f32_to_e8m0(np.array([wrong], np.float32))


@given(FLOATS)
def test_e2m1_is_the_nearest(value):
    (code,) = f32_to_e2m1(np.array([value], np.float32))
    errors = np.abs(E2M1_VALUES.astype(np.float64) - max(-6.0, min(6.0, value)))
    assert errors[code] == errors.min()
    assert (code >= 8) == np.signbit(value)


def test_e2m1_ties_go_to_even():
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)
    assert e2m1_to_f32(f32_to_e2m1(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert e2m1_to_f32(f32_to_e2m1(-ties)).tolist() == [-0.0, -1, -1, -2, -2, -4, -4]
    assert f32_to_e2m1(np.array([-0.0, 1e38, -np.inf], np.float32)).tolist() == [8, 7, 15]

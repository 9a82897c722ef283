"""Rounding to a scheme: hand-worked groups, what no rule should break, and the same bits from torch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.base.errors import InvalidRequestError
from headrace.numerics.int8 import dequantize_int8, quantize_int8
from headrace.numerics.quantize import nvfp4_groups, nvfp4_scales, quantize
from headrace.numerics.rounding import round_to
from headrace.numerics.schemes import WHOLE, Float8Scheme, GgufScheme, IntegerScheme, Mxfp4Scheme, Nvfp4Scheme

SCALES = ("f32", "bf16", "f16")
SCHEMES = [
    *(
        IntegerScheme(bits=bits, group_size=group_size, symmetric=symmetric, clip=clip, scale=scale)
        for bits in (4, 8)
        for group_size in (32, 128, WHOLE)
        for symmetric, clip in ((True, "narrow"), (True, "full"), (False, "narrow"))
        for scale in SCALES
    ),
    *(Float8Scheme(block=block, scale=scale) for block in ((WHOLE, WHOLE), (1, WHOLE), (3, 96)) for scale in SCALES),
    Mxfp4Scheme(),
    Nvfp4Scheme(),
    Nvfp4Scheme(peak=1000),
    *(GgufScheme(name) for name in ("q8_0", "q4_0", "q4_1")),
]
NARROW = IntegerScheme(group_size=WHOLE, scale="f32")


def row(*values):
    return np.array([values], np.float32)


def matrix(rows=5, features=384, seed=0, spread=1.0):
    return (np.random.default_rng(seed).standard_normal((rows, features)) * spread).astype(np.float32)


def signed(groups):
    return groups.codes.astype(np.int64) - 8


class TestIntegers:
    def test_the_qat_rule_by_hand(self):
        """Codes within ±7, the scale max / 7; ties to even."""
        groups = quantize(row(7, -7, 0.5, 1.5, 2.5, -0.5, -1.5, 6.49), NARROW)
        assert groups.scales == 1
        assert signed(groups).tolist() == [[7, -7, 0, 2, 2, 0, -2, 6]]

    def test_the_full_range_by_hand(self):
        """The scale max / 7.5: the largest magnitude is at -8 if negative (half a step off), else at 7."""
        scheme = IntegerScheme(group_size=WHOLE, scale="f32", clip="full")
        groups = quantize(row(-7.5, 7.5, 7, 1), scheme)
        assert groups.scales == 1
        assert signed(groups).tolist() == [[-8, 7, 7, 1]]

    def test_the_scale_is_rounded_before_codes_are_computed(self):
        values = row(1 + 2.0**-9, 3.5 * (1 + 2.0**-9) / 7, 0, 0)
        for scale in ("bf16", "f16"):
            groups = quantize(values, IntegerScheme(group_size=WHOLE, scale=scale))
            exact = values.max() / np.float32(7)
            assert groups.scales == round_to(scale, np.array([exact]))
            expected = np.rint(values / groups.scales)
            np.testing.assert_array_equal(signed(groups), expected)
        coarse = quantize(values, IntegerScheme(group_size=WHOLE, scale="bf16"))
        fine = quantize(values, IntegerScheme(group_size=WHOLE, scale="f32"))
        assert coarse.scales != fine.scales
        assert (signed(coarse) != signed(fine)).any(), "an example that shows no difference"

    def test_zero_points_by_hand(self):
        """Least -3, most 12, in 15 steps: the scale 1, the zero point 3."""
        scheme = IntegerScheme(group_size=WHOLE, symmetric=False, scale="f32")
        groups = quantize(row(-3, 12, 0, 0.4), scheme)
        assert (groups.scales, groups.zeros) == (1, 3)
        assert groups.codes.tolist() == [[0, 15, 3, 3]]
        assert groups.to_f32().tolist() == [[-3, 12, 0, 0]]

    def test_zero_is_a_code_even_where_all_values_are_of_one_sign(self):
        scheme = IntegerScheme(group_size=WHOLE, symmetric=False, scale="f32")
        for sign, zero in ((1, 0), (-1, 15)):
            groups = quantize(row(sign * 14, sign * 15), scheme)
            assert groups.zeros == zero
            assert groups.to_f32().tolist() == [[sign * 14, sign * 15]]

    def test_int8_rows_are_those_of_the_kv_cache(self):
        values = matrix(seed=1)
        codes, scales = quantize_int8(values)
        groups = quantize(values, IntegerScheme(bits=8, group_size=WHOLE, scale="f32"))
        np.testing.assert_array_equal(groups.codes.view(np.int8), codes)
        np.testing.assert_array_equal(groups.to_f32(), dequantize_int8(codes, scales))

    @pytest.mark.parametrize("group_size", [5, 7, 48, -1, 512])
    def test_groups_that_do_not_divide_are_refused(self, group_size):
        with pytest.raises(InvalidRequestError, match=f"Groups of {group_size} do not divide rows of 128") as caught:
            quantize(matrix(features=128), IntegerScheme(group_size=group_size))
        assert "32, 64, 128" in caught.value.remedy

    def test_an_odd_row_of_nibbles_is_refused(self):
        with pytest.raises(InvalidRequestError, match="no whole number of bytes"):
            quantize(matrix(features=33), NARROW)
        quantize(matrix(features=33), IntegerScheme(bits=8, group_size=WHOLE))

    def test_zero_points_have_no_choice_of_range(self):
        with pytest.raises(InvalidRequestError, match="one range only"):
            IntegerScheme(symmetric=False, clip="full")

    @pytest.mark.parametrize("wrong", [{"bits": 3}, {"clip": "wide"}, {"scale": "e4m3"}])
    def test_schemes_that_are_none(self, wrong):
        with pytest.raises(InvalidRequestError, match="not known"):
            IntegerScheme(**wrong)


class TestDownToMinusEight:
    def test_by_hand(self):
        """The largest magnitude is -8 scales, so the scale is negative where it is positive."""
        for sign in (1, -1):
            groups = quantize(row(sign * 8, -sign * 8 + sign, sign * 2.5, *[0] * 29), GgufScheme("q4_0"))
            assert groups.scales == -sign
            assert signed(groups)[0, :4].tolist() == [-8, 7, -2, 0]
            assert groups.to_f32()[0, :3].tolist() == [8 * sign, -7 * sign, 2 * sign]


class TestMinima:
    def test_by_hand(self):
        """Least 5, largest 20, in 15 steps: the scale 1; ties to even."""
        groups = quantize(row(5, 20, 7.5, 8.5, *[5] * 28), GgufScheme("q4_1"))
        assert (groups.scales, groups.minima) == (1, 5)
        assert groups.codes[0, :5].tolist() == [0, 15, 2, 4, 0]
        assert groups.to_f32()[0, :4].tolist() == [5, 20, 7, 9]

    def test_a_constant_group_is_its_minimum(self):
        groups = quantize(row(*[-3] * 32), GgufScheme("q4_1"))
        assert groups.scales == 0
        assert (groups.to_f32() == -3).all()

    def test_what_was_rounded_before_stays_as_it_is(self):
        once = quantize(matrix(seed=3), GgufScheme("q4_1"))
        again = quantize(once.to_f32(), GgufScheme("q4_1"))
        np.testing.assert_array_equal(again.to_f32(), once.to_f32())

    def test_a_minimum_beyond_f16_is_damage(self):
        groups = quantize(row(-1e6, *[0] * 31, *[1] * 32), GgufScheme("q4_1"))
        assert np.isnan(groups.to_f32()[0, :32]).all()
        assert (groups.to_f32()[0, 32:] == 1).all()


class TestFloats:
    def test_float8_blocks_with_partial_edges(self):
        """A block of 2 x 3 in a matrix of 3 x 4: four scales, three of partial blocks."""
        values = np.array([[448, 1, 1, 2], [1, 1, 1, 1], [4, 1, 1, 8]], np.float32)
        groups = quantize(values, Float8Scheme(block=(2, 3)))
        assert groups.layout.name == "fp8_g1_f32"
        expected = np.array([[448, 448, 448, 2], [448, 448, 448, 2], [4, 4, 4, 8]], np.float32) / np.float32(448)
        np.testing.assert_array_equal(groups.scales, expected)
        np.testing.assert_allclose(groups.to_f32(), values, rtol=2.0**-4)

    def test_mxfp4_by_hand(self):
        """The largest magnitude 7.9 has exponent 2, so the scale is 1 and it becomes 6."""
        values = np.zeros((1, 32), np.float32)
        values[0, :4] = 7.9, -5, 0.25, 0.26
        groups = quantize(values, Mxfp4Scheme())
        assert groups.scales == 1
        assert groups.to_f32()[0, :4].tolist() == [6, -4, 0, 0.5]
        assert quantize(values * np.float32(2.0**-130), Mxfp4Scheme()).scales == 2.0**-127, "the least scale there is"
        assert quantize(values * np.float32(0), Mxfp4Scheme()).scales == 2.0**-127

    def test_nvfp4_by_hand(self):
        """The tensor's scale is 2688 / 2688 = 1; the second group's is 12 / 6 = 2."""
        values = np.zeros((1, 32), np.float32)
        values[0, 0], values[0, 16:18] = 2688, (12, -5)
        codes, divisor = nvfp4_scales(values, Nvfp4Scheme())
        assert divisor == 1
        groups = nvfp4_groups(values, codes, divisor)
        assert groups.scales.tolist() == [[448, 2]]
        assert groups.to_f32()[0, [0, 16, 17]].tolist() == [2688, 12, -4]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
class TestEveryScheme:
    def test_errors_are_within_half_a_step(self, scheme):
        """At the last codes, also by what rounding the scale and the zero point took from the range."""
        values = matrix()
        groups = quantize(values, scheme)
        error = np.abs(groups.to_f32().astype(np.float64) - values)
        steps = np.repeat(np.abs(groups.scales), groups.layout.group_size, axis=1)
        match scheme:
            case IntegerScheme() | GgufScheme():
                low, high = (code + 8 * (groups.layout.element == "int4") for code in scheme.code_range)
                codes = groups.codes.view(np.int8) if groups.layout.element == "int8" else groups.codes
                last = (codes == low) | (codes == high)
                bound = np.where(last, steps + 2.0**-8 * np.abs(values).max(), 0.5 * steps)
            case Float8Scheme():
                bound = 2.0**-4 * np.abs(values) + 2.0**-10 * steps
            case _:
                bound = np.abs(values) / 4 + steps / 4  # the widest gap is from 4 to 6, and mxfp4 clips 8 to 6
        assert (error <= bound * 1.0001).all()

    def test_zeros_stay_zeros(self, scheme):
        values = matrix()
        values[2] = 0
        found = quantize(values, scheme).to_f32()
        assert not found[2].any()
        assert not quantize(np.zeros_like(values), scheme).to_f32().any()

    @pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
    def test_what_is_not_finite_shows_in_its_group_and_nowhere_else(self, scheme, bad):
        values = matrix()
        clean = quantize(values, scheme)
        values[1, 7] = bad
        groups = quantize(values, scheme)
        found, size = groups.to_f32(), groups.layout.group_size
        damaged = np.isnan(groups.scales)
        assert damaged.any()
        assert np.isnan(found[np.repeat(damaged, size, axis=1)]).all()
        untouched = np.repeat(~damaged, size, axis=1)
        if not isinstance(scheme, Nvfp4Scheme):  # whose tensor scale may have been that of the damaged group
            np.testing.assert_array_equal(found[untouched], clean.to_f32()[untouched])
        assert np.isfinite(found[untouched]).all()

    @pytest.mark.parametrize("spread", [2.0**-149, 2.0**-140, 2.0**-126, 1e-20, 1e30])
    def test_denormals_and_giants(self, scheme, spread, recwarn):
        """Nothing wraps, nothing warns; what is too small for its scale's type is zero, what is too large shows."""
        values = np.rint(matrix(seed=3, spread=200)) * np.float32(spread)
        found = quantize(values, scheme).to_f32()
        assert not recwarn.list
        finite = np.isfinite(found)
        same_sign = np.sign(found[finite]) * np.sign(values[finite])
        assert (same_sign >= 0).all()
        assert (np.abs(found[finite]) <= 1.34 * np.abs(values).max()).all()
        if spread < 1:
            assert finite.all()

    def test_an_outlier_sets_its_group(self, scheme):
        values = matrix(spread=1e-3)
        values[0, 0] = 768  # what mxfp4 has under a scale of 128
        found = quantize(values, scheme).to_f32()
        assert found[0, 0] == pytest.approx(768, rel=0.07)

    def test_matrices_only(self, scheme):
        for shape in ((3,), (2, 3, 128), (0, 128), (128, 0)):
            with pytest.raises(InvalidRequestError, match="no matrix"):
                quantize(np.zeros(shape, np.float32), scheme)


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
HALVES = st.integers(-20, 20).map(lambda n: n / 2)
DENORMALS = st.integers(-(1 << 12), 1 << 12).map(lambda n: n * 2.0**-149)
ANY = st.one_of(FINITE, HALVES, DENORMALS, st.sampled_from([0.0, -0.0, np.inf, -np.inf, np.nan]))


@st.composite
def matrices(draw):
    """Two rows of 128, half of them noise of some scale, with chosen values strewn in."""
    values = matrix(2, 128, draw(st.integers(0, 1 << 16)), 2.0 ** draw(st.integers(-140, 100)))
    if draw(st.booleans()):
        values = np.rint(values / np.abs(values).max() * 14) / 2  # ties everywhere
    for at, value in draw(st.lists(st.tuples(st.integers(0, 255), ANY), max_size=40)):
        values.flat[at] = value
    return values.astype(np.float32)


class TestTorch:
    @settings(max_examples=250, deadline=None)
    @given(values=matrices(), scheme=st.sampled_from(SCHEMES))
    def test_the_same_bits(self, values, scheme):
        torch = pytest.importorskip("torch", reason="fake quantization is torch's")
        from headrace.numerics.fake_quantize import fake_quantize

        expected = quantize(values, scheme).to_f32()
        found = fake_quantize(torch.from_numpy(values), scheme).numpy()
        nan = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(found), nan)
        np.testing.assert_array_equal(found[~nan].view(np.uint32), expected[~nan].view(np.uint32))

    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    def test_the_same_bits_of_a_larger_matrix(self, scheme):
        torch = pytest.importorskip("torch", reason="fake quantization is torch's")
        from headrace.numerics.fake_quantize import fake_quantize

        values = matrix(50, 768, seed=5)
        found = fake_quantize(torch.from_numpy(values), scheme).numpy()
        np.testing.assert_array_equal(found.view(np.uint32), quantize(values, scheme).to_f32().view(np.uint32))


class TestGradients:
    @pytest.fixture(autouse=True)
    def _torch(self):
        self.torch = pytest.importorskip("torch", reason="fake quantization is torch's")

    def gradient(self, values, scheme):
        from headrace.numerics.fake_quantize import fake_quantize

        leaf = self.torch.from_numpy(values).requires_grad_()
        upstream = self.torch.arange(1.0, values.size + 1).reshape(values.shape)
        (fake_quantize(leaf, scheme) * upstream).sum().backward()
        return leaf.grad.numpy() / upstream.numpy()

    def test_pass_where_nothing_is_clipped(self):
        assert (self.gradient(matrix(), IntegerScheme(group_size=128, scale="f32")) == 1).all()
        assert (self.gradient(np.zeros((2, 64), np.float32), IntegerScheme()) == 1).all(), "dead groups may come alive"

    def test_stop_at_a_clipped_value(self):
        full = IntegerScheme(group_size=WHOLE, scale="f32", clip="full")
        assert self.gradient(row(7.5, -7.5, 7, 1), full).tolist() == [[0, 1, 1, 1]]
        values = np.ones((1, 32), np.float32)
        values[0, :2] = 7.9, -6.1
        assert self.gradient(values, Mxfp4Scheme())[0, :3].tolist() == [0, 0, 1]

    def test_a_bf16_master_gets_its_gradient(self):
        from headrace.numerics.fake_quantize import fake_quantize

        master = self.torch.ones(2, 32, dtype=self.torch.bfloat16, requires_grad=True)
        with pytest.raises(InvalidRequestError, match="bfloat16"):
            fake_quantize(master, IntegerScheme())
        fake_quantize(master.float(), IntegerScheme()).sum().backward()
        assert (master.grad == 1).all()

"""Linear kernels: every format, instruction set and activation precision against the decoded weights."""

import gguf
import numpy as np
import pytest

from headrace import _native
from headrace.numerics.formats import dequantize as numerics_dequantize
from headrace.numerics.formats import format_named
from headrace.numerics.rounding import round_to
from headrace.numerics.row_blocks import Groups, groups_in, row_blocks
from tests.support.raw_tensors import HALF_OFFSETS

PLAIN = {"f32": 4, "f16": 2, "bf16": 2}
ROW_BLOCKS = [
    *("int4_g32_bf16", "int4_g128_f16", "int4_g48_f32", "uint4_g32_bf16", "uint4_g128_f16", "uint4_g768_f32"),
    *("int8_g32_f16", "int8_g768_bf16", "int8_g96_f32", "uint8_g64_bf16", "uint8_g768_f32", "uint8_g16_bf16"),
    *("fp8_g768_f32", "fp8_g128_bf16", "fp8_g16_f16", "mxfp4", "nvfp4"),
]
READ_AS_F32 = [*PLAIN, "int4_g48_f32", "uint8_g16_bf16", *(n for n in ROW_BLOCKS if n.startswith("fp8")), "nvfp4"]
INTEGERS = [*HALF_OFFSETS, *(name for name in ROW_BLOCKS if name not in READ_AS_F32)]
FORMATS = [*PLAIN, *HALF_OFFSETS, *ROW_BLOCKS]
ISAS = _native.available_isas()
ACTIVATIONS = ["f32", "int16", "bf16", "int8"]
# Error per unit of sum |w x|, beside the rounding of long sums. f32 keeps 2^-17 of each input at least, bf16 2^-8.
ROUNDING = 2e-6
RELATIVE = {"f32": 2.0**-17, "int16": 2.0**-17, "bf16": 2.0**-8, "int8": 2.0**-17}
LEVELS = {"int16": 32639, "int8": 127}
ROWS = [1, 2, 7, 8, 9, 16, 17, 33, 64]


def random_weight(name: str, out: int, features: int, seed: int = 0) -> np.ndarray:
    """Stored rows [out, bytes] whose every code, sign and scale occurs."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((out, features)).astype(np.float32)
    if name == "f32":
        return values.view(np.uint8)
    if name == "f16":
        return values.astype(np.float16).view(np.uint8)
    if name == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    if name in ROW_BLOCKS:
        return random_row_blocks(name, out, features, rng)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    raw = rng.integers(0, 256, (out, features // block, size), dtype=np.uint8)
    for at in HALF_OFFSETS[name]:
        scale = (rng.standard_normal((out, features // block, 1)) * 0.01).astype(np.float16)
        raw[:, :, at : at + 2] = scale.view(np.uint8)
    return raw.reshape(out, -1)


def random_row_blocks(name: str, out: int, features: int, rng: np.random.Generator) -> np.ndarray:
    """Every code but NaNs; scales of both signs, of any size for which results stay finite."""
    layout = row_blocks(name)
    assert layout is not None
    codes = rng.integers(0, 1 << layout.bits, (out, features), dtype=np.uint8)
    if layout.element == "fp8":
        codes[codes & 0x7F == 0x7F] = 0x3F
    shape = (out, features // layout.group_size)
    scales = (rng.standard_normal(shape) * 2.0 ** rng.integers(-20, 3, shape)).astype(np.float32)
    scales = 2.0 ** np.round(np.log2(np.abs(scales))) if layout.scale == "e8m0" else round_to(layout.scale, scales)
    zeros = rng.integers(0, 1 << layout.bits, shape, dtype=np.uint8) if layout.has_zero_point else None
    return Groups(layout, codes, scales.astype(np.float32), zeros).encode()


def random_input(rows: int, features: int, seed: int = 1) -> np.ndarray:
    """Activations over several orders of magnitude, as models have them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, features)) * np.exp(2 * rng.standard_normal((rows, features)))
    return x.astype(np.float32)


def dequantize(name: str, raw: np.ndarray, features: int) -> np.ndarray:
    if name == "f32":
        return raw.view(np.float32)
    if name == "f16":
        return raw.view(np.float16).astype(np.float32)
    if name in ROW_BLOCKS:
        return numerics_dequantize(format_named(name), raw, (len(raw), features))
    values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name.upper()])
    return np.asarray(values, np.float32).reshape(len(raw), features)


def bits(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, order="C").view(np.uint32)


@pytest.mark.parametrize("name", FORMATS)
def test_decoded_rows_equal_gguf_and_numerics_bit_for_bit(name: str) -> None:
    raw = random_weight(name, 24, 768)
    np.testing.assert_array_equal(bits(_native.decode_rows(name, raw, 768)), bits(dequantize(name, raw, 768)))


def test_every_half_float_decodes_exactly() -> None:
    halves = np.arange(65536, dtype=np.uint16)
    values = halves.view(np.float16).astype(np.float32)
    decoded = _native.decode_rows("f16", halves.view(np.uint8)[None], 65536)[0]
    finite = ~np.isnan(values)
    np.testing.assert_array_equal(bits(decoded[finite]), bits(values[finite]))
    assert np.isnan(decoded[~finite]).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FORMATS)
def test_product_equals_the_reference_for_any_number_of_rows(name: str, isa: str, activation: str) -> None:
    check_products(name, isa, activation, 40, 768)


@pytest.mark.parametrize("activation", sorted(LEVELS))
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", INTEGERS)
def test_a_row_may_be_one_block(name: str, isa: str, activation: str) -> None:
    """Of one scale, or of several."""
    layout = row_blocks(name)
    check_products(
        name,
        isa,
        activation,
        40,
        layout.group_size if layout else gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]][0],
    )


def check_products(name: str, isa: str, activation: str, out: int, features: int) -> None:
    raw = random_weight(name, out, features)
    weight = _native.decode_rows(name, raw, features).astype(np.float64)
    x = random_input(max(ROWS), features)
    for rows in ROWS:
        y = _native.linear_test(name, raw, x[:rows], isa, activation)
        wide = x[:rows].astype(np.float64)
        error = np.abs(y - wide @ weight.T)
        allowed = (RELATIVE[activation] + ROUNDING) * slack(name, raw, wide, weight)
        assert (error <= allowed + fixed_point_error(name, isa, activation, wide, weight)).all(), rows


def fixed_point_error(name: str, isa: str, activation: str, x: np.ndarray, weight: np.ndarray) -> np.ndarray | float:
    """What inputs in fixed point may add: half a unit of each group's largest magnitude, for every weight."""
    if name in READ_AS_F32 or activation not in LEVELS:
        return 0.0
    if isa == "amx":
        return fixed_weights_error(name, activation, x, weight)
    group = 16 if name in ("q2_k", "q3_k", "q6_k") else 32
    largest = np.abs(x).reshape(len(x), -1, group).max(axis=2)
    unit: np.ndarray = largest @ np.abs(weight).reshape(len(weight), -1, group).sum(axis=2).T / LEVELS[activation]
    return 0.51 * unit


def fixed_weights_error(name: str, activation: str, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Where weights are fixed point, too: half a unit of each row of inputs for every weight, and for every input units
    of the largest weight of a column that codes could stand for, at most twice the largest that occurs: up to 8.5 where
    the steps of 4-bit codes are rounded, 1.5 where 8-bit codes are; of 256 such units half a one for int8. Codes of 8
    bits and one scale a row are exact."""
    inputs = np.abs(x).max(axis=1, keepdims=True) / LEVELS["int16"] * np.abs(weight).sum(axis=1)
    if name == "int8_g768_bf16":
        return np.asarray(0.51 * inputs)
    units = 8.5 if name in ("q4_0", "q4_1", "q4_k", "q2_k", "q3_k") or "int4" in name else 1.5
    units += 128 if activation == "int8" else 0
    weights = np.abs(x).sum(axis=1, keepdims=True) * 2 * np.abs(weight).max(axis=1) / 32623
    total: np.ndarray = 0.51 * inputs + units * weights
    return total


def slack(name: str, raw: np.ndarray, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Sum of |terms|. A format with offsets adds scale * q and offset, which may cancel: both count."""
    total: np.ndarray = np.abs(x) @ np.abs(weight).T
    if name in ("q4_1", "q5_1", "q2_k", "q4_k", "q5_k") or name.startswith("uint"):
        total = total + np.abs(x).sum(axis=1, keepdims=True) * np.abs(weight).max(axis=1)
    return total


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FORMATS)
def test_bits_depend_on_neither_batch_nor_columns(name: str, isa: str, activation: str) -> None:
    out, features, most = 72, 2304, 70  # 72 blocks of 32: more than one chunk in every kernel
    raw = random_weight(name, out, features)
    x = random_input(most, features)
    whole = bits(_native.linear_test(name, raw, x, isa, activation))
    for rows in (1, 2, 3, 5, 8, 9, 16, 31, 69):  # the last rows, so that positions in a tile differ too
        part = _native.linear_test(name, raw, x[most - rows :], isa, activation)
        np.testing.assert_array_equal(bits(part), whole[most - rows :], err_msg=str(rows))
    one_digit = isa == "amx" and activation == "int8" and name in INTEGERS  # two panels at a time
    for begin, end in [(0, 32), (32, 72), (64, 72)] if one_digit else [(0, 16), (16, 64), (48, 72), (64, 72)]:
        for rows in (1, most):
            part = _native.linear_test(name, raw, x[:rows], isa, activation, begin, end)
            np.testing.assert_array_equal(bits(part[:, begin:end]), whole[:rows, begin:end])
            assert np.isnan(part[:, :begin]).all()
            assert np.isnan(part[:, end:]).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_row_count_up_to_seventy_gives_the_same_bits(isa: str, activation: str) -> None:
    raw, x = random_weight("q4_1", 32, 96), random_input(70, 96)
    whole = bits(_native.linear_test("q4_1", raw, x, isa, activation))
    for rows in range(1, 71):
        part = bits(_native.linear_test("q4_1", raw, x[:rows], isa, activation))
        np.testing.assert_array_equal(part, whole[:rows])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", sorted(LEVELS))
@pytest.mark.parametrize("name", INTEGERS)
def test_an_infinity_in_fixed_point_makes_nans_of_its_row_for_any_number_of_rows(
    name: str, isa: str, activation: str
) -> None:
    raw, x = random_weight(name, 16, 768), random_input(12, 768)
    x[0, 5] = np.inf
    for rows in (1, 2, 4, 8, 12):
        y = _native.linear_test(name, raw, x[:rows], isa, activation)
        assert np.isnan(y[0]).all(), rows
        assert np.isfinite(y[1:]).all(), rows


@pytest.mark.skipif("amx" not in ISAS, reason="of the kernels for AMX, not available here")
@pytest.mark.parametrize("activation", sorted(LEVELS))
def test_signed_bytes_of_one_scale_a_row_lose_nothing_on_amx(activation: str) -> None:
    features = 576  # one exact sum
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 256, (40, features), dtype=np.uint8)
    codes[0], codes[1] = 0x80, 0x7F  # -128, 127
    layout = row_blocks(f"int8_g{features}_f32")
    assert layout is not None
    scales = np.where(np.arange(40) % 2, 0.5, -2.0).astype(np.float32)[:, None]
    raw = Groups(layout, codes, scales, None).encode()
    x = rng.integers(-LEVELS["int16"], LEVELS["int16"] + 1, (9, features)).astype(np.float32)
    x[:, 7] = LEVELS["int16"]  # so a unit of each row is 1
    x[1], x[2] = LEVELS["int16"], -LEVELS["int16"]
    expected = (x.astype(np.int64) @ codes.view(np.int8).astype(np.int64).T).astype(np.float32) * scales[:, 0]
    for rows in (1, 2, 3, 4, 5, 9):
        y = _native.linear_test(layout.name, raw, x[:rows], "amx", activation)
        np.testing.assert_array_equal(y, expected[:rows], err_msg=str(rows))


@pytest.mark.skipif("avx512_vnni" not in ISAS, reason="compares with the kernels for AVX-512 VNNI, not available here")
@pytest.mark.parametrize("activation", sorted(LEVELS))
@pytest.mark.parametrize("name", INTEGERS)
def test_integer_kernels_give_the_same_bits_on_every_instruction_set(name: str, activation: str) -> None:
    out, features, most = 72, 2304, 70
    raw, x = random_weight(name, out, features), random_input(most, features)
    x[3, :40], x[5] = 0, 1e-35  # groups of zeros, and of numbers too small to have a scale
    whole = bits(_native.linear_test(name, raw, x, "avx512_vnni", activation))
    for rows in (1, 2, 3, 4, 5, 7, 8, 9, 31, 70):
        part = _native.linear_test(name, raw, x[:rows], "avx2", activation)
        np.testing.assert_array_equal(bits(part), whole[:rows], err_msg=str(rows))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", sorted(LEVELS))
@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q6_k"])
def test_extreme_codes_and_inputs_overflow_nowhere(name: str, isa: str, activation: str) -> None:
    """Every code and every input at its largest, of equal and of opposite signs: what 16-bit sums must hold."""
    out, features = 16, 512
    for codes in (0x00, 0x7F, 0x80, 0xFF):
        raw = np.full_like(random_weight(name, out, features), codes)
        block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]][1]
        for at in HALF_OFFSETS[name]:
            raw.reshape(out, -1, block)[:, :, at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        weight = _native.decode_rows(name, raw, features).astype(np.float64)
        x = np.ones((9, features), np.float32)
        x[1::2] = -1
        x[2::3, ::2] *= -1
        for rows in (1, 4, 9):
            y = _native.linear_test(name, raw, x[:rows], isa, activation)
            # where codes are rounded, they are to 2^-16 or 2^-8 of the largest there could be
            units = {"int16": 1.5, "int8": 129.5}[activation] if isa == "amx" else 0.0
            rounding = units * max(128 * 0.01, 2 * np.abs(weight).max()) / 32623 * features
            np.testing.assert_allclose(y, x[:rows] @ weight.T, rtol=1e-5, atol=1e-3 + rounding)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (17, 63), (16, 65), (33, 7)])
def test_plain_weights_take_odd_shapes(name: str, isa: str, shape: tuple[int, int]) -> None:
    out, features = shape
    raw = random_weight(name, out, features)
    weight = _native.decode_rows(name, raw, features).astype(np.float64)
    for rows in (1, 8, 19):
        x = random_input(rows, features)
        error = np.abs(_native.linear_test(name, raw, x, isa) - x.astype(np.float64) @ weight.T)
        assert (error <= (RELATIVE["f32"] + ROUNDING) * (np.abs(x).astype(np.float64) @ np.abs(weight).T)).all()


@pytest.mark.parametrize("isa", ISAS)
def test_no_rows_is_an_empty_product(isa: str) -> None:
    assert _native.linear_test("q4_0", random_weight("q4_0", 16, 64), random_input(0, 64), isa).shape == (0, 16)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["f32", "q4_1", "q8_0", "q6_k"])
def test_a_row_of_zeros_and_a_row_of_infinities_stay_their_own(name: str, isa: str, activation: str) -> None:
    raw, x = random_weight(name, 16, 256), random_input(4, 256)
    clean = bits(_native.linear_test(name, raw, x, isa, activation))
    x[1], x[2] = 0, np.inf
    y = _native.linear_test(name, raw, x, isa, activation)
    np.testing.assert_array_equal(bits(y)[[0, 3]], clean[[0, 3]])
    assert (y[1] == 0).all()
    assert not np.isfinite(y[2]).any()


@pytest.mark.parametrize(("name", "features", "block"), [("q4_0", 48, 32), ("q8_0", 33, 32), ("q4_k", 288, 256)])
def test_a_shape_that_does_not_fill_blocks_is_refused(name: str, features: int, block: int) -> None:
    raw, x = np.zeros((16, 64), np.uint8), random_input(1, features)
    with pytest.raises(ValueError, match=rf"\[16, {features}\] in {name}: in_features must be a multiple of {block}"):
        _native.linear_test(name, raw, x, "portable")


def test_damaged_scales_and_codes_of_row_blocks_show() -> None:
    """A group whose scale is NaN, or an e4m3 code that is, makes NaNs of its output alone, on every path."""
    for name in ROW_BLOCKS:
        layout = row_blocks(name)
        assert layout is not None
        groups = groups_in(layout, random_weight(name, 17, 768))
        if layout.element == "fp8":
            groups.codes[3, 700] = 0xFF
        else:
            groups.scales[3, -1] = np.nan
        raw, x = groups.encode(), random_input(9, 768)
        for isa in ISAS:
            for activation in ACTIVATIONS:
                for rows in (1, 9):
                    y = _native.linear_test(name, raw, x[:rows], isa, activation)
                    assert np.isnan(y[:, 3]).all(), (name, isa, activation)
                    assert np.isfinite(np.delete(y, 3, axis=1)).all(), (name, isa, activation)


@pytest.mark.parametrize("name", ["int4_g24_bf16", "int4_g0_bf16", "int4_g32_f64", "int5_g32_bf16", "int4_g32", "g32_"])
def test_row_blocks_that_no_kernel_reads_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}'"):
        _native.packed_bytes(name, 16, 96, "portable", "f32")


def test_unknown_formats_and_instruction_sets_are_refused() -> None:
    raw, x = np.zeros((16, 18), np.uint8), random_input(1, 32)
    with pytest.raises(ValueError, match="'q9_z'"):
        _native.linear_test("q9_z", raw, x, "portable")
    with pytest.raises(ValueError, match="'mmx' is not available here, only: portable"):
        _native.linear_test("q4_0", raw, x, "mmx")

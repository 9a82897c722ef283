"""Row blocks: names, bytes by hand, and the way there and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.base.errors import InvalidRequestError
from headrace.numerics.formats import PARTS, format_named
from headrace.numerics.quantize import quantize
from headrace.numerics.row_blocks import MXFP4, NVFP4, Groups, RowBlocks, repeat_scales, row_blocks
from headrace.numerics.schemes import WHOLE, Float8Scheme, IntegerScheme, Mxfp4Scheme, Nvfp4Scheme
from headrace.numerics.tensor import RawTensor


def groups_of(layout, codes, scales, zeros=None):
    as_bytes = np.array(codes, np.uint8)
    return Groups(layout, as_bytes, np.array(scales, np.float32), None if zeros is None else np.array(zeros, np.uint8))


@pytest.mark.parametrize(
    ("name", "block_size", "block_bytes"),
    [
        ("int4_g32_bf16", 32, 18),
        ("int4_g128_f32", 128, 68),
        ("uint4_g128_f16", 128, 67),
        ("int8_g576_f32", 576, 580),
        ("uint8_g64_bf16", 64, 67),
        ("fp8_g128_f32", 128, 132),
        ("fp8_g1_f32", 1, 5),
        ("mxfp4", 32, 17),
        ("nvfp4", 16, 12),
    ],
)
def test_names_and_sizes(name, block_size, block_bytes):
    found = format_named(name)
    assert (found.name, found.block_size, found.block_bytes) == (name, block_size, block_bytes)
    assert row_blocks(name).name == name


@pytest.mark.parametrize(
    "name",
    ["int4", "int4_g32", "int4_g0_f32", "int4_g031_f32", "int4_g33_f16", "int5_g32_f32", "ufp8_g32_f32", "int4_g32_f64",
     "fp4_g32_f32", "mxfp4_g32_f32", "int4_g32_bf16 ", "int4_g-1_f32", "int4_g9999999999_f32", ""],
)  # fmt: skip
def test_other_names_are_refused(name):
    assert row_blocks(name) is None
    with pytest.raises(InvalidRequestError, match=f"Number format '{name}' is not known"):
        format_named(name)


class TestBytesByHand:
    def test_int4(self):
        codes = [[8 - 7, 8 + 7, 8 + 1, 8]]
        groups = groups_of(RowBlocks("int4", 4, "bf16"), codes, [[0.5]])
        assert groups.encode().tolist() == [[0x00, 0x3F, 0xF1, 0x89]]
        assert groups.to_f32().tolist() == [[-3.5, 3.5, 0.5, 0]]

    def test_uint4(self):
        groups = groups_of(RowBlocks("uint4", 2, "f16"), [[0, 15, 3, 4]], [[1, 2]], [[3, 15]])
        assert groups.encode().tolist() == [[0x00, 0x3C, 3, 0xF0, 0x00, 0x40, 15, 0x43]]
        assert groups.to_f32().tolist() == [[-3, 12, -24, -22]]

    def test_int8_and_uint8(self):
        groups = groups_of(RowBlocks("int8", 3, "f32"), [[0x80, 0xFF, 0x7F]], [[2]])
        assert groups.encode().tolist() == [[0, 0, 0, 0x40, 0x80, 0xFF, 0x7F]]
        assert groups.to_f32().tolist() == [[-256, -2, 254]]
        groups = groups_of(RowBlocks("uint8", 2, "f32"), [[255, 0]], [[2]], [[200]])
        assert groups.encode().tolist() == [[0, 0, 0, 0x40, 200, 255, 0]]
        assert groups.to_f32().tolist() == [[110, -400]]

    def test_fp8(self):
        groups = groups_of(RowBlocks("fp8", 2, "f32"), [[0x38, 0xFE]], [[0.25]])
        assert groups.encode().tolist() == [[0, 0, 0x80, 0x3E, 0x38, 0xFE]]
        assert groups.to_f32().tolist() == [[0.25, -112]]

    def test_mxfp4_and_nvfp4(self):
        codes = np.tile(np.arange(16, dtype=np.uint8), (1, 2))
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
        nibbles = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
        mx = groups_of(MXFP4, codes, [[4]])
        assert mx.encode().tolist() == [[129, *nibbles, *nibbles]]
        np.testing.assert_array_equal(mx.to_f32()[0, :16], 4 * values)
        nv = groups_of(NVFP4, codes, [[1, 2]])
        assert nv.encode().tolist() == [[0, 0, 0x80, 0x3F, *nibbles, 0, 0, 0, 0x40, *nibbles]]
        np.testing.assert_array_equal(nv.to_f32()[0, 16:], 2 * values)


LAYOUTS = [
    *(RowBlocks(element, 6, scale)
      for element in ("int4", "uint4", "int8", "uint8", "fp8") for scale in ("f16", "bf16", "f32")),
    MXFP4,
    NVFP4,
]  # fmt: skip


@given(st.sampled_from(LAYOUTS), st.integers(1, 4), st.integers(1, 5), st.integers(0, 1 << 16))
def test_any_groups_survive_the_round_trip(layout, rows, num_groups, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << layout.bits, (rows, num_groups * layout.group_size), np.uint8)
    scales = np.ldexp(np.float32(1), rng.integers(-14, 15, (rows, num_groups))).astype(np.float32)
    scales[rng.random(scales.shape) < 0.2] = np.nan
    zeros = rng.integers(0, 1 << layout.bits, scales.shape, np.uint8) if layout.has_zero_point else None
    groups = Groups(layout, codes, scales, zeros)
    tensor = RawTensor.from_groups(groups)
    assert tensor.format.name == layout.name
    assert tensor.num_bytes == tensor.data.nbytes == scales.size * layout.block_bytes
    np.testing.assert_array_equal(tensor.to_f32(), groups.to_f32())


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (IntegerScheme(group_size=32), "int4_g32_bf16"),
        (IntegerScheme(group_size=WHOLE, symmetric=False, scale="f16"), "uint4_g384_f16"),
        (IntegerScheme(bits=8, group_size=WHOLE, scale="f32"), "int8_g384_f32"),
        (Float8Scheme(block=(128, 128)), "fp8_g128_f32"),
        (Mxfp4Scheme(), "mxfp4"),
        (Nvfp4Scheme(), "nvfp4"),
    ],
)
def test_what_is_quantized_is_stored_as_it_is(scheme, name):
    values = np.random.default_rng(0).standard_normal((200, 384)).astype(np.float32)
    groups = quantize(values, scheme)
    tensor = RawTensor.from_groups(groups)
    assert (tensor.format.name, tensor.shape) == (name, (200, 384))
    np.testing.assert_array_equal(tensor.to_f32().view(np.uint32), groups.to_f32().view(np.uint32))


def test_a_block_may_be_longer_than_a_decoding_chunk():
    values = np.random.default_rng(1).standard_normal((3, 1 << 17)).astype(np.float32)
    groups = quantize(values, IntegerScheme(bits=8, group_size=WHOLE))
    np.testing.assert_array_equal(RawTensor.from_groups(groups).to_f32(), groups.to_f32())


def test_a_scale_that_its_type_does_not_hold_is_no_scale():
    with pytest.raises(AssertionError, match="no bf16"):
        groups_of(RowBlocks("int8", 2, "bf16"), [[1, 2]], [[1 + 2.0**-20]]).encode()


def test_scales_of_blocks_are_repeated():
    group_size, scales = repeat_scales(np.array([[1, 2], [3, 4]], np.float32), (2, 6), (3, 8))
    assert group_size == 2
    assert scales.tolist() == [[1, 1, 1, 2], [1, 1, 1, 2], [3, 3, 3, 4]]


def test_damaged_scales_raise_no_warning(recwarn):
    groups = groups_of(RowBlocks("int8", 2, "f32"), [[0, 127, 0, 127]], [[np.inf, 3e38]])
    found = groups.to_f32()
    np.testing.assert_array_equal(found, np.array([[np.nan, np.inf, 0, np.inf]], np.float32))
    np.testing.assert_array_equal(RawTensor.from_groups(groups).to_f32(), found)
    assert not recwarn.list


@pytest.mark.parametrize("name", PARTS)
def test_parts_read_as_numbers(name):
    width = PARTS[name].block_bytes
    data = np.zeros((1, 2 * width), np.uint8)
    data[0, 0] = 0x7E
    expected = {"f8_e4m3": [448, 0], "f8_e8m0": [0.5, 2.0**-127]}.get(name, [0x7E, 0])
    assert RawTensor(PARTS[name], (2,), data).to_f32().tolist() == expected


def test_bytes_may_be_made_when_they_are_read():
    made = []

    def make():
        made.append(1)
        return np.arange(8, dtype=np.uint8).reshape(2, 4)

    tensor = RawTensor(format_named("u8"), (2, 4), make)
    assert (tensor.num_bytes, tensor.is_mapped) == (8, False)
    assert not made
    assert tensor.to_f32().tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    heads = RawTensor(tensor.format, (2, 4), make, interleaved_heads=1)
    np.testing.assert_array_equal(heads.data, tensor.data)

"""Number formats: names, sizes, hand-worked blocks, and the shapes that tensors give back."""

import re
from pathlib import Path

import numpy as np
import pytest

from headrace.numerics.formats import FORMATS, dequantize
from headrace.numerics.tensor import RawTensor
from tests.support.raw_tensors import random_tensor

NATIVE_HEADER = Path(__file__).parents[3] / "native/linear.h"


def half(value):
    return np.frombuffer(np.float16(value).tobytes(), np.uint8)


def block(*parts):
    return np.concatenate([np.asarray(part, np.uint8) for part in parts])[None]


def test_names_are_those_of_the_native_kernels():
    (names,) = re.findall(r"enum class Format[^{]*\{([^}]*)\}", NATIVE_HEADER.read_text())
    assert [name.strip() for name in names.split(",")] == [*FORMATS, "row_blocks"]


def test_row_bytes():
    assert FORMATS["q4_1"].row_bytes(64) == 40
    assert FORMATS["bf16"].row_bytes(7) == 14
    with pytest.raises(AssertionError, match="q4_1"):
        FORMATS["q4_1"].row_bytes(33)


def test_a_q4_0_block_by_hand():
    nibbles = np.arange(16) | (np.arange(16)[::-1] << 4)
    expected = 0.5 * (np.concatenate([np.arange(16), np.arange(16)[::-1]]) - 8)
    found = dequantize(FORMATS["q4_0"], block(half(0.5), nibbles), (32,))
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_a_q5_1_block_by_hand():
    fifth_bits = [0, 0, 0xFF, 0xFF]  # the last 16 values have theirs set
    found = dequantize(FORMATS["q5_1"], block(half(2), half(-1), fifth_bits, [0x21] * 16), (32,))
    np.testing.assert_array_equal(found, [2 * 1 - 1.0] * 16 + [2 * (2 + 16) - 1.0] * 16)


def test_a_q6_k_block_by_hand():
    scales = np.arange(-8, 8).astype(np.int8).view(np.uint8)
    found = dequantize(FORMATS["q6_k"], block([0] * 128, [0xFF] * 64, scales, half(0.25)), (256,))
    np.testing.assert_array_equal(found, np.repeat(0.25 * np.arange(-8, 8) * (0x30 - 32), 16))


@pytest.mark.parametrize("name", FORMATS)
def test_every_row_stands_alone(name):
    """A tensor larger than one decoding chunk reads as its rows do one by one."""
    tensor = random_tensor(name, (300, 256))
    values = tensor.to_f32()
    for row in (0, 255, 256, 299):
        alone = RawTensor(tensor.format, (256,), tensor.data[row : row + 1])
        np.testing.assert_array_equal(values[row], alone.to_f32())


def test_data_that_does_not_fit_the_shape():
    with pytest.raises(AssertionError, match="q8_0"):
        dequantize(FORMATS["q8_0"], np.zeros((2, 34), np.uint8), (3, 32))


def test_f32_is_viewed_not_copied():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = RawTensor.from_f32(values)
    assert tensor.shape == (2, 3)
    assert tensor.data.shape == (2, 12)
    assert tensor.num_bytes == 24
    assert np.shares_memory(tensor.to_f32(), values)
    np.testing.assert_array_equal(tensor.to_f32(), values)


@pytest.mark.parametrize("shape", [(), (0, 4), (3, 0)])
def test_scalars_and_empty_tensors(shape):
    tensor = RawTensor.from_f32(np.ones(shape, np.float32))
    assert tensor.to_f32().shape == shape


def test_damaged_scales_raise_no_warning(recwarn):
    data = block(half(np.inf), [0x88] * 16)  # infinity times zero
    assert np.isnan(dequantize(FORMATS["q4_0"], data, (32,))).all()
    assert not recwarn.list

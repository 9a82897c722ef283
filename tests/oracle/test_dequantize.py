"""Values read from every number format equal, bit for bit, those that the gguf package reads."""

import gguf
import numpy as np
import pytest

from headrace.numerics.formats import FORMATS
from headrace.numerics.tensor import RawTensor
from tests.support.raw_tensors import quantized, random_tensor

QUANTIZABLE = ["f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]


def oracle(tensor):
    kind = gguf.GGMLQuantizationType[tensor.format.name.upper()]
    return gguf.dequantize(tensor.data, kind).reshape(tensor.shape)


def assert_bits_equal(found, expected):
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(1, 256), (7, 512), (300, 1024), (2, 3, 256), (256,)])
def test_random_blocks(name, shape):
    tensor = random_tensor(name, shape, seed=len(shape))
    assert_bits_equal(tensor.to_f32(), oracle(tensor))


@pytest.mark.parametrize("name", FORMATS)
def test_any_bytes_at_all(name):
    """Scales of any bits: denormal, infinite, not a number. NaNs need only be NaNs."""
    number_format = FORMATS[name]
    data = np.random.default_rng(1).integers(0, 256, (512, number_format.row_bytes(256)), np.uint8)
    tensor = RawTensor(number_format, (512, 256), data)
    with np.errstate(all="ignore"):
        expected = oracle(tensor)
    found = tensor.to_f32()
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    assert_bits_equal(found[~nan], expected[~nan])


@pytest.mark.parametrize("name", QUANTIZABLE)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e3])
def test_what_gguf_quantizes(name, scale):
    values = (np.random.default_rng(2).normal(size=(64, 256)) * scale).astype(np.float32)
    tensor = quantized(values, name)
    assert_bits_equal(tensor.to_f32(), oracle(tensor))


@pytest.mark.parametrize("name", FORMATS)
def test_block_sizes(name):
    kind = gguf.GGMLQuantizationType[name.upper()]
    assert (FORMATS[name].block_size, FORMATS[name].block_bytes) == gguf.GGML_QUANT_SIZES[kind]


def test_bf16_rounding():
    values = np.random.default_rng(3).integers(0, 1 << 32, 100_000, np.uint32).view(np.float32)
    expected = gguf.quantize(values[None], gguf.GGMLQuantizationType.BF16)[0].view(np.uint16)
    found = quantized(values[None], "bf16").data[0].view(np.uint16)
    np.testing.assert_array_equal(found, expected)

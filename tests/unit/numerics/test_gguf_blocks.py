"""GGUF's blocks: what they are packed to is what the gguf package and `legacy_quants` unpack."""

import gguf
import numpy as np
import pytest

from headrace.numerics.gguf_blocks import gguf_format, gguf_tensor
from headrace.numerics.quantize import quantize
from headrace.numerics.row_blocks import RowBlocks
from headrace.numerics.schemes import GGUF_NAMES, scheme_named

VALUES = np.random.default_rng(0).standard_normal((20, 384)).astype(np.float32)
VALUES[0, :32], VALUES[1, :32], VALUES[2, 32:64] = 0, 0.25, np.abs(VALUES[2, 32:64]) + 3


@pytest.mark.parametrize("name", GGUF_NAMES)
def test_bits_of_the_gguf_package(name):
    groups = quantize(VALUES, scheme_named(name))
    tensor = gguf_tensor(groups)
    assert (tensor.format.name, tensor.shape) == (name, VALUES.shape)
    theirs = gguf.dequantize(tensor.data, gguf.GGMLQuantizationType[name.upper()])
    for found in (tensor.to_f32(), groups.to_f32()):
        np.testing.assert_array_equal(found.view(np.uint32) & 0x7FFFFFFF, theirs.view(np.uint32) & 0x7FFFFFFF)
        np.testing.assert_array_equal(found, theirs)


@pytest.mark.parametrize("name", GGUF_NAMES)
def test_no_worse_than_the_gguf_packages_own_rounding(name):
    """By the sum of squares: ours takes the rounded scale into account."""
    kind = gguf.GGMLQuantizationType[name.upper()]
    theirs = gguf.dequantize(gguf.quantize(VALUES, kind), kind)
    ours = gguf_tensor(quantize(VALUES, scheme_named(name))).to_f32()
    assert ((ours - VALUES) ** 2).sum() <= 1.001 * ((theirs - VALUES) ** 2).sum()


def test_damage_shows():
    damaged = VALUES.copy()
    damaged[3, 40] = np.inf
    for name in GGUF_NAMES:
        found = gguf_tensor(quantize(damaged, scheme_named(name))).to_f32()
        assert np.isnan(found[3, 32:64]).all()
        assert np.isnan(found).sum() == 32


def test_which_groups_fit():
    assert gguf_format(RowBlocks("int4", 32, "f16")) == "q4_0"
    for other in (RowBlocks("int4", 128, "f16"), RowBlocks("int4", 32, "bf16"), RowBlocks("uint4", 32, "f16")):
        assert gguf_format(other) is None

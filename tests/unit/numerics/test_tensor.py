"""Tensors as they are stored, turned into plain formats."""

import numpy as np
import pytest

from headrace.numerics.rounding import bf16_to_f32, f32_to_bf16
from headrace.numerics.tensor import RawTensor

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(8,), (4, 8), (3, 4, 8)])
def test_plain_formats_hold_the_nearest_values(shape):
    values = RNG.standard_normal(shape).astype(np.float32)
    exact = RawTensor.from_f32(values)
    for name, nearest in (
        ("f32", values),
        ("bf16", bf16_to_f32(f32_to_bf16(values))),
        ("f16", values.astype(np.float16).astype(np.float32)),
    ):
        found = exact.in_plain(name)
        assert (found.format.name, found.shape) == (name, shape)
        np.testing.assert_array_equal(found.to_f32(), nearest)
        assert found.in_plain(name) is found
        np.testing.assert_array_equal(found.in_plain("f32").to_f32(), nearest)

"""The native quantizer against the rule of `numerics.quantize`: the same bytes, whatever the values."""

import itertools

import numpy as np
import pytest

from headrace._native import available_isas
from headrace.base.errors import InvalidRequestError
from headrace.executors.native_quantize import quantize_tensor
from headrace.numerics.formats import FORMATS
from headrace.numerics.quantize import quantize
from headrace.numerics.rounding import f32_to_bf16
from headrace.numerics.schemes import WHOLE, IntegerScheme, scheme_named
from headrace.numerics.tensor import RawTensor

RNG = np.random.default_rng(0)
SCHEMES = [
    IntegerScheme(bits=bits, group_size=group, symmetric=symmetric, clip=clip, scale=scale)
    for bits, group, (symmetric, clip), scale in itertools.product(
        (4, 8), (32, 128, WHOLE), ((True, "narrow"), (True, "full"), (False, "narrow")), ("bf16", "f16", "f32")
    )
]


def matrices():
    """Ordinary values, values on ties, magnitudes across the whole range of float32, and every kind of damage."""
    yield RNG.standard_normal((64, 384)).astype(np.float32)
    yield RNG.integers(-15, 16, (32, 384)).astype(np.float32) / 2
    yield (RNG.standard_normal((64, 384)) * 10.0 ** RNG.integers(-44, 38, (64, 1))).astype(np.float32)
    odd = RNG.standard_normal((12, 384)).astype(np.float32)
    odd[0], odd[1, :32] = 0, -0.0
    odd[2, 5], odd[3, 40], odd[4, 70] = np.nan, np.inf, -np.inf
    odd[5], odd[6] = np.abs(odd[5]), -np.abs(odd[6])
    odd[7, ::2], odd[7, 1::2] = 3e38, -3e38
    odd[8, 0] = 1e6  # an outlier
    odd[9] = 1e-45
    odd[10] = 65504 * 7.75  # a scale beyond binary16
    yield odd


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_bytes_are_those_of_the_rule(scheme, isa):
    for values in matrices():
        bits = f32_to_bf16(values)
        for tensor in (RawTensor.from_f32(values), RawTensor(FORMATS["bf16"], values.shape, bits.view(np.uint8))):
            with np.errstate(all="ignore"):
                expected = RawTensor.from_groups(quantize(tensor.to_f32(), scheme))
            found = quantize_tensor(tensor, scheme, isa=isa)
            assert found.format == expected.format
            np.testing.assert_array_equal(found.data, expected.data)


@pytest.mark.parametrize("name", ["fp8-tensor", "fp8-channel", "fp8-block"])
def test_schemes_without_a_kernel_are_rounded_too(name):
    values, scheme = RNG.standard_normal((64, 384)).astype(np.float32), scheme_named(name)
    expected = RawTensor.from_groups(quantize(values, scheme))
    found = quantize_tensor(RawTensor.from_f32(values), scheme)
    assert found.format == expected.format
    np.testing.assert_array_equal(found.data, expected.data)


def test_groups_that_do_not_divide_are_an_error():
    with pytest.raises(InvalidRequestError, match="do not divide"):
        quantize_tensor(RawTensor.from_f32(np.ones((2, 48), np.float32)), IntegerScheme(group_size=32))

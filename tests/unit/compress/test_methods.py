"""GPTQ and AWQ on single matrices."""

import numpy as np
import pytest
import torch

from headrace.base.errors import InvalidRequestError
from headrace.compress.awq import awq_factors, output_error
from headrace.compress.gptq import gptq
from headrace.numerics.quantize import quantize
from headrace.numerics.schemes import WHOLE, GgufScheme, IntegerScheme

SCHEMES = [
    IntegerScheme(),
    IntegerScheme(group_size=64, symmetric=False),
    IntegerScheme(bits=8, group_size=WHOLE),
    IntegerScheme(bits=8, group_size=32, symmetric=False, scale="f16"),
    GgufScheme("q4_0"),
    GgufScheme("q4_1"),
]


@pytest.fixture
def weight():
    return torch.randn(48, 192, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def inputs():
    """Correlated, and of very different sizes."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(1000, 24, generator=generator) @ torch.randn(24, 192, generator=generator)
    sizes = torch.logspace(-1, 1, 192)[torch.randperm(192, generator=generator)]
    return (mixed + 0.3 * torch.randn(1000, 192, generator=generator)) * sizes


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gptq_without_correlations_is_rounding_to_nearest(weight, scheme):
    expected = quantize(weight.numpy(), scheme)
    for hessian in (torch.eye(192), torch.diag(torch.logspace(-3, 3, 192)), torch.zeros(192, 192)):
        found = gptq(weight, hessian, scheme)
        np.testing.assert_array_equal(found.codes, expected.codes)
        np.testing.assert_array_equal(found.scales, expected.scales)
        if expected.zeros is not None:
            np.testing.assert_array_equal(found.zeros, expected.zeros)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gptq_halves_the_error_of_outputs_at_least(weight, inputs, scheme):
    hessian = inputs.T @ inputs

    def error(groups):
        return output_error(torch.from_numpy(groups.to_f32()) - weight, hessian)

    assert error(gptq(weight, hessian, scheme)) < 0.5 * error(quantize(weight.numpy(), scheme))


def test_gptq_is_what_the_paper_says(weight, inputs):
    """Column by column, in order of the diagonal, each error spread over the rest by the inverse of what is left."""
    scheme, rows = IntegerScheme(group_size=WHOLE), weight[:4, :64]
    hessian = (inputs[:, :64].T @ inputs[:, :64]).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64)
    scales = torch.from_numpy(quantize(rows.numpy(), scheme).scales).double()
    left, expected = rows.double().clone(), torch.zeros_like(rows).double()
    remaining = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    while remaining:
        inverse = torch.linalg.inv(damped[remaining][:, remaining])
        column = remaining[0]
        expected[:, column] = torch.round(left[:, column] / scales[:, 0]).clamp(-7, 7) * scales[:, 0]
        error = (left[:, column] - expected[:, column]) / inverse[0, 0]
        left[:, remaining] -= error[:, None] * inverse[0]
        remaining = remaining[1:]
    found = torch.from_numpy(gptq(rows, hessian.float(), scheme).to_f32()).double()
    assert (found == expected).double().mean() > 0.98, "but for ties that rounding decides"


@pytest.mark.parametrize("scheme", [IntegerScheme(), IntegerScheme(bits=8, group_size=WHOLE)], ids=str)
def test_what_is_anchored_rounds_to_itself(weight, inputs, scheme):
    hessian = inputs.T @ inputs
    found = gptq(weight, hessian, scheme, anchored=True)
    again = quantize(found.to_f32(), scheme)
    np.testing.assert_array_equal(again.codes, found.codes)
    np.testing.assert_array_equal(again.scales, found.scales)
    errors = [
        output_error(torch.from_numpy(groups.to_f32()) - weight, hessian)
        for groups in (gptq(weight, hessian, scheme), found, quantize(weight.numpy(), scheme))
    ]
    assert errors[0] <= 1.05 * errors[1] < 0.7 * errors[2]


def test_groups_of_zeros_and_dead_inputs(weight, inputs):
    weight[:, :32], weight[3] = 0, 0
    inputs[:, 40:50] = 0
    found = gptq(weight, inputs.T @ inputs, IntegerScheme()).to_f32()
    assert (found[:, :32] == 0).all()
    assert (found[3] == 0).all()
    assert np.isfinite(found).all()


def test_activations_that_are_not_finite_are_an_error(weight):
    with pytest.raises(InvalidRequestError, match="not finite"):
        gptq(weight, torch.full((192, 192), torch.nan), IntegerScheme())


def test_awq_finds_factors_that_help_where_inputs_differ_in_size(weight, inputs):
    hessian, scheme = inputs.T @ inputs, IntegerScheme(group_size=64)
    factors = awq_factors([weight], inputs, hessian, [scheme])
    assert (factors > 0).all()
    scaled = torch.from_numpy(quantize((weight * factors).numpy(), scheme).to_f32()) / factors
    plain = torch.from_numpy(quantize(weight.numpy(), scheme).to_f32())
    assert output_error(scaled - weight, hessian) < 0.8 * output_error(plain - weight, hessian)

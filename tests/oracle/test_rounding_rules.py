"""Rounding to a scheme, against the packages whose rule it is."""

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle import forward
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from headrace.numerics.float4 import e2m1_to_f32
from headrace.numerics.float8 import e4m3_to_f32
from headrace.numerics.quantize import nvfp4_scales, quantize
from headrace.numerics.schemes import WHOLE, Float8Scheme, IntegerScheme, Mxfp4Scheme, Nvfp4Scheme

VALUES = np.random.default_rng(0).standard_normal((50, 768)).astype(np.float32)


def grouped(group_size):
    return torch.from_numpy(VALUES).reshape(len(VALUES), -1, group_size or VALUES.shape[1])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 128, WHOLE])
def test_the_full_range_is_compressed_tensors(bits, group_size):
    """Scales by its min-max rule, then codes by its rounding."""
    strategy = {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
    args = QuantizationArgs(num_bits=bits, **strategy)
    groups = grouped(group_size)
    scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    codes = forward.quantize(torch.from_numpy(VALUES), scales, zeros, args, dtype=torch.int8).numpy()
    found = quantize(VALUES, IntegerScheme(bits=bits, group_size=group_size, clip="full", scale="f32"))
    np.testing.assert_array_equal(found.scales, scales.numpy())
    signed = found.codes.view(np.int8) - np.int8(8) if bits == 4 else found.codes.view(np.int8)
    np.testing.assert_array_equal(signed, codes)


@pytest.mark.parametrize("group_size", [32, WHOLE])
def test_zero_points_are_compressed_tensors(group_size):
    strategy = {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
    args = QuantizationArgs(num_bits=4, symmetric=False, **strategy)
    groups = grouped(group_size)
    scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    found = quantize(VALUES, IntegerScheme(group_size=group_size, symmetric=False, scale="f32"))
    np.testing.assert_array_equal(found.scales, scales.numpy())
    np.testing.assert_array_equal(found.zeros.astype(int) - 8, zeros.numpy())
    codes = forward.quantize(torch.from_numpy(VALUES), scales, zeros, args, dtype=torch.int8).numpy()
    # It rounds the sum of ratio and zero point, we round the ratio: the same but for ties and the sum's last bit.
    differing = found.codes.astype(int) - 8 != codes
    assert differing.mean() < 1e-3
    np.testing.assert_allclose(found.to_f32()[differing], VALUES[differing], atol=0.51 * float(scales.max()))


def test_float8_rows_are_compressed_tensors():
    args = QuantizationArgs(num_bits=8, type="float", strategy="channel")
    groups = grouped(WHOLE)
    scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    codes = forward.quantize(torch.from_numpy(VALUES), scales, zeros, args, dtype=torch.float8_e4m3fn)
    found = quantize(VALUES, Float8Scheme(block=(1, WHOLE)))
    np.testing.assert_array_equal(found.scales, scales.numpy())
    np.testing.assert_array_equal(found.codes, codes.view(torch.uint8).numpy())


@pytest.mark.parametrize("spread", [1e-6, 1.0, 3e4])
def test_nvfp4_is_compressed_tensors(spread):
    """Both levels of scales, and the codes."""
    values = VALUES * np.float32(spread)
    args = preset_name_to_scheme("NVFP4A16", ["Linear"]).weights
    groups = torch.from_numpy(values).reshape(len(values), -1, 16)
    divisor = generate_gparam(groups.min(), groups.max())
    scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), args, divisor)
    codes, found = nvfp4_scales(values, Nvfp4Scheme())
    assert found == divisor.item()
    np.testing.assert_array_equal(e4m3_to_f32(codes), scales.float().numpy())
    steps = forward.quantize(torch.from_numpy(values), scales.float(), zeros, args, global_scale=divisor)
    found_steps = e2m1_to_f32(quantize(values, Nvfp4Scheme()).codes)
    assert (found_steps == steps.numpy()).mean() > 0.9999, "but for ties that the last bit of a quotient decides"


@pytest.mark.parametrize("spread", [1e-6, 1.0, 3e4])
def test_mxfp4_is_ggufs(spread):
    """The gguf package follows the same specification; its blocks have another order of nibbles."""
    values = VALUES * np.float32(spread)
    kind = gguf.GGMLQuantizationType.MXFP4
    blocks = gguf.quantize(values, kind)
    found = quantize(values, Mxfp4Scheme())
    np.testing.assert_array_equal(found.to_f32(), gguf.dequantize(blocks, kind))
    np.testing.assert_array_equal(found.encode().reshape(-1, 17)[:, 0], blocks.reshape(-1, 17)[:, 0])

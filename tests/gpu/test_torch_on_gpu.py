"""The reference executor and the rounding rules on a GPU, against the same on the CPU."""

from contextlib import closing
from itertools import pairwise

import numpy as np
import pytest
import torch

from headrace.align.forced import forced_logits
from headrace.executors.torch_executor import TorchExecutor
from headrace.numerics.fake_quantize import fake_quantize
from headrace.numerics.quantize import quantize
from headrace.numerics.schemes import Mxfp4Scheme, Nvfp4Scheme, scheme_named
from tests.support.tiny_llama import VOCAB, random_weights, tiny_llama

pytestmark = pytest.mark.gpu

GRAPH = tiny_llama(num_layers=3, window=9)
WEIGHTS = random_weights(GRAPH)
IDS = np.random.default_rng(0).integers(0, VOCAB, 40).tolist()
INTEGERS_AND_FLOATS = (
    "int4-g32", "int4-g128", "int4-g32-asym", "int8-channel", "int8-g64", "fp8-tensor", "fp8-channel", "fp8-block",
)  # fmt: skip
SCHEMES = [*(scheme_named(name) for name in INTEGERS_AND_FLOATS), Mxfp4Scheme(), Nvfp4Scheme()]


def logits(**options):
    with closing(TorchExecutor(GRAPH, WEIGHTS, num_blocks=4, **options)) as executor:
        return forced_logits(executor, GRAPH.output, IDS, rows_per_step=16)


@pytest.mark.parametrize("kv_format", ["f32", "bf16", "int8"])
def test_a_gpu_computes_what_the_cpu_computes(kv_format):
    found, expected = (logits(device=device, kv_format=kv_format) for device in ("cuda", "cpu"))
    # A rounded key may fall to the other side of a tie: then one code differs, by far less than the format's error.
    np.testing.assert_allclose(found, expected, atol=1e-4 if kv_format == "f32" else 5e-2)
    assert not np.array_equal(found, expected) or kv_format != "f32", "it did run somewhere else"


def test_precisions_are_ordered_on_a_gpu_too():
    exact = logits(device="cpu", dtype="float64")
    errors = [
        np.abs(logits(device="cuda", dtype=dtype) - exact).max()
        for dtype in ("float64", "float32", "float16", "bfloat16")
    ]
    assert all(less < more for less, more in pairwise(errors)), errors


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("spread", ["normal", "outliers", "zeros and infinities"])
def test_fake_quantization_has_the_bits_that_packing_stores(scheme, spread):
    values = np.random.default_rng(1).standard_normal((48, 256)).astype(np.float32)
    if spread == "outliers":
        values *= np.exp2(np.random.default_rng(2).integers(-20, 20, values.shape)).astype(np.float32)
    elif spread == "zeros and infinities":
        values[:16] = 0
        values[20, 3], values[21, 5] = np.inf, np.nan
    found = fake_quantize(torch.from_numpy(values).cuda(), scheme).cpu().numpy()
    np.testing.assert_array_equal(found, quantize(values, scheme).to_f32())

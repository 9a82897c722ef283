"""Each way of computing an op changes what it says it changes, by as much as its rounding can, and nothing else."""

from contextlib import closing

import numpy as np
import pytest

from headrace.align.forced import forced_values
from headrace.base.errors import InvalidRequestError
from headrace.executors.torch_executor import TorchExecutor
from headrace.executors.torch_numerics import Numerics, ops_with
from headrace.executors.torch_ops import REFERENCE_OPS
from headrace.numerics.rounding import round_to
from tests.support.tiny_llama import VOCAB, random_weights, tiny_llama

IDS = np.random.default_rng(0).integers(0, VOCAB, 40).tolist()
BF16 = 2.0**-8


@pytest.fixture(scope="module")
def values():
    """Every node's values under given options."""
    graph = tiny_llama()
    weights = random_weights(graph)
    made = {}

    def run(**options):
        key = tuple(sorted(options.items()))
        if key not in made:
            executor = TorchExecutor(graph, weights, num_blocks=8, numerics=Numerics(**options))
            with closing(executor):
                (made[key],) = forced_values(executor, IDS, [node.name for node in graph.nodes])
        return made[key]

    return run


def first_changed(found, exact):
    return next(name for name in exact if not np.array_equal(found[name], exact[name]))


@pytest.mark.parametrize(("options", "node", "least", "most"), [
    ({"rope": "f32"}, "layers.0.q_rope", 0, 1e-5),
    ({"rope": "bf16"}, "layers.0.q_rope", 1e-4, BF16),
    ({"norm": "bf16"}, "layers.0.attn_norm", 1e-4, 4 * BF16),
    ({"logits": "rounded"}, "logits", 1e-4, BF16),
    ({"logits": "bf16"}, "logits", 1e-4, 4 * BF16),
    ({"sums": "split4"}, "layers.0.q", 0, 1e-5),
    ({"sums": "reversed"}, "layers.0.q", 0, 1e-5),
    ({"residual": "add"}, "layers.0.attn_add", 1e-4, BF16),
    ({"residual": "layer"}, "layers.0.mlp_add", 1e-4, BF16),
    ({"inputs": "bf16"}, "layers.0.q", 1e-4, 2 * BF16),
    ({"inputs": "int8-channel"}, "layers.0.q", 1e-4, 0.05),
    ({"inputs": "fp8-channel", "inputs_of": "layers.1.[gud]*"}, "layers.1.gate", 1e-3, 0.1),
])  # fmt: skip
def test_it_is_seen_first_where_it_is_done(values, options, node, least, most):
    exact, found = values(), values(**options)
    assert first_changed(found, exact) == node
    error = np.linalg.norm(found[node] - exact[node]) / np.linalg.norm(exact[node])
    assert least < error < most


def test_roundings_are_those_of_the_formats(values):
    exact = values()
    np.testing.assert_array_equal(values(logits="rounded")["logits"], round_to("bf16", exact["logits"]))
    np.testing.assert_array_equal(
        values(residual="add")["layers.0.attn_add"], round_to("bf16", exact["layers.0.attn_add"])
    )
    assert len(np.unique(values(residual="layer")["layers.1.mlp_add"].view(np.uint32) & 0xFFFF)) == 1


def test_exact_is_the_reference():
    assert ops_with(Numerics(), "logits") == REFERENCE_OPS
    assert Numerics().is_exact
    assert not Numerics(norm="bf16").is_exact


@pytest.mark.parametrize("wrong", [
    {"rope": "f16"}, {"norm": "f32"}, {"sums": "split3"}, {"residual": "bf16"}, {"inputs": "int3"},
    {"inputs_of": "layers.*"},
])  # fmt: skip
def test_options_that_make_no_sense(wrong):
    with pytest.raises(InvalidRequestError):
        Numerics(**wrong)

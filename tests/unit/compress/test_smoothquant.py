"""SmoothQuant on a model with outliers that are made: norms louder in some channels, what reads them quieter there."""

import json

import numpy as np
import pytest

from headrace.base.errors import InvalidRequestError
from headrace.cli.main import main
from headrace.compress.gate import Evaluator
from headrace.compress.quantizer import quantize_weights
from headrace.compress.recipe import Recipe
from headrace.numerics.tensor import RawTensor
from tests.support.tiny_llama import HIDDEN, VOCAB, random_weights, tiny_llama
from tests.support.tiny_model import write_model

GRAPH = tiny_llama()
WEIGHTS = random_weights(GRAPH)
IDS = np.random.default_rng(0).integers(0, VOCAB, (8, 24))


def with_outliers(weights, factor=60.0):
    """The same function: inputs of every layer's linears are `factor` times as large in four channels."""
    loud = np.ones(HIDDEN, np.float32)
    loud[[3, 17, 40, 58]] = factor
    found = dict(weights)
    for node in GRAPH.nodes:
        reads_norm = node.op == "linear" and "_norm" in node.inputs[0]
        if node.op == "rms_norm" and "_norm" in node.name:
            found[node.params[0]] = RawTensor.from_f32(weights[node.params[0]].to_f32() * loud)
        elif reads_norm:
            found[node.params[0]] = RawTensor.from_f32(weights[node.params[0]].to_f32() / loud)
    return found


def kl(weights, method):
    recipe = Recipe(format="int8-channel", method=method, activation="int8")
    done = quantize_weights(GRAPH, weights, recipe, IDS)
    evaluator = Evaluator(GRAPH, weights, IDS.tolist())
    return evaluator.compare(done.weights, activation="int8").divergence.kl_mean


def test_outliers_cost_eight_bits_dearly_until_weights_take_them_over():
    loud = with_outliers(WEIGHTS)
    assert Evaluator(GRAPH, WEIGHTS, IDS.tolist()).compare(loud).divergence.kl_mean < 1e-6, "the same function"
    nearest, smooth = kl(loud, "rtn"), kl(loud, "smoothquant")
    assert nearest > 10 * kl(WEIGHTS, "rtn")
    assert smooth < 0.1 * nearest


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"format": "int4-g32", "activation": "int8"}, "weights of 8 bits"),
        ({"format": "fp8-channel", "activation": "int8"}, "weights of 8 bits"),
        ({"format": "int8-channel"}, "activations of 8 bits"),
        ({"format": "int8-channel", "activation": "int3"}, "are not judged"),
    ],
)
def test_it_is_for_eight_bits_on_both_sides(wrong, said):
    with pytest.raises(InvalidRequestError, match=said):
        Recipe(method="smoothquant", **wrong)


def test_the_card_says_what_was_judged(tmp_path):
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    small = ["--length", "48", "--calibration-texts", "4", "--held-out-texts", "3", "--no-gate"]
    assert main(["quantize", model, "-o", str(out), "--method", "smoothquant", "--format", "int8-channel", *small]) == 0
    assert "its own linears read int8" in (out / "card.md").read_text()
    assert json.loads((out / "card.json").read_text())["recipe"]["activation"] == "int8"

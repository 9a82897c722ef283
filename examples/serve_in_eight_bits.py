"""Eight bits everywhere: weights, activations, keys and values; and why loud channels need SmoothQuant first.

    python examples/serve_in_eight_bits.py

Large models have a few channels that are many times as loud as the rest. An 8-bit input has one scale for all of a
group, so loud channels leave the quiet ones few codes. The embedded model is too small to have such channels, so it is
given some: four channels of every norm are made 60 times as large, and what reads them 60 times as small. In f32 that
is the same function. To 8-bit activations it is not, until SmoothQuant moves the loudness into the weights.

The smooth model is then served as W8A8, with each number format of the KV cache in turn. (With AMX, inputs keep 16 bits
when it is served; what it is judged by is 8 everywhere.)
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from headrace import LLM, SamplingParams
from headrace.align.alignment import compare_all, token_windows
from headrace.align.subjects import Subject
from headrace.compress.export import hf_config
from headrace.compress.pipeline import Judging, judged, make_evaluator, open_source, write_folder
from headrace.compress.recipe import Recipe
from headrace.formats.weights import Weights
from headrace.numerics.tensor import RawTensor

JUDGING = Judging(length=48, calibration_texts=4, held_out_texts=2)
LOUD, FACTOR = (3, 117, 240, 555), 60
KV_FORMATS = ("bf16", "int8", "fp8", "int4")


def main(folder: Path) -> None:
    source = open_source(None)
    evaluator = make_evaluator(source, JUDGING)
    loud = replace(source, weights=Weights(with_loud_channels(source)))
    kl = evaluator.compare(loud.weights).divergence.kl_mean
    print(f"{len(LOUD)} channels {FACTOR} times as loud: in f32 the same function (KL {kl:.1e})")
    assert kl < 1e-4

    outcomes = {}
    for method in ("rtn", "smoothquant"):
        recipe = Recipe(format="int8-channel", method=method, activation="int8")
        outcomes[method] = judged(loud, recipe, JUDGING, evaluator, folder / method)
        print(f"W8A8 by {method:12} KL {outcomes[method].evaluation.divergence.kl_mean:.4f}")
    nearest, smooth = (outcome.evaluation.divergence.kl_mean for outcome in outcomes.values())
    assert smooth < 0.2 * nearest

    target, made = folder / "w8a8", outcomes["smoothquant"].quantized
    write_folder(source, hf_config(source.checkpoint, source.spec), made.weights, made.schemes, target, {})
    compare_caches(str(target), token_windows(source.tokenizer, None, count=2, length=48))
    with LLM(str(target), activation="int8", kv_format="int8") as llm:
        (result,) = llm.chat([{"role": "user", "content": "What is the capital of France?"}], GREEDY)
        print(f"served: {result.outputs[0].text!r}")


GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


def with_loud_channels(source):
    """Every layer's norms louder in some channels, and the columns that read them quieter."""
    factors = np.ones(source.spec.hidden_size, np.float32)
    factors[list(LOUD)] = FACTOR
    found = dict(source.weights)
    norms = {
        node.name: node.params[0] for node in source.graph.nodes if node.op == "rms_norm" and "layers" in node.name
    }
    for name in norms.values():
        found[name] = RawTensor.from_f32(source.weights[name].to_f32() * factors)
    for node in source.graph.nodes:
        if node.op == "linear" and node.inputs[0] in norms:
            found[node.params[0]] = RawTensor.from_f32(source.weights[node.params[0]].to_f32() / factors)
    return found


def compare_caches(model, tokens):
    """The same W8A8 model over keys and values in fewer and fewer bits."""
    subjects = [Subject(model=model, activation="int8", kv=each) for each in KV_FORMATS]
    exact = Subject(model=model, activation="int8", kv="f32")
    found = compare_all(exact, subjects, tokens, progress=lambda done: None)
    for name, divergence in zip(KV_FORMATS, found, strict=True):
        print(
            f"KV in {name:5} KL {divergence.kl_mean:.5f}, same likeliest token {100 * divergence.top1_agreement:.1f} %"
        )
    assert found[KV_FORMATS.index("int8")].kl_mean < found[KV_FORMATS.index("int4")].kl_mean


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(Path(made))

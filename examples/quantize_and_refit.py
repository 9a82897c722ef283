"""Quantize a model, see what that did, serve it, and give it new weights while it answers.

python examples/quantize_and_refit.py           # seconds: rounding to nearest, little text
python examples/quantize_and_refit.py --full    # minutes: GPTQ
"""

import argparse
import tempfile
from pathlib import Path

from headrace import LLM, SamplingParams
from headrace.compress.export import hf_named
from headrace.compress.gate import Thresholds
from headrace.compress.pipeline import Judging, quantize_model
from headrace.compress.recipe import Recipe
from headrace.llm.loader import open_model

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    full = parser.parse_args().full
    no_limits = Thresholds(kl=None, flips=None, perplexity=None)
    judging = Judging() if full else Judging(length=64, calibration_texts=4, held_out_texts=2, thresholds=no_limits)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "int4"
        recipe = Recipe(method="gptq" if full else "rtn")
        card = quantize_model(None, target, recipe, judging, command=["examples"], progress=lambda name: None)
        found = card.evaluation.divergence
        print(f"{card.bits_per_weight:.2f} bits a weight, {card.quantized_speed:.0f} tokens/s")
        print(
            f"mean KL to the source {found.kl_mean:.3f}, likeliest token the same at {100 * found.top1_agreement:.1f} %"
        )

        # The masters: here the source's own weights, by their Hugging Face names, as a trainer would send them.
        source = open_model(None)
        masters = hf_named(source.spec, {name: tensor.in_plain("f32") for name, tensor in source.weights.items()})
        with LLM(str(target)) as llm:
            stream = llm.stream(llm.render_chat(QUESTION), GREEDY)
            versions = list(next(stream).weight_versions)
            update = llm.update_weights(masters, running="recompute")
            text = ""
            for delta in stream:
                text += delta.text
                versions += delta.weight_versions
            rounded, packed, swapped = (update.seconds[part] for part in ("convert", "pack", "swap"))
            print(f"{update.requantized} matrices rounded anew in {rounded:.2f} s and packed in {packed:.2f} s")
            print(f"exchanged in {1e6 * swapped:.0f} microseconds")
            print(f"the answer goes on: {text!r}, its tokens of weights {versions}")


if __name__ == "__main__":
    main()

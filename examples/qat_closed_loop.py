"""Train a model to bear int4, serve it, train on what it says, and serve that: one loop, one set of bits.

    python examples/qat_closed_loop.py           # under a minute: a few steps on the embedded model
    python examples/qat_closed_loop.py --full    # a quarter of an hour: closes most of the gap that rounding opens

1. Quantization-aware training: the student sees its matrices rounded to int4, the teacher is the model itself.
2. The masters are packed into a folder, by the rule that training rounded with, and an engine serves it.
3. The engine samples. The trainer asks for the log-probabilities of those tokens and gets the engine's own, bit for
   bit, with a gradient: importance ratios are exactly one, and nothing is clipped.
4. One step of policy gradient, the running engine takes the new masters, and the two still agree in every bit.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from headrace import LLM, SamplingParams
from headrace.compress.export import hf_named
from headrace.compress.pipeline import Judging
from headrace.compress.recipe import Recipe
from headrace.llm.config import LLMConfig
from headrace.train.loop import TrainingConfig
from headrace.train.qat import QatConfig, train_qat
from headrace.train.served import ServedLogprobs

PROMPT = "The capital of France is"
SAMPLED = SamplingParams(n=2, max_tokens=16, temperature=1.0, logprobs=0, ignore_eos=True, seed=1)

FEW_STEPS = QatConfig(
    recipe=Recipe(format="int4-g32"),
    training=TrainingConfig(steps=4, batch_size=2),
    start="weights",
    data=("corpus",),
    sequences=8,
    length=64,
)
FULL = QatConfig(recipe=Recipe(format="int4-g32"), training=TrainingConfig(steps=72), sequences=576)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    full = parser.parse_args().full
    judging = Judging() if full else Judging(length=64, held_out_texts=2)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "int4"
        result = train_qat(None, target, FULL if full else FEW_STEPS, judging, report=report)
        print(
            f"KL to the source: {result.nearest.kl_mean:.3f} rounded to nearest, {result.trained.kl_mean:.3f} trained"
        )
        assert result.trained.kl_mean < result.nearest.kl_mean
        close_the_loop(str(target), result.model)


def close_the_loop(folder, model):
    """A step of REINFORCE between two rounds of sampling; the trainer's log-probabilities are the engine's."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with LLM(folder) as llm:
        trainer = ServedLogprobs(model, llm.model, LLMConfig(), max_len=64)
        for _ in range(2):
            trainer.refresh()
            loss, gap = torch.zeros(()), 0.0
            (rollout,) = llm.generate(PROMPT, SAMPLED)
            for sample in rollout.outputs:
                said = np.array([token.logprob for token in sample.logprobs], np.float32)
                found = trainer([*rollout.prompt_token_ids, *sample.token_ids])[-len(said) :]
                gap = max(gap, float(np.abs(found.detach().numpy() - said).max()))
                loss = loss - reward(sample.text) * found.sum()
            print(f"weights {llm.weight_version}: largest |Δ log-probability| between trainer and engine {gap}")
            assert gap == 0
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            llm.update_weights(hf_named(llm.model.spec, model.weights()))
        trainer.close()


def reward(text):
    """What a policy might be wanted to do: to be brief about it."""
    return 1.0 if "Paris" in text else -0.1 * text.count(" ")


def report(step, figures):
    print(f"step {step + 1}: KL to the teacher {figures['loss']:.3f}, {figures['seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    main()

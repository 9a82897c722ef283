"""The embedded model's greedy tokens on fifty prompts, against transformers on the same dequantized weights in f32."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from headrace.formats.resolve import resolve_model
from tests.support.executors import executor_of
from tests.support.prompts import PROMPTS
from tests.support.real_model import load_transformers_llama
from tests.support.stepping import Stepper

NUM_TOKENS = 32
NEAR_TIE = 1e-3
"""Where the oracle's two largest logits are closer than this, either is right."""
TOKENS_PER_STEP = 1024
NUM_BLOCKS = 400


@dataclass(frozen=True)
class Answer:
    """What transformers makes of one prompt: its greedy tokens, and how far the second best was at each."""

    prompt_ids: list[int]
    token_ids: np.ndarray
    gaps: np.ndarray


@pytest.fixture(scope="module")
def answers() -> list[Answer]:
    """All prompts decoded at once, padded on the left."""
    path = resolve_model()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    width = max(map(len, prompts))
    model = load_transformers_llama(path)
    with torch.inference_mode():
        made = model.generate(
            torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts]),
            attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = [logits.topk(2, dim=-1).values for logits in made.logits]
    gaps = torch.stack([pair[:, 0] - pair[:, 1] for pair in best], dim=1).numpy()
    return [
        Answer(ids, tokens, gap)
        for ids, tokens, gap in zip(prompts, made.sequences[:, width:].numpy(), gaps, strict=True)
    ]


def teacher_forced(stepper: Stepper, answers: list[Answer]) -> np.ndarray:
    """The argmax after the prompt and after each of the oracle's tokens but the last, [answers, NUM_TOKENS].

    Several answers share a step, as many as fit.
    """
    work: dict[str, list[int]] = {}
    found: list[np.ndarray] = []
    for i, answer in enumerate(answers):
        work[str(i)] = answer.prompt_ids + answer.token_ids[:-1].tolist()
        upcoming = len(answers[i + 1].prompt_ids) + NUM_TOKENS if i + 1 < len(answers) else TOKENS_PER_STEP
        if sum(map(len, work.values())) + upcoming > TOKENS_PER_STEP:
            found.append(stepper.run(work, sampled=NUM_TOKENS).token_ids.reshape(-1, NUM_TOKENS))
            work = {}
    return np.concatenate(found)


Report = Callable[[str], None]


def agreement(found: np.ndarray, answers: list[Answer], what: str, report: Report) -> np.ndarray:
    """Where the tokens are the oracle's; in how many places goes to the summary."""
    equal = found == np.stack([answer.token_ids for answer in answers])
    report(f"greedy tokens equal to transformers', {what}: {equal.sum()} of {equal.size} ({equal.mean():.2%})")
    return equal


@pytest.mark.parametrize(("kind", "num_prompts"), [("native", len(PROMPTS)), ("torch", 16)])
def test_every_greedy_token_is_the_oracle_s(
    answers: list[Answer], kind: str, num_prompts: int, report_figure: Report
) -> None:
    """Prefill of prompt and answer: the argmax at every position, unless the oracle itself is near a tie there."""
    answers = answers[:: len(answers) // num_prompts][:num_prompts]
    with executor_of(kind, resolve_model(), num_blocks=NUM_BLOCKS, max_rows=TOKENS_PER_STEP) as executor:
        found = teacher_forced(Stepper(executor), answers)
    equal = agreement(found, answers, f"{kind}, teacher-forced", report_figure)
    near_tie = np.stack([answer.gaps for answer in answers]) <= NEAR_TIE
    assert near_tie.mean() < 0.01, "so many near-ties would leave nothing to compare"
    assert (equal | near_tie).all(), f"(answer, position): {np.argwhere(~(equal | near_tie)).tolist()}"


@pytest.mark.parametrize(("kind", "num_prompts"), [("native", len(PROMPTS)), ("torch", 8)])
def test_free_running_answers_are_the_oracle_s(
    answers: list[Answer], kind: str, num_prompts: int, report_figure: Report
) -> None:
    """Prefill and batched decode: equal answers, each up to the oracle's first near-tie."""
    answers = answers[:: len(answers) // num_prompts][:num_prompts]
    with executor_of(kind, resolve_model(), num_blocks=NUM_BLOCKS, max_rows=TOKENS_PER_STEP) as executor:
        prompts = {str(i): answer.prompt_ids for i, answer in enumerate(answers)}
        found = np.array(list(Stepper(executor).greedy(prompts, NUM_TOKENS).values()))
    equal = agreement(found, answers, f"{kind}, free-running", report_figure)
    for i, answer in enumerate(answers):
        ties = np.flatnonzero(answer.gaps <= NEAR_TIE)
        comparable = ties[0] if len(ties) else NUM_TOKENS
        assert equal[i, :comparable].all(), f"answer {i} differs before its first near-tie, at {comparable}"


@pytest.mark.parametrize(("activation", "least"), [("int16", 0.995), ("bf16", 0.98), ("int8", 0.95)])
def test_less_exact_activations_agree_as_far_as_they_should(
    answers: list[Answer], activation: str, least: float, report_figure: Report
) -> None:
    with executor_of(
        "native", resolve_model(), num_blocks=NUM_BLOCKS, max_rows=TOKENS_PER_STEP, activation=activation
    ) as executor:
        found = teacher_forced(Stepper(executor), answers)
    what = f"native with {activation} activations, teacher-forced"
    assert agreement(found, answers, what, report_figure).mean() >= least


def test_default_precision_agrees_nearly_everywhere(answers: list[Answer], report_figure: Report) -> None:
    """As served by default, keys and values in bf16: rounding decides only where the model hardly prefers a token."""
    with executor_of(
        "native",
        resolve_model(),
        num_blocks=NUM_BLOCKS,
        max_rows=TOKENS_PER_STEP,
        kv_format="bf16",
        activation="auto",
    ) as executor:
        found = teacher_forced(Stepper(executor), answers)
    assert (
        agreement(
            found, answers, "native with its default activations and bf16 KV, teacher-forced", report_figure
        ).mean()
        >= 0.97
    )

"""Every family, from every kind of file, on both executors: the same logits and greedy tokens as transformers."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests.support import hf_models
from tests.support.executors import EXECUTORS, executor_of
from tests.support.stepping import Stepper

TOLERANCE = 1e-4
NEAR_TIE = 1e-3
LENGTH = 48
"""Tokens of the compared sequence: more than `hf_models.MAX_POSITIONS`, several times any window."""

Case = tuple[PreTrainedModel, Path]

CASES = [(name, "hf") for name in hf_models.CONFIGS] + [(name, "F32") for name in hf_models.GGUF_NAMES]
QUANTIZED = [("llama", number_format) for number_format in hf_models.PLAIN_AND_LEGACY_FORMATS] + [
    ("llama-wide", number_format) for number_format in hf_models.K_FORMATS
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from torch's threads, which on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    """The model of a name, in a Hugging Face folder ("hf") or a GGUF file of a number format, and its path."""
    made: dict[tuple[str, str], Case] = {}

    def make(name: str, file_format: str) -> Case:
        if (name, file_format) not in made:
            model = hf_models.make_model(name)
            target = tmp_path_factory.mktemp("model")
            if file_format == "hf":
                path = hf_models.write_hf(model, target)
            else:
                path = hf_models.write_gguf(model, target / "model.gguf", file_format)
            made[name, file_format] = model, path
        return made[name, file_format]

    return make


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 320, count).tolist()


@torch.inference_mode()
def true_logits(model: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    return model(torch.tensor([tokens])).logits[0].numpy()


@torch.inference_mode()
def clear_prompt(model: PreTrainedModel, length: int, count: int) -> tuple[list[int], list[int]]:
    """The first random prompt that the model continues without a near-tie between two tokens, and its continuation.

    Only there does a greedy token not depend on the order in which float32 sums are taken.
    """
    seed = 0
    while True:
        tokens = random_tokens(length, seed)
        made = model.generate(
            torch.tensor([tokens]),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(made.logits).topk(2, dim=-1).values
        if (best[:, 0] - best[:, 1]).min() > NEAR_TIE:
            return tokens, made.sequences[0, length:].tolist()
        seed += 1


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE, f"relative error {error:.2e}"


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize(("name", "file_format"), CASES + QUANTIZED)
def test_logits_of_prefill_and_decode(case, name: str, file_format: str, kind: str) -> None:
    """Two thirds of the sequence in one step, then token by token."""
    model, path = case(name, file_format)
    tokens = random_tokens(LENGTH)
    expected = true_logits(model, tokens)
    prefill = 2 * LENGTH // 3
    with executor_of(kind, path, context_length=LENGTH) as executor:
        stepper = Stepper(executor)
        assert_close(stepper.logits({"a": tokens[:prefill]})["a"], expected[:prefill])
        for i in range(prefill, LENGTH):
            assert_close(stepper.logits({"a": tokens[i : i + 1]})["a"], expected[i : i + 1])


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize(("name", "file_format"), CASES)
def test_greedy_continuation(case, name: str, file_format: str, kind: str) -> None:
    """Prompts of several lengths, decoded together within the model's own context."""
    model, path = case(name, file_format)
    count = hf_models.MAX_POSITIONS - 16
    expected = {str(length): clear_prompt(model, length, count) for length in (9, 13, 16)}
    prompts = {key: prompt for key, (prompt, _) in expected.items()}
    with executor_of(kind, path) as executor:
        found = Stepper(executor).greedy(prompts, count)
    assert found == {key: tokens for key, (_, tokens) in expected.items()}


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_ragged_batches_and_chunks(case, name: str, kind: str) -> None:
    """Three sequences whose chunks, decode tokens and block boundaries fall anywhere, in changing company."""
    model, path = case(name, "hf")
    sequences = {key: random_tokens(40, seed=i) for i, key in enumerate("abc")}
    schedule = [{"a": 5}, {"a": 1, "b": 17}, {"b": 1, "c": 3, "a": 16}, {"a": 1, "b": 1, "c": 1}, {"c": 30, "b": 21},
                {"a": 17, "c": 6}]  # fmt: skip
    found: dict[str, list[np.ndarray]] = {key: [] for key in sequences}
    with executor_of(kind, path, block_size=4) as executor:
        stepper = Stepper(executor)
        for step in schedule:
            done = {key: sum(map(len, found[key])) for key in step}
            work = {key: sequences[key][done[key] : done[key] + count] for key, count in step.items()}
            for key, logits in stepper.logits(work).items():
                found[key].append(logits)
    for key, tokens in sequences.items():
        assert_close(np.concatenate(found[key]), true_logits(model, tokens))


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen3", "gemma3"])
def test_fused_graph_equals_unfused(case, name: str, kind: str) -> None:
    _, path = case(name, "F32")
    tokens = random_tokens(LENGTH)
    logits = []
    for fused in (False, True):
        with executor_of(kind, path, fused=fused) as executor:
            logits.append(Stepper(executor).logits({"a": tokens})["a"])
    assert np.abs(logits[0] - logits[1]).max() <= 1e-6 * np.abs(logits[0]).max()


@pytest.mark.parametrize("kind", EXECUTORS)
def test_bf16_kv_rounds_and_no_more(case, kind: str) -> None:
    """Keys and values keep 8 bits: the logits move, by a hundredth at most."""
    model, path = case("llama", "hf")
    tokens = random_tokens(LENGTH)
    expected = true_logits(model, tokens)
    with executor_of(kind, path, kv_format="bf16") as executor:
        found = Stepper(executor).logits({"a": tokens})["a"]
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert TOLERANCE < error < 1e-2

"""What rounding the KV cache costs the embedded model, against the same executor with keys and values in f32."""

from collections.abc import Callable

import numpy as np
import pytest
from transformers import AutoTokenizer

from headrace.formats.resolve import resolve_model
from tests.support.executors import executor_of
from tests.support.prompts import PROMPTS
from tests.support.stepping import Stepper

CHUNK = 64
"""Tokens of a step, so that most keys and values are read from the cache of earlier steps."""

# Bounds in nats: mean KL divergence from f32, and the largest change of the logprob of a token that came next.
BOUNDS = {"bf16": (1.5e-4, 0.4), "int8": (3e-3, 1.5), "fp8": (2e-2, 3.0), "int4": (0.1, 8.0)}


@pytest.fixture(scope="module")
def text() -> list[int]:
    """One text of some hundred tokens: prose, code, other languages."""
    path = resolve_model()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)("\n\n".join(PROMPTS))["input_ids"]


@pytest.fixture(scope="module")
def exact(text: list[int]) -> np.ndarray:
    return logprobs(text, "f32")


def logprobs(text: list[int], kv_format: str) -> np.ndarray:
    """Of every token of the vocabulary after each token of the text, float64."""
    with executor_of(
        "native", resolve_model(), num_blocks=len(text) // 16 + 1, max_rows=CHUNK, kv_format=kv_format
    ) as executor:
        stepper = Stepper(executor)
        chunks = [text[i : i + CHUNK] for i in range(0, len(text), CHUNK)]
        logits = np.concatenate([stepper.logits({"text": chunk})["text"] for chunk in chunks]).astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("kv_format", list(BOUNDS))
def test_divergence_from_f32(
    text: list[int], exact: np.ndarray, kv_format: str, report_figure: Callable[[str], None]
) -> None:
    found = logprobs(text, kv_format)
    kl = (np.exp(exact) * (exact - found)).sum(axis=-1)
    following = np.arange(len(text) - 1), np.array(text[1:])
    change = np.abs(found[following] - exact[following])
    report_figure(
        f"KV in {kv_format} against f32, {len(text)} tokens: KL {kl.mean():.1e} nats (largest {kl.max():.1e}), "
        f"logprob of the next token changes by {change.mean():.1e} (largest {change.max():.1e}), "
        f"argmax equal at {(found.argmax(-1) == exact.argmax(-1)).mean():.1%}"
    )
    mean_kl, largest_change = BOUNDS[kv_format]
    assert 0 < kl.mean() < mean_kl
    assert change.max() < largest_change

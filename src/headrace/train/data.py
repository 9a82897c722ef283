"""What to train on: pieces of texts, a user's or Python's, and of what the model itself says."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from headrace.align.corpus import texts
from headrace.align.documents import read_tokens
from headrace.base.errors import InvalidRequestError
from headrace.engine.sampling import SamplingParams
from headrace.llm.llm import LLM
from headrace.llm.text_side import TextSide
from headrace.text.tokenizer import Tokenizer

SOURCES = ("own", "chat", "corpus")
_OPENING = 4  # tokens of a text that an own sample begins with
_USER_SAYS = "what the user says"  # where a chat template puts it, a sample begins


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token ids ``[count, length]``, int64: whole pieces without padding, one document each."""

    ids: np.ndarray

    def batches(self, size: int, seed: int) -> Callable[[int], np.ndarray]:
        """The batch of a step: ``[size, length]``. A pure function of the step, so a resumed run sees the same ones;
        every piece comes once before any comes twice."""
        count = len(self.ids)
        if size > count:
            raise InvalidRequestError(f"{count} sequences are fewer than a batch of {size}.", "Ask for more, or less.")

        @lru_cache(2)  # a batch touches two epochs at most
        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng((seed, epoch)).permutation(count)

        def batch(step: int) -> np.ndarray:
            places = (divmod(i, count) for i in range(step * size, (step + 1) * size))
            return self.ids[[order(epoch)[at] for epoch, at in places]]

        return batch


def corpus_sequences(tokenizer: Tokenizer, count: int, length: int, seed: int) -> Sequences:
    """Pieces of the calibration texts (`headrace.align.corpus`), chosen at random without repetition."""
    documents = (tokenizer.encode(text) for text in texts("calibration"))
    return _chosen("The corpus", documents, count, length, seed)


def file_sequences(path: Path, text: TextSide, count: int, length: int, seed: int) -> Sequences:
    """Pieces of a file's text, chosen at random without repetition. Raises as `read_tokens` does."""
    return _chosen(str(path), [read_tokens(path, text)], count, length, seed)


def _chosen(name: str, documents: Iterable[list[int]], count: int, length: int, seed: int) -> Sequences:
    found = [
        np.array(ids[at : at + length], np.int64) for ids in documents for at in range(0, len(ids) - length + 1, length)
    ]
    if len(found) < count:
        raise InvalidRequestError(f"{name} has {len(found)} pieces of {length} tokens, not {count}.", "Ask for fewer.")
    order = np.random.default_rng(seed).permutation(len(found))[:count]
    return Sequences(np.stack([found[i] for i in order]))


def own_sequences(llm: LLM, count: int, length: int, seed: int) -> Sequences:
    """What the model says itself after the first tokens of texts: no data but openings."""
    openings = [
        ids[:_OPENING] for text in texts("calibration") if len(ids := llm.tokenizer.encode(text[:200])) >= _OPENING
    ]
    return _said(llm, [openings[i % len(openings)] for i in range(count)], length, seed)


def chat_sequences(llm: LLM, count: int, length: int, seed: int) -> Sequences:
    """Conversations that the model makes up, both sides of them: no data at all (Magpie, arXiv:2406.08464).

    Raises:
        TemplateError: the model has no chat template.
        InvalidRequestError: its template puts nothing before what a user says, or changes that, or takes `length`
            tokens or more until then.
    """
    message = {"role": "user", "content": _USER_SAYS}
    opening, said, _ = llm.model.text.template.render([message], add_generation_prompt=False).partition(_USER_SAYS)
    if not (opening and said):
        raise InvalidRequestError(
            "The chat template shows no beginning of a user's turn.", "Use other data than chat: own or corpus."
        )
    ids = llm.tokenizer.encode(opening, add_special_tokens=False)
    if len(ids) >= length:
        raise InvalidRequestError(
            f"The chat template begins a user's turn with {len(ids)} tokens; sequences have {length}.",
            "Ask for longer sequences.",
        )
    return _said(llm, [ids] * count, length, seed)


def _said(llm: LLM, prompts: list[list[int]], length: int, seed: int) -> Sequences:
    """Prompts and what the model says after them at temperature 1, past the ends that it sees."""
    params = [
        SamplingParams(max_tokens=length - len(prompt), temperature=1.0, ignore_eos=True, seed=seed + i)
        for i, prompt in enumerate(prompts)
    ]
    results = llm.generate(prompts, params)
    return Sequences(np.array([[*r.prompt_token_ids, *r.outputs[0].token_ids] for r in results], np.int64))

"""What to train on: pieces of Python's documents or of a user's file, and batches of any text."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from headrace.align.corpus import texts
from headrace.align.documents import read_tokens
from headrace.base.errors import InvalidRequestError
from headrace.llm.text_side import TextSide
from headrace.text.tokenizer import Tokenizer


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

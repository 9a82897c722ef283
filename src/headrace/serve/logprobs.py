"""Logprobs in the two shapes of the OpenAI API, from the model's raw distribution."""

import codecs
from collections.abc import Sequence
from math import isnan
from typing import Any

from headrace.llm.outputs import TokenLogprob
from headrace.serve.model import TokenTexts

_MINUS_INFINITY = -9999.0
"""What OpenAI sends for a probability of zero, which JSON cannot write."""


def chat_logprobs(entries: Sequence[TokenLogprob], texts: TokenTexts) -> dict[str, Any]:
    """The chat shape: each token with its bytes, since a token may hold a part of a character only."""
    content = [
        {
            **_chat_entry(entry.token_id, entry.logprob, texts),
            "top_logprobs": [_chat_entry(token_id, logprob, texts) for token_id, logprob in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _chat_entry(token_id: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    raw = texts.token_bytes(token_id)
    return {"token": raw.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(raw)}


class CompletionLogprobs:
    """The completions shape, over one choice's life: it counts where each token begins in the choice's text."""

    def __init__(self, texts: TokenTexts, *, names_ids: bool = False) -> None:
        self._texts = texts
        self._names_ids = names_ids
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def extend(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The next tokens. ``text_offset`` counts characters; a token inside a character has that character's.

        A token that nothing precedes has null for its logprobs.
        """
        tokens, offsets = [], []
        for entry in entries:
            raw = self._texts.token_bytes(entry.token_id)
            tokens.append(self._name(entry.token_id))
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(raw))
        return {
            "tokens": tokens,
            "token_logprobs": [None if isnan(entry.logprob) else _finite(entry.logprob) for entry in entries],
            "top_logprobs": [None if isnan(entry.logprob) else self._top(entry) for entry in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The alternatives and always the chosen token; of two tokens that read alike the likelier one stays."""
        top: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            top.setdefault(self._name(token_id), _finite(logprob))
        return top

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._names_ids else _legacy_name(self._texts.token_bytes(token_id))


def _legacy_name(raw: bytes) -> str:
    """A token as text; one that is no text by itself as OpenAI wrote them: ``bytes:\\xe4\\xbd``."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return max(logprob, _MINUS_INFINITY)

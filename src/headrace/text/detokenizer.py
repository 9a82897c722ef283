"""Text from tokens, one token at a time."""

import codecs
from collections.abc import Sequence

from headrace.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Turns a growing sequence of tokens into text that never changes once given out.

    Tokens are looked up as bytes and the bytes decoded as they come, so a token costs the same wherever it stands. A
    character split over tokens appears with its last byte; bytes that can form no character appear as U+FFFD as soon
    as that is certain. With no prompt, the joined text equals ``tokenizer.decode`` of all tokens; with one, it is what
    the tokens add to the prompt's text (a character that the prompt left unfinished counts as added).

    Args:
        tokenizer: whose tokens these are.
        prompt_ids: the tokens before the first appended one.
        skip_special_tokens: special tokens give no text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._bytes = tokenizer.byte_table
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = tokenizer.strips_leading_space
        if prompt_ids:
            self._continue(prompt_ids)

    def append(self, token_id: int) -> str:
        """Take one token; return the text that became complete with it, possibly none."""
        if token_id in self._skipped:
            return ""
        data = self._bytes[token_id]
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """End the output: an unfinished character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)

    def _continue(self, prompt_ids: Sequence[int]) -> None:
        """Start after a prompt: what matters of it is whether it has text, and an unfinished character at its end."""
        tail = b""
        for token_id in reversed(prompt_ids):
            if token_id not in self._skipped:
                tail = self._bytes[token_id] + tail
            if len(tail) >= 4:
                break
        if tail:
            self._strip_space = False
            # At most three bytes of a character can be unfinished; the decoder drops what is complete or invalid.
            self._decoder.decode(tail[-4:])

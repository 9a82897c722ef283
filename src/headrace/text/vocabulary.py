"""Token ids as text and bytes: the half of a tokenizer that needs no merges, and so is there at once."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.base.errors import UnsupportedModelError
from headrace.text.byte_level import byte_level_bytes
from headrace.text.sentencepiece import piece_bytes

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What token ids stand for.

    Attributes:
        size: one more than the highest id.
        special_ids: tokens left out of decoded text by default.
        token: an id's token as the vocabulary spells it; None for an id without one.
        bytes_of: the bytes that a token so spelled stands for.
        strips_leading_space: the first space of decoded text is the prefix that encoding put there.
    """

    size: int
    special_ids: frozenset[int]
    token: Callable[[int], str | None]
    bytes_of: Callable[[str], bytes]
    strips_leading_space: bool


class ByteTable(dict[int, bytes]):
    """The bytes of each token, looked up once and kept. An id without a token (padding of the vocabulary) has none."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self._vocabulary = vocabulary

    def __missing__(self, token_id: int) -> bytes:
        token = self._vocabulary.token(token_id)
        data = b"" if token is None else self._vocabulary.bytes_of(token)
        self[token_id] = data
        return data


def engine_vocabulary(engine: "tokenizers.Tokenizer") -> Vocabulary:
    """The vocabulary of a `tokenizers` engine. Raises UnsupportedModelError for a way of decoding that is not built."""
    added = engine.get_added_tokens_decoder()
    bytes_of, strips_leading_space = _decoding(engine)
    return Vocabulary(
        size=max(engine.get_vocab_size(), max(added, default=-1) + 1),
        special_ids=frozenset(token_id for token_id, token in added.items() if token.special),
        token=engine.id_to_token,
        bytes_of=bytes_of,
        strips_leading_space=strips_leading_space,
    )


def _decoding(engine: "tokenizers.Tokenizer") -> tuple[Callable[[str], bytes], bool]:
    """How an engine's tokens become bytes, and whether a leading space is dropped from the text."""
    decoder = {} if engine.decoder is None else json.loads(engine.decoder.__getstate__())
    steps = decoder.get("decoders", [decoder])
    names = [step.get("type") for step in steps]
    if names in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return byte_level_bytes, False
    spaced = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    if names[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0] == spaced:
        if len(names) == 3:
            return piece_bytes, False
        if steps[3:] == [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
            return piece_bytes, True
    raise UnsupportedModelError(
        f"The tokenizer decodes by {' + '.join(map(str, names))}, which is not built.",
        "Use a model with byte-level BPE or SentencePiece BPE with byte fallback.",
    )

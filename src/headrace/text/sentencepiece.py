"""SentencePiece-style BPE (Llama 2, Mistral, Gemma), rebuilt from pieces and scores.

The truth here is the SentencePiece library, with which these vocabularies were trained: every stretch of text between
special tokens gets its own prefix space, even one that already begins with a space. (Transformers 5 differs there: it
prefixes only the first stretch, and only where it has no space yet.)
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from headrace.base.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "\u2581"
"""The character that stands for a space in a piece."""


class TokenType(IntEnum):
    """What a token is for; numbered alike in SentencePiece and GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class PieceModel:
    """A SentencePiece model of BPE type.

    Attributes:
        pieces, scores, types: one entry per id.
        add_space_prefix: a space is put before text.
        bos_id, eos_id, unk_id: None where there is none.
    """

    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    add_space_prefix: bool = True
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None


def sentencepiece_engine(model: PieceModel) -> "Tokenizer":
    """Build the tokenizer, without added tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {piece: index for index, piece in enumerate(model.pieces)}
    bpe = models.BPE(
        vocab=vocab,
        merges=_merges(model, vocab),
        unk_token=None if model.unk_id is None else model.pieces[model.unk_id],
        fuse_unk=True,
        byte_fallback=TokenType.BYTE in model.types,
    )
    engine = Tokenizer(bpe)
    replace = normalizers.Replace(" ", SPACE)
    prefixed = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
    engine.normalizer = prefixed if model.add_space_prefix else replace
    strip = [decoders.Strip(content=" ", left=1, right=0)] if model.add_space_prefix else []
    engine.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return engine


def _merges(model: PieceModel, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges that a vocabulary implies: every cut of a piece into two pieces, the best-scored piece first.

    Only normal (and unused) pieces take part: control, byte and user-defined ones are never the result of a merge.
    """
    merging = {
        piece: -score
        for piece, score, kind in zip(model.pieces, model.scores, model.types, strict=True)
        if kind in (TokenType.NORMAL, TokenType.UNUSED)
    }
    ranked = []
    for piece, rank in merging.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in merging and right in merging:
                # Of the cuts of one piece, the one with the longer left part goes first.
                ranked.append((rank, -cut, cut - len(piece), vocab[piece], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


_BYTE_PIECES = {f"<0x{byte:02X}>": bytes((byte,)) for byte in range(256)}


def piece_bytes(piece: str) -> bytes:
    """The bytes a piece stands for: ``<0xE4>`` is one byte, and each U+2581 a space."""
    return _BYTE_PIECES.get(piece) or piece.replace(SPACE, " ").encode()


def parse_model(data: bytes) -> PieceModel:
    """Read a ``tokenizer.model`` file (the protocol buffer ``sentencepiece_model.proto``).

    Raises:
        CheckpointError: not such a file.
        UnsupportedModelError: a model type or a normalization other than Llama's, Mistral's and Gemma's.
    """
    try:
        message = list(_fields(data))
        trainer, normalizer = (_Message(_last(message, number)) for number in (2, 3))
        entries = [_Message(value) for number, value in message if number == 1]
        model = PieceModel(
            pieces=[entry.bytes(1).decode() for entry in entries],
            scores=[struct.unpack("<f", entry.bytes(2, bytes(4)))[0] for entry in entries],
            types=[entry.number(3, TokenType.NORMAL) for entry in entries],
            add_space_prefix=bool(normalizer.number(3, 1)),
            unk_id=trainer.token_id(40, 0),
            bos_id=trainer.token_id(41, 1),
            eos_id=trainer.token_id(42, 2),
        )
        is_bpe = trainer.number(3, 1) == 2
        normalizes = bool(normalizer.bytes(2)) or normalizer.number(4, 1) == 1
    except (ValueError, IndexError, struct.error) as error:
        raise CheckpointError("tokenizer.model is not a SentencePiece model.", "Download the file again.") from error
    if not is_bpe:
        raise UnsupportedModelError(
            "tokenizer.model is not of SentencePiece's BPE type.", "Use a folder that has a tokenizer.json."
        )
    if normalizes:
        raise UnsupportedModelError(
            "tokenizer.model normalizes its text.", "Use a folder that has a tokenizer.json, which says how."
        )
    return model


class _Message:
    """A protocol buffer message: the last value of each field, by number."""

    def __init__(self, data: int | bytes) -> None:
        if isinstance(data, int):
            raise ValueError("a number where a message belongs")
        self._values = dict(_fields(data))

    def bytes(self, number: int, default: bytes = b"") -> bytes:
        value = self._values.get(number, default)
        if isinstance(value, int):
            raise ValueError(f"field {number} is a number")
        return value

    def number(self, number: int, default: int) -> int:
        value = self._values.get(number, default)
        if not isinstance(value, int):
            raise ValueError(f"field {number} is not a number")
        return value

    def token_id(self, number: int, default: int) -> int | None:
        value = self.number(number, default)
        return None if value >> 31 else value  # -1, "none", is written as a huge unsigned number


def _last(fields: list[tuple[int, int | bytes]], wanted: int) -> int | bytes:
    return next((value for number, value in reversed(fields) if number == wanted), b"")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protocol buffer message: varints as int, everything else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                value, at = _varint(data, at)
                yield key >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, at = _varint(data, at)
            case 5:
                size = 4
            case _:
                raise ValueError("unknown wire type")
        if at + size > len(data):
            raise ValueError("truncated message")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at

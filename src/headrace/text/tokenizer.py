"""Text to token ids and back."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from headrace.base.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from headrace.text.byte_level import byte_level_bytes, byte_level_engine, pre_tokenizer_named
from headrace.text.sentencepiece import PieceModel, TokenType, parse_model, piece_bytes, sentencepiece_engine

END_OF_TURN = frozenset(
    ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
)
"""Control tokens that end a turn by common use. A GGUF file names one or two; the model's own list was longer."""


class ByteTable(dict[int, bytes]):
    """The bytes of each token, looked up once and kept. An id without a token (padding of the vocabulary) has none."""

    def __init__(self, engine: tokenizers.Tokenizer, bytes_of: Callable[[str], bytes]) -> None:
        super().__init__()
        self._engine, self._bytes_of = engine, bytes_of

    def __missing__(self, token_id: int) -> bytes:
        token = self._engine.id_to_token(token_id)
        data = b"" if token is None else self._bytes_of(token)
        self[token_id] = data
        return data


class Tokenizer:
    """A model's tokenizer. Safe to use from several threads, and before a fork.

    Encoding is the `tokenizers` library's. Decoding joins the tokens' bytes and reads them as UTF-8, each maximal
    invalid part replaced by U+FFFD, so that text decoded one token at a time is the same text.

    Attributes:
        vocab_size: one more than the highest id.
        bos_id: the beginning-of-sequence token, if there is one.
        eos_ids: every token that ends a turn or a document.
        special_ids: tokens left out of decoded text by default.
        byte_table: the bytes of each token.
        strips_leading_space: the first space of decoded text is the prefix that encoding put there.
    """

    def __init__(
        self,
        engine: tokenizers.Tokenizer,
        *,
        bos_id: int | None,
        eos_ids: Iterable[int],
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
    ) -> None:
        """Take a `tokenizers` engine; ``prefix`` and ``suffix`` are the special tokens put around encoded text."""
        engine.no_truncation()
        engine.no_padding()
        self._engine = engine
        self._literal_engine: tokenizers.Tokenizer | None = None
        self._prefix, self._suffix = list(prefix), list(suffix)
        added = engine.get_added_tokens_decoder()
        self.vocab_size = max(engine.get_vocab_size(), max(added, default=-1) + 1)
        self.bos_id = bos_id
        self.eos_ids = frozenset(eos_ids)
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        bytes_of, self.strips_leading_space = _decoding(engine)
        self.byte_table = ByteTable(engine, bytes_of)

    @classmethod
    def from_hf_folder(cls, path: str | Path) -> "Tokenizer":
        """Load from a Hugging Face folder: ``tokenizer.json``, or else a SentencePiece ``tokenizer.model``.

        Raises:
            CheckpointError: a file is missing, cannot be read, or contradicts another.
            UnsupportedModelError: the tokenizer is of a kind that is not built.
        """
        folder = Path(path)
        config = read_json(folder / "tokenizer_config.json")
        config = {**read_json(folder / "special_tokens_map.json"), **config}
        engine, pieces = _folder_engine(folder)
        _add_configured_tokens(engine, config)

        def id_of(name: str) -> int | None:
            token = token_text(config.get(name))
            return None if token is None else engine.token_to_id(token)

        bos_id, eos_id = id_of("bos_token"), id_of("eos_token")
        if pieces is None:
            prefix, suffix = _affixes_of(engine)  # tokenizer.json outranks the flags of tokenizer_config.json
        else:
            bos_id = pieces.bos_id if bos_id is None else bos_id
            eos_id = pieces.eos_id if eos_id is None else eos_id
            prefix = _affix("add_bos_token", config.get("add_bos_token", bos_id is not None), bos_id)
            suffix = _affix("add_eos_token", config.get("add_eos_token", False), eos_id)
        model_config = read_json(folder / "config.json")
        eos_ids = {
            *_as_ids(eos_id),
            *_as_ids(read_json(folder / "generation_config.json").get("eos_token_id")),
            *_as_ids(model_config.get("eos_token_id")),
            *_as_ids((model_config.get("text_config") or {}).get("eos_token_id")),
        }
        return cls(engine, bos_id=bos_id, eos_ids=eos_ids, prefix=prefix, suffix=suffix)

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Rebuild from a GGUF file's ``tokenizer.ggml.*`` keys.

        Raises:
            CheckpointError: a key is missing or contradicts another.
            UnsupportedModelError: the vocabulary or the pre-tokenizer is of a kind that is not built.
        """
        vocabulary = _GgufVocabulary(metadata)
        kind = metadata.get("tokenizer.ggml.model")
        if kind == "gpt2":
            rule = pre_tokenizer_named(metadata.get("tokenizer.ggml.pre"))
            engine = byte_level_engine(vocabulary.tokens, vocabulary.required("merges"), rule)
            add_bos = rule.add_bos
        elif kind == "llama":
            engine = sentencepiece_engine(vocabulary.piece_model())
            add_bos = True
        else:
            raise UnsupportedModelError(
                f"The vocabulary type {kind!r} (tokenizer.ggml.model) is not built.",
                "Use a model with a 'gpt2' (byte-level BPE) or 'llama' (SentencePiece BPE) vocabulary.",
            )
        if engine.get_vocab_size() != len(vocabulary.tokens):
            raise CheckpointError("tokenizer.ggml.tokens holds a token twice.", "Convert the model again.")
        _add_tokens(engine, vocabulary.tokens, vocabulary.types)
        bos_id, eos_id = vocabulary.token_id("bos"), vocabulary.token_id("eos")
        return cls(
            engine,
            bos_id=bos_id,
            eos_ids=vocabulary.eos_ids(),
            prefix=_affix("add_bos_token", metadata.get("tokenizer.ggml.add_bos_token", add_bos), bos_id),
            suffix=_affix("add_eos_token", metadata.get("tokenizer.ggml.add_eos_token", False), eos_id),
        )

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text.
            add_special_tokens: put the model's beginning (and end) tokens around it. Not for the output of a chat
                template, which writes them itself.
            parse_special: read ``<|im_end|>`` and the like as the special token, as a rendered chat template needs and
                as Transformers does; False reads them as ordinary text, for text that must not steer the model.

        Raises:
            InvalidRequestError: the text holds half of a surrogate pair, which is no character.
        """
        engine = self._engine if parse_special else self._literal()
        try:
            ids: list[int] = engine.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise _unencodable(text) from None
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids. For byte-level vocabularies ``decode(encode(text)) == text``, up to Unicode NFC where the
        model composes its input."""
        skipped: Collection[int] = self.special_ids if skip_special_tokens else ()
        table = self.byte_table
        data = b"".join([table[token_id] for token_id in ids if token_id not in skipped])
        if self.strips_leading_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for: part of a character, one, or many."""
        return self.byte_table[token_id]

    def id_to_token(self, token_id: int) -> str | None:
        """A token as the vocabulary spells it; None for an id without one."""
        token: str | None = self._engine.id_to_token(token_id)
        return token

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it."""
        token_id: int | None = self._engine.token_to_id(token)
        return token_id

    def _literal(self) -> tokenizers.Tokenizer:
        """The engine that reads special tokens as text. It shares the vocabulary; two threads may both make it."""
        if self._literal_engine is None:
            engine = tokenizers.Tokenizer(self._engine.model)
            engine.normalizer = self._engine.normalizer
            engine.pre_tokenizer = self._engine.pre_tokenizer
            for _, token in sorted(self._engine.get_added_tokens_decoder().items()):
                (engine.add_special_tokens if token.special else engine.add_tokens)([token])
            engine.encode_special_tokens = True
            self._literal_engine = engine
        return self._literal_engine


class _GgufVocabulary:
    """Checked access to ``tokenizer.ggml.*``."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.tokens: Sequence[str] = self.required("tokens")
        types = metadata.get("tokenizer.ggml.token_type")
        self.types: Sequence[int] = [TokenType.NORMAL] * len(self.tokens) if types is None else types
        self._check_length("token_type", self.types)

    def required(self, name: str) -> Any:
        if (value := self._metadata.get(f"tokenizer.ggml.{name}")) is None:
            raise CheckpointError(f"The GGUF file lacks tokenizer.ggml.{name}.", "Convert the model again.")
        return value

    def token_id(self, name: str) -> int | None:
        token_id: int | None = self._metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None and not 0 <= token_id < len(self.tokens):
            raise CheckpointError(
                f"tokenizer.ggml.{name}_token_id is {token_id}, but there are {len(self.tokens)} tokens.",
                "Convert the model again.",
            )
        return token_id

    def eos_ids(self) -> set[int]:
        named = {token_id for name in ("eos", "eot", "eom") if (token_id := self.token_id(name)) is not None}
        known = {i for i, kind in enumerate(self.types) if kind == TokenType.CONTROL and self.tokens[i] in END_OF_TURN}
        return named | known

    def piece_model(self) -> PieceModel:
        if self._metadata.get("tokenizer.ggml.remove_extra_whitespaces"):
            raise UnsupportedModelError(
                "The vocabulary removes extra whitespace (tokenizer.ggml.remove_extra_whitespaces).",
                "Use the model's Hugging Face folder with its tokenizer.json.",
            )
        scores = self.required("scores")
        self._check_length("scores", scores)
        return PieceModel(
            pieces=self.tokens,
            scores=scores,
            types=self.types,
            add_space_prefix=self._metadata.get("tokenizer.ggml.add_space_prefix", True),
            unk_id=self.token_id("unknown"),
        )

    def _check_length(self, name: str, values: Sequence[Any]) -> None:
        if len(values) != len(self.tokens):
            raise CheckpointError(
                f"tokenizer.ggml.{name} has {len(values)} entries for {len(self.tokens)} tokens.",
                "Convert the model again.",
            )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.", "Download the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.", "Download the file again.")
    return value


def token_text(value: Any) -> str | None:
    """A token in a Hugging Face config: a string, an object with its ``content``, or null."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _folder_engine(folder: Path) -> tuple[tokenizers.Tokenizer, PieceModel | None]:
    if (path := folder / "tokenizer.json").exists():
        try:
            return tokenizers.Tokenizer.from_file(str(path)), None
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{path} cannot be read: {error}.", "Download the file again.") from error
    if (path := folder / "tokenizer.model").exists():
        pieces = parse_model(path.read_bytes())
        engine = sentencepiece_engine(pieces)
        _add_tokens(engine, pieces.pieces, pieces.types)
        return engine, pieces
    raise CheckpointError(
        f"{folder} has neither tokenizer.json nor tokenizer.model.", "Download the model's tokenizer files too."
    )


def _add_tokens(engine: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Make control tokens (and the unknown one) special, and user-defined ones whole."""
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    kinds = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (*special, 4)]
    engine.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in kinds if k in special])
    engine.add_tokens([AddedToken(t, normalized=False) for t, k in kinds if k not in special])


def _add_configured_tokens(engine: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Tokens that only ``tokenizer_config.json`` adds, with the ids it gives them, and its named special tokens."""
    known = {token.content for token in engine.get_added_tokens_decoder().values()}
    for key, entry in sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0])):
        if entry["content"] in known:
            continue
        flags = {name: bool(entry.get(name)) for name in ("lstrip", "rstrip", "single_word", "normalized")}
        add = engine.add_special_tokens if entry.get("special") else engine.add_tokens
        add([AddedToken(entry["content"], special=bool(entry.get("special")), **flags)])
        if engine.token_to_id(entry["content"]) != int(key):
            raise CheckpointError(
                f"tokenizer_config.json gives token {entry['content']!r} the id {key}, but it is "
                f"{engine.token_to_id(entry['content'])} by the vocabulary.",
                "Download the tokenizer files again, all from one revision.",
            )
        known.add(entry["content"])
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    named = [token_text(config.get(name)) for name in names]
    named += [token_text(token) for token in config.get("additional_special_tokens") or ()]
    # A name that the vocabulary lacks is not added: its new id would lie beyond the model's embedding.
    missing = [t for t in named if t is not None and t not in known and engine.token_to_id(t) is not None]
    engine.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])


def _affix(flag: str, wanted: bool | None, token_id: int | None) -> list[int]:
    if not wanted:
        return []
    if token_id is None:
        raise CheckpointError(
            f"The tokenizer sets {flag} but names no such token.", "Download the tokenizer files again."
        )
    return [token_id]


def _affixes_of(engine: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """What the post-processor of a ``tokenizer.json`` puts before and after a text."""
    bare = engine.encode("a", add_special_tokens=False).ids
    full = engine.encode("a", add_special_tokens=True).ids
    start = next(i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
    return full[:start], full[start + len(bare) :]


def _decoding(engine: tokenizers.Tokenizer) -> tuple[Callable[[str], bytes], bool]:
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


def _as_ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _unencodable(text: str) -> InvalidRequestError:
    assert isinstance(text, str), f"text is a str, not {type(text).__name__}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return InvalidRequestError(
            f"The text holds half of a surrogate pair (U+{ord(text[error.start]):04X}) at character {error.start}.",
            "Send well-formed Unicode.",
        )
    raise AssertionError("the tokenizer refused a well-formed text")

"""Text to token ids and back."""

import json
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.base.errors import CheckpointError, InvalidRequestError
from headrace.text.gguf_vocabulary import GgufVocabulary, add_tokens
from headrace.text.sentencepiece import PieceModel, parse_model, sentencepiece_engine
from headrace.text.vocabulary import ByteTable, Vocabulary, engine_vocabulary

if TYPE_CHECKING:
    import tokenizers


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
        vocabulary: Vocabulary,
        make_engine: "Callable[[], tokenizers.Tokenizer]",
        *,
        bos_id: int | None,
        eos_ids: Iterable[int],
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
    ) -> None:
        """Take a vocabulary and what makes the `tokenizers` engine that encodes, which is called when it is first
        needed; ``prefix`` and ``suffix`` are the special tokens put around encoded text."""
        self._make_engine = make_engine
        self._made_engine: tokenizers.Tokenizer | None = None
        self._making = threading.Lock()
        self._literal_engine: tokenizers.Tokenizer | None = None
        self._prefix, self._suffix = list(prefix), list(suffix)
        self._vocabulary = vocabulary
        self.vocab_size = vocabulary.size
        self.bos_id = bos_id
        self.eos_ids = frozenset(eos_ids)
        self.special_ids = vocabulary.special_ids
        self.byte_table = ByteTable(vocabulary)
        self.strips_leading_space = vocabulary.strips_leading_space

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
        vocabulary = engine_vocabulary(engine)
        return cls(vocabulary, _ready(engine), bos_id=bos_id, eos_ids=eos_ids, prefix=prefix, suffix=suffix)

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, Any], *, prepared: bool = True) -> "Tokenizer":
        """Rebuild from a GGUF file's ``tokenizer.ggml.*`` keys.

        Args:
            metadata: the file's.
            prepared: be ready to encode; False leaves the costly part of that, and two errors that only it finds, to
                `prepare` or the first text. Decoding needs none of it.

        Raises:
            CheckpointError: a key is missing or contradicts another.
            UnsupportedModelError: the vocabulary or the pre-tokenizer is of a kind that is not built.
        """
        gguf = GgufVocabulary(metadata)
        make_engine = gguf.engine
        if prepared:
            make_engine = _ready(gguf.engine())
        bos_id, eos_id = gguf.token_id("bos"), gguf.token_id("eos")
        return cls(
            gguf.vocabulary(),
            make_engine,
            bos_id=bos_id,
            eos_ids=gguf.eos_ids(),
            prefix=_affix("add_bos_token", metadata.get("tokenizer.ggml.add_bos_token", gguf.add_bos), bos_id),
            suffix=_affix("add_eos_token", metadata.get("tokenizer.ggml.add_eos_token", False), eos_id),
        )

    def prepare(self) -> None:
        """Do now what the first text to encode would wait for. Raises CheckpointError as `from_gguf_metadata` does."""
        _ = self._engine

    @property
    def _engine(self) -> "tokenizers.Tokenizer":
        with self._making:
            if self._made_engine is None:
                engine = self._make_engine()
                engine.no_truncation()
                engine.no_padding()
                self._made_engine = engine
            return self._made_engine

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
        return self._vocabulary.token(token_id)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it."""
        token_id: int | None = self._engine.token_to_id(token)
        return token_id

    def description(self) -> dict[str, Any]:
        """What encodes, as a ``tokenizer.json`` has it."""
        described: dict[str, Any] = json.loads(self._engine.to_str())
        return described

    def save(self, folder: Path) -> None:
        """Write it as a Hugging Face folder has it: tokenizer.json, and its special tokens in tokenizer_config.json and
        generation_config.json. `from_hf_folder` reads them to an equal tokenizer. Raises OSError."""
        import tokenizers

        engine = tokenizers.Tokenizer.from_str(self._engine.to_str())
        around = {token_id: str(self.id_to_token(token_id)) for token_id in (*self._prefix, *self._suffix)}
        if around:
            text = [*(around[i] for i in self._prefix), "$A", *(around[i] for i in self._suffix)]
            engine.post_processor = tokenizers.processors.TemplateProcessing(
                single=" ".join(text), special_tokens=[(token, token_id) for token_id, token in around.items()]
            )
        engine.save(str(folder / "tokenizer.json"))
        eos_ids = sorted(self.eos_ids)
        named = {"bos_token": self.bos_id, "eos_token": eos_ids[0] if eos_ids else None}
        tokens = {name: self.id_to_token(token_id) for name, token_id in named.items() if token_id is not None}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}
        for name, value in (("tokenizer_config", config), ("generation_config", {"eos_token_id": eos_ids})):
            (folder / f"{name}.json").write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def _literal(self) -> "tokenizers.Tokenizer":
        """The engine that reads special tokens as text. It shares the vocabulary; two threads may both make it."""
        if self._literal_engine is None:
            import tokenizers

            engine = tokenizers.Tokenizer(self._engine.model)
            engine.normalizer = self._engine.normalizer
            engine.pre_tokenizer = self._engine.pre_tokenizer
            for _, token in sorted(self._engine.get_added_tokens_decoder().items()):
                (engine.add_special_tokens if token.special else engine.add_tokens)([token])
            engine.encode_special_tokens = True
            self._literal_engine = engine
        return self._literal_engine


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


def _folder_engine(folder: Path) -> "tuple[tokenizers.Tokenizer, PieceModel | None]":
    import tokenizers

    if (path := folder / "tokenizer.json").exists():
        try:
            return tokenizers.Tokenizer.from_file(str(path)), None
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{path} cannot be read: {error}.", "Download the file again.") from error
    if (path := folder / "tokenizer.model").exists():
        pieces = parse_model(path.read_bytes())
        engine = sentencepiece_engine(pieces)
        add_tokens(engine, dict(zip(pieces.pieces, pieces.types, strict=True)))
        return engine, pieces
    raise CheckpointError(
        f"{folder} has neither tokenizer.json nor tokenizer.model.", "Download the model's tokenizer files too."
    )


def _add_configured_tokens(engine: "tokenizers.Tokenizer", config: Mapping[str, Any]) -> None:
    """Tokens that only ``tokenizer_config.json`` adds, with the ids it gives them, and its named special tokens."""
    from tokenizers import AddedToken

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


def _affixes_of(engine: "tokenizers.Tokenizer") -> tuple[list[int], list[int]]:
    """What the post-processor of a ``tokenizer.json`` puts before and after a text."""
    bare = engine.encode("a", add_special_tokens=False).ids
    full = engine.encode("a", add_special_tokens=True).ids
    start = next(i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
    return full[:start], full[start + len(bare) :]


def _ready(engine: "tokenizers.Tokenizer") -> "Callable[[], tokenizers.Tokenizer]":
    return lambda: engine


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

"""A tokenizer's vocabulary as a GGUF file's metadata holds it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headrace.base.errors import CheckpointError, UnsupportedModelError
from headrace.text.byte_level import PreTokenizer, byte_level_bytes, byte_level_engine, pre_tokenizer_named
from headrace.text.sentencepiece import PieceModel, TokenType, piece_bytes, sentencepiece_engine
from headrace.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    import tokenizers

_MARKED = frozenset(map(int, (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)))
"""Types of the tokens that text is first cut at. Plain numbers: they are compared with every token's."""

END_OF_TURN = frozenset(
    ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
)
"""Control tokens that end a turn by common use. A GGUF file names one or two; the model's own list was longer."""


class GgufVocabulary:
    """Checked access to ``tokenizer.ggml.*``. What costs time is left to `engine`.

    Raises, from the start:
        CheckpointError: a key is missing or contradicts another.
        UnsupportedModelError: the vocabulary or the pre-tokenizer is of a kind that is not built.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.tokens: Sequence[str] = self.required("tokens")
        types = metadata.get("tokenizer.ggml.token_type")
        self.types: Sequence[int] = [int(TokenType.NORMAL)] * len(self.tokens) if types is None else types
        self._check_length("token_type", self.types)
        self._source: PreTokenizer | PieceModel
        self._marked = {i: kind for i, kind in enumerate(self.types) if kind in _MARKED}
        kind = metadata.get("tokenizer.ggml.model")
        if kind == "gpt2":
            self.add_bos, self._source = self._byte_level()
        elif kind == "llama":
            self.add_bos, self._source = True, self.piece_model()
        else:
            raise UnsupportedModelError(
                f"The vocabulary type {kind!r} (tokenizer.ggml.model) is not built.",
                "Use a model with a 'gpt2' (byte-level BPE) or 'llama' (SentencePiece BPE) vocabulary.",
            )

    def vocabulary(self) -> Vocabulary:
        """What the ids stand for."""
        spaced = isinstance(self._source, PieceModel)
        return Vocabulary(
            size=len(self.tokens),
            special_ids=frozenset(i for i, kind in self._marked.items() if kind != TokenType.USER_DEFINED),
            token=lambda token_id: self.tokens[token_id] if 0 <= token_id < len(self.tokens) else None,
            bytes_of=piece_bytes if spaced else byte_level_bytes,
            strips_leading_space=isinstance(self._source, PieceModel) and self._source.add_space_prefix,
        )

    def engine(self) -> "tokenizers.Tokenizer":
        """What encodes: a tenth of a second for 50,000 tokens.

        Raises CheckpointError for merges that do not fit the vocabulary, and for a token that it holds twice.
        """
        if isinstance(self._source, PieceModel):
            engine = sentencepiece_engine(self._source)
        else:
            engine = byte_level_engine(self.tokens, self.required("merges"), self._source)
        if engine.get_vocab_size() != len(self.tokens):
            raise CheckpointError("tokenizer.ggml.tokens holds a token twice.", "Convert the model again.")
        add_tokens(engine, {self.tokens[i]: kind for i, kind in self._marked.items()})
        return engine

    def _byte_level(self) -> tuple[bool, PreTokenizer]:
        self.required("merges")
        rule = pre_tokenizer_named(self._metadata.get("tokenizer.ggml.pre"))
        return rule.add_bos, rule

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
        known = {i for i, kind in self._marked.items() if kind == TokenType.CONTROL and self.tokens[i] in END_OF_TURN}
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


def add_tokens(engine: "tokenizers.Tokenizer", tokens: Mapping[str, int]) -> None:
    """Make control tokens (and the unknown one) special, and user-defined ones whole, in the order given; others are
    left alone."""
    from tokenizers import AddedToken

    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    engine.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in tokens.items() if k in special]
    )
    whole = [t for t, k in tokens.items() if k == TokenType.USER_DEFINED]
    engine.add_tokens([AddedToken(token, normalized=False) for token in whole])

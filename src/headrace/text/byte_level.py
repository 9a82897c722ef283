"""Byte-level BPE (GPT-2 and all that followed it), rebuilt from a vocabulary, its merges and a pre-tokenizer's name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.base.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How a family cuts text before BPE: its ``tokenizer.json``, of which GGUF keeps only a name.

    Attributes:
        splits: regular expressions, applied in turn; what one matches, and what lies between, the next may cut again.
        nfc: text is composed (Unicode NFC) first, so decoding gives the composed form back.
        ignore_merges: a piece that is a token is that token, even where merges would not lead there.
        add_bos: a beginning-of-sequence token is put in front where the file does not say.
    """

    splits: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_PLAIN = PreTokenizer((_GPT2,))
_DIGITS_APART = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA3_FAMILY = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_O200K = PreTokenizer((_GPT4O,))

# Names are those of llama.cpp's converter; rules are those of each family's own tokenizer.json.
PRE_TOKENIZERS = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "exaone4"), _PLAIN),
    "olmo": PreTokenizer((_GPT2,), nfc=True),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _DIGITS_APART),
    "command-r": PreTokenizer((r"\p{N}", _GPT2), nfc=True),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), _LLAMA3_FAMILY),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), PreTokenizer((_LLAMA3,))),
    "qwen2": PreTokenizer((_QWEN2,), nfc=True),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2", "megrez"), PreTokenizer((_QWEN2,))),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    "deepseek-v3": PreTokenizer((r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _O200K),
}


def pre_tokenizer_named(name: str | None) -> PreTokenizer:
    """Look up ``tokenizer.ggml.pre``. A guess would give wrong ids quietly, so an unknown name is an error."""
    if name is None:
        raise UnsupportedModelError(
            "The GGUF file does not name its pre-tokenizer (tokenizer.ggml.pre).",
            "Convert the model again with a current converter; files without it are known to tokenize wrongly.",
        )
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"The pre-tokenizer {name!r} (tokenizer.ggml.pre) is not built.",
            f"Use the model's Hugging Face folder with its tokenizer.json, or one of: {', '.join(PRE_TOKENIZERS)}.",
        )
    return PRE_TOKENIZERS[name]


def byte_level_engine(tokens: Sequence[str], merges: Sequence[str], rule: PreTokenizer) -> "Tokenizer":
    """Build the tokenizer, without added tokens.

    Args:
        tokens: each token in the byte alphabet, in order of id.
        merges: pairs "left right", the first merged first.
        rule: the family's pre-tokenizer.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        model = models.BPE(
            vocab=vocab,
            merges=[(left, right) for left, _, right in (merge.partition(" ") for merge in merges)],
            ignore_merges=rule.ignore_merges,
        )
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(
            f"The tokenizer's merges do not fit its vocabulary: {error}.", "Download the file again."
        ) from error
    engine = Tokenizer(model)
    if rule.nfc:
        engine.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.splits]
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    engine.decoder = decoders.ByteLevel()
    return engine


def _byte_alphabet() -> dict[int, int]:
    """The character that stands for each byte, inverted: printable Latin-1 for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {0x100 + index: byte for index, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """The bytes a token stands for; a token with a character outside the byte alphabet stands for itself."""
    if all(ord(char) in _BYTE_OF_CHAR for char in token):
        return token.translate(_BYTE_OF_CHAR).encode("latin-1")
    return token.encode()

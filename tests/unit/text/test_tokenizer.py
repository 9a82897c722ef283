"""Tokenizers rebuilt from metadata and loaded from folders: ids, bytes, special tokens, errors."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from headrace.base.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from headrace.text.byte_level import PRE_TOKENIZERS
from headrace.text.tokenizer import Tokenizer
from tests.unit.text import vocabularies


def byte_level(**extra) -> Tokenizer:
    return Tokenizer.from_gguf_metadata(vocabularies.byte_level(**extra))


def spelled(tokenizer: Tokenizer, text: str, **how) -> list[str | None]:
    return [tokenizer.id_to_token(i) for i in tokenizer.encode(text, **how)]


def test_byte_level_merges_and_specials():
    tokenizer = byte_level()
    assert spelled(tokenizer, "the the 你<|im_end|>") == ["the", "Ġthe", "Ġ", "ä½ł", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("the 你<|im_end|>")) == "the 你"
    assert tokenizer.decode(tokenizer.encode("the<|im_end|>"), skip_special_tokens=False) == "the<|im_end|>"


def test_literal_text_makes_no_special_token():
    tokenizer = byte_level()
    ids = tokenizer.encode("a<|im_end|>", parse_special=False)
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode(ids) == "a<|im_end|>"
    assert spelled(tokenizer, "a<think>", parse_special=False) == ["a", "<think>"], "not special: whole in any text"
    assert tokenizer.special_ids & set(tokenizer.encode("a<|im_end|>")), "the other way is not affected"


def test_properties():
    tokenizer = byte_level()
    assert tokenizer.vocab_size == 264
    assert tokenizer.bos_id == 262
    assert tokenizer.eos_ids == {263}
    assert tokenizer.special_ids == {262, 263}, "a user-defined token is not special"


def test_bos_and_eos_are_added_as_the_file_says():
    assert spelled(byte_level(), "a") == ["a"]
    both = byte_level(add_bos_token=True, add_eos_token=True)
    assert spelled(both, "a") == ["<|im_start|>", "a", "<|im_end|>"]
    assert spelled(both, "a", add_special_tokens=False) == ["a"]
    assert spelled(byte_level(pre="llama-bpe"), "a")[0] == "<|im_start|>", "the family's habit"
    assert spelled(byte_level(pre="llama-bpe", add_bos_token=False), "a") == ["a"]
    with pytest.raises(CheckpointError, match="add_bos_token but names no such token"):
        byte_level(add_bos_token=True, bos_token_id=None)


def test_every_end_of_turn_counts():
    assert byte_level(eos_token_id=0, eot_token_id=1, eom_token_id=2).eos_ids == {0, 1, 2, 263}


def test_token_bytes():
    tokenizer = byte_level()
    assert tokenizer.token_bytes(tokenizer.token_to_id("Ġthe")) == b" the"
    assert b"".join(tokenizer.token_bytes(i) for i in range(256)) != b""
    assert {tokenizer.token_bytes(i) for i in range(256)} == {bytes((b,)) for b in range(256)}
    assert tokenizer.token_bytes(263) == b"<|im_end|>"
    assert tokenizer.token_bytes(99_999) == b"", "padding of the model's vocabulary"
    assert tokenizer.id_to_token(99_999) is None


def test_pieces_spaces_and_byte_fallback():
    tokenizer = Tokenizer.from_gguf_metadata(vocabularies.pieces())
    assert spelled(tokenizer, "hi hi") == ["<s>", "▁hi", "▁hi"], "SentencePiece models begin with a token"
    assert spelled(tokenizer, " hi", add_special_tokens=False) == ["▁", "▁hi"], "prefixed even before a space"
    assert spelled(tokenizer, "lo😀", add_special_tokens=False) == ["▁", "lo", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    for text in ("hi", " hi", "lo😀 你", "a\n\tb  c"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert spelled(tokenizer, "</s>hi", add_special_tokens=False) == ["</s>", "▁hi"]
    assert tokenizer.token_bytes(3 + 0xF0) == b"\xf0"


def test_a_piece_that_merges_do_not_reach():
    data = vocabularies.byte_level(add_bos_token=False)
    for key, value in (("tokens", "xyz"), ("token_type", 1)):
        data[f"tokenizer.ggml.{key}"] = [*data[f"tokenizer.ggml.{key}"], value]
    assert spelled(Tokenizer.from_gguf_metadata(data), "xyz") == ["x", "y", "z"]
    data["tokenizer.ggml.pre"] = "llama-bpe"
    assert spelled(Tokenizer.from_gguf_metadata(data), "xyz") == ["xyz"], "Llama 3 looks a word up first"


def test_pieces_merge_by_score_not_by_id():
    tokens = ["<unk>", "a", "b", "c", "ab", "bc"]
    for scores, expected in (([0, 0, 0, 0, -1, -2], ["ab", "c"]), ([0, 0, 0, 0, -2, -1], ["a", "bc"])):
        extra = {"tokens": tokens, "scores": scores, "token_type": [2, 1, 1, 1, 1, 1]}
        data = vocabularies.pieces(**extra, add_space_prefix=False, add_bos_token=False)
        assert spelled(Tokenizer.from_gguf_metadata(data), "abc") == expected


def test_pieces_without_prefix():
    tokenizer = Tokenizer.from_gguf_metadata(vocabularies.pieces(add_space_prefix=False, add_bos_token=False))
    assert spelled(tokenizer, "hi hi") == ["h", "i", "▁hi"]
    assert tokenizer.decode(tokenizer.encode(" hi")) == " hi"


SAMPLE = "Don't PAY 12345 dollars!!\n\n  x=y HelloWorld's"
PIECES = {
    "default": "Don|'|t| PAY| |123|45| dollars|!!|\n\n | x|=|y| HelloWorld|'|s",
    "gpt-2": "Don|'t| PAY| 12345| dollars|!!|\n\n | x|=|y| HelloWorld|'s",
    "smollm": "Don|'t| PAY| |1|2|3|4|5| dollars|!!|\n\n | x|=|y| HelloWorld|'s",
    "falcon": "Don|'|t| PAY| |123|45| dollars|!!|\n\n | x|=|y| HelloWorld|'|s",
    "llama-bpe": "Don|'t| PAY| |123|45| dollars|!!\n\n| | x|=y| HelloWorld|'s",
    "qwen2": "Don|'t| PAY| |1|2|3|4|5| dollars|!!\n\n| | x|=y| HelloWorld|'s",
    "deepseek-coder": "Don|'|t| PAY| |1|2|3|4|5| dollars|!!|\n|\n| | x|=|y| HelloWorld|'|s",
    "deepseek-v3": "Don|'t| PAY| |123|45| dollars|!!\n\n| | x|=y| HelloWorld|'s",
    "tekken": "Don|'t| PAY| |1|2|3|4|5| dollars|!!\n\n| | x|=y| Hello|World|'s",
    "gpt-4o": "Don't| PAY| |123|45| dollars|!!\n\n| | x|=y| Hello|World's",
}


@pytest.mark.parametrize("name", PIECES)
def test_pre_tokenizers_cut_as_their_families_do(name):
    engine = byte_level(pre=name, add_bos_token=False)._engine
    cuts = [span for _, span in engine.pre_tokenizer.pre_tokenize_str(SAMPLE)]
    assert [SAMPLE[start:end] for start, end in cuts] == PIECES[name].split("|")


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_pre_tokenizer_keeps_all_text(name):
    tokenizer = byte_level(pre=name)
    text = "Don't 123456 你好, мир! \t\r\n\n  e\u0301? \u200d\x00 \u202eabc 👩‍👩‍👧 ½²"
    decoded = tokenizer.decode(tokenizer.encode(text))
    assert decoded == (text.replace("e\u0301", "é") if PRE_TOKENIZERS[name].nfc else text)


@pytest.mark.parametrize("call", [lambda t: t.encode("ab\ud800c"), lambda t: t.encode("ab\udfff", parse_special=False)])
def test_half_a_surrogate_pair_is_named(call):
    with pytest.raises(InvalidRequestError, match=r"U\+D[8F][0F][0F]\) at character 2"):
        call(byte_level())


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({}, CheckpointError, "lacks tokenizer.ggml.tokens"),
        (vocabularies.byte_level(merges=None), CheckpointError, "lacks tokenizer.ggml.merges"),
        (vocabularies.byte_level(merges=["no such"]), CheckpointError, "merges do not fit"),
        (vocabularies.byte_level(pre=None), UnsupportedModelError, "does not name its pre-tokenizer"),
        (vocabularies.byte_level(pre="mystery"), UnsupportedModelError, "'mystery'"),
        (vocabularies.byte_level(model="bert"), UnsupportedModelError, "'bert'"),
        (vocabularies.byte_level(eos_token_id=999), CheckpointError, "eos_token_id is 999"),
        (vocabularies.byte_level(token_type=[1]), CheckpointError, "token_type has 1 entries for 264"),
        (vocabularies.pieces(scores=None), CheckpointError, "lacks tokenizer.ggml.scores"),
        (vocabularies.pieces(scores=[0.0]), CheckpointError, "scores has 1 entries"),
        (vocabularies.pieces(remove_extra_whitespaces=True), UnsupportedModelError, "extra whitespace"),
        (vocabularies.byte_level(tokens=["a", "a"], merges=[], token_type=[1, 1]), CheckpointError, "token twice"),
    ],
)
def test_bad_metadata_is_named(metadata, error, message):
    with pytest.raises(error, match=message):
        Tokenizer.from_gguf_metadata(metadata)


def folder(path, config=None, files=None):
    """A Hugging Face folder with the byte-level tokenizer."""
    engine = byte_level()._engine
    engine.enable_truncation(4)
    engine.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config or {}))
    for name, content in (files or {}).items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_a_folder_equals_the_metadata(tmp_path):
    names = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
    tokenizer, expected = Tokenizer.from_hf_folder(folder(tmp_path, names)), byte_level()
    text = "the the<think> 你好 <|im_end|> and more than four tokens"
    assert tokenizer.encode(text) == expected.encode(text)
    assert tokenizer.encode(text, parse_special=False) == expected.encode(text, parse_special=False)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (262, {263})
    assert tokenizer.special_ids == expected.special_ids


def test_end_of_turn_ids_come_from_every_config(tmp_path):
    files = {"generation_config": {"eos_token_id": [1, 2]}, "config": {"text_config": {"eos_token_id": 3}}}
    assert Tokenizer.from_hf_folder(folder(tmp_path, {"eos_token": "<|im_end|>"}, files)).eos_ids == {1, 2, 3, 263}


def test_tokens_that_only_the_config_adds(tmp_path):
    entry = {"content": "<|tool|>", "special": True}
    tokenizer = Tokenizer.from_hf_folder(folder(tmp_path, {"added_tokens_decoder": {"264": entry}}))
    assert tokenizer.encode("<|tool|>") == [264]
    assert tokenizer.vocab_size == 265
    assert tokenizer.decode(tokenizer.encode("<|tool|>", parse_special=False)) == "<|tool|>"
    with pytest.raises(CheckpointError, match=r"gives token '<\|tool\|>' the id 300"):
        Tokenizer.from_hf_folder(folder(tmp_path, {"added_tokens_decoder": {"300": entry}}))


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="neither"):
        Tokenizer.from_hf_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x07rubbish")
    with pytest.raises(CheckpointError, match="not a SentencePiece model"):
        Tokenizer.from_hf_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_hf_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        Tokenizer.from_hf_folder(tmp_path)


def test_threads_share_a_tokenizer():
    tokenizer = byte_level()
    texts = [f"the {i} 你 <|im_end|>" for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        literal = list(pool.map(lambda text: tokenizer.decode(tokenizer.encode(text, parse_special=False)), texts))
        parsed = list(pool.map(lambda text: tokenizer.decode(tokenizer.encode(text)), texts))
    assert literal == texts
    assert parsed == [text.removesuffix("<|im_end|>") for text in texts]


def test_forking_after_use_is_quiet():
    """The library's thread pool, which does not survive a fork and warns of it, is never used."""
    script = (
        "import os\n"
        "from headrace.text.tokenizer import Tokenizer\n"
        "from tests.unit.text import vocabularies\n"
        "tokenizer = Tokenizer.from_gguf_metadata(vocabularies.byte_level())\n"
        "ids = tokenizer.encode('the 你 ' * 1000)\n"
        "if (pid := os.fork()) == 0: os._exit(tokenizer.encode('the 你 ' * 1000) != ids)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")

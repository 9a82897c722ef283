"""A folder's tokenizer as GGUF metadata: the same ids, or refused."""

import itertools
import json

import pytest

from headrace.base.errors import UnsupportedModelError
from headrace.text.byte_level import PRE_TOKENIZERS, byte_level_engine
from headrace.text.gguf_export import PROBE, gguf_text_metadata
from headrace.text.tokenizer import Tokenizer
from tests.unit.text.vocabularies import byte_level, pieces

RULES = {(rule.splits, rule.nfc): (name, rule) for name, rule in PRE_TOKENIZERS.items()}


def folder_of(metadata, folder, **config):
    Tokenizer.from_gguf_metadata(metadata).save(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_the_probe_tells_all_rules_apart():
    def cut(rule):
        engine = byte_level_engine([], [], rule)
        text = PROBE if engine.normalizer is None else engine.normalizer.normalize_str(PROBE)
        return engine.pre_tokenizer.pre_tokenize_str(text)

    cuts = {name: cut(rule) for name, rule in RULES.values()}
    for one, other in itertools.combinations(cuts, 2):
        assert cuts[one] != cuts[other], f"{one} and {other}"


@pytest.mark.parametrize("pre", [name for name, _ in RULES.values()])
def test_every_rule_is_found_by_what_it_does(tmp_path, pre):
    metadata = byte_level(pre, add_bos_token=True)
    found = gguf_text_metadata(folder_of(metadata, tmp_path), 264)
    assert PRE_TOKENIZERS[found.pop("tokenizer.ggml.pre")] == PRE_TOKENIZERS[pre]
    assert found == {key: value for key, value in metadata.items() if key != "tokenizer.ggml.pre"} | {
        "tokenizer.ggml.add_eos_token": False
    }


def test_pieces_get_scores_that_merge_alike(tmp_path):
    metadata = pieces()
    found = gguf_text_metadata(folder_of(metadata, tmp_path), 267)
    for key in ("model", "tokens", "token_type", "bos_token_id", "eos_token_id"):
        assert found[f"tokenizer.ggml.{key}"] == metadata[f"tokenizer.ggml.{key}"]
    again, before = (Tokenizer.from_gguf_metadata(values) for values in (found, metadata))
    for text in ("hi lo", "lohi hi  ho", PROBE):
        assert again.encode(text) == before.encode(text)


def test_rows_beyond_the_vocabulary_are_padding(tmp_path):
    found = gguf_text_metadata(folder_of(byte_level(), tmp_path), 266)
    assert found["tokenizer.ggml.tokens"][264:] == ["[PAD264]", "[PAD265]"]
    assert found["tokenizer.ggml.token_type"][263:] == [3, 5, 5]
    with pytest.raises(UnsupportedModelError, match="264 tokens, the model's embedding 263 rows"):
        gguf_text_metadata(tmp_path, 263)


def test_templates_and_special_tokens(tmp_path):
    folder = folder_of(byte_level(), tmp_path, chat_template="{{ x }}", pad_token="<|im_end|>")
    found = gguf_text_metadata(folder, 264)
    assert found["tokenizer.chat_template"] == "{{ x }}"
    assert found["tokenizer.ggml.padding_token_id"] == 263
    several = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    found = gguf_text_metadata(folder_of(byte_level(), tmp_path, chat_template=several), 264)
    assert found["tokenizer.chat_template"] == "a"
    assert found["tokenizer.chat_template.tool_use"] == "b"
    assert found["tokenizer.chat_templates"] == ["tool_use"]


def changed(folder, **parts):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    return folder


def test_what_gguf_cannot_say(tmp_path):
    folder = folder_of(byte_level(), tmp_path)
    kept = (folder / "tokenizer.json").read_text()
    lower = {"type": "Lowercase"}
    with pytest.raises(UnsupportedModelError, match="no name in GGUF"):
        gguf_text_metadata(changed(folder, normalizer=lower), 264)
    (folder / "tokenizer.json").write_text(kept)
    tokens = json.loads(kept)["added_tokens"]
    tokens[-1]["rstrip"] = True
    with pytest.raises(UnsupportedModelError, match="makes something else of"):
        gguf_text_metadata(changed(folder, added_tokens=tokens, normalizer=None), 264)
    (folder / "tokenizer.json").write_text(kept)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2, 3, 263]}))
    with pytest.raises(UnsupportedModelError, match="More tokens end a turn"):
        gguf_text_metadata(folder, 264)

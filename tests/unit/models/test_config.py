import logging

import numpy as np
import pytest

from headrace.base.errors import CheckpointError, UnsupportedModelError
from headrace.models.config import Config, finish_gguf, finish_hf


def config(**values) -> Config:
    return Config(values, "config.json")


@pytest.mark.parametrize("bad", ["8", 8.0, True, -1, [8]])
def test_an_integer_of_the_wrong_type_is_named(bad):
    with pytest.raises(CheckpointError, match=r"num_layers in config\.json must be a whole number"):
        config(num_layers=bad).integer("num_layers")


@pytest.mark.parametrize("bad", ["1", False, float("inf"), float("nan"), [1.0]])
def test_a_number_of_the_wrong_type_is_named(bad):
    with pytest.raises(CheckpointError, match=r"eps in config\.json must be a finite number"):
        config(eps=bad).number("eps")


def test_a_missing_or_null_key_is_named_unless_it_has_a_default():
    for reader in (config(), config(size=None)):
        with pytest.raises(CheckpointError, match=r"config\.json has no size"):
            reader.integer("size")
        assert reader.integer("size", 3) == 3


def test_zero_is_no_size():
    with pytest.raises(CheckpointError, match="1 or more"):
        config(size=0).positive("size")


def test_numpy_scalars_are_numbers():
    reader = config(count=np.uint32(4), eps=np.float32(0.5))
    assert reader.integer("count") == 4
    assert type(reader.integer("count")) is int
    assert reader.number("eps") == 0.5


def test_lists_sections_texts_and_booleans():
    reader = config(factors=[1, 2.5], inner={"a": 1}, name="x", on=True)
    assert reader.numbers("factors", 2) == [1.0, 2.5]
    assert reader.section("inner").integer("a") == 1
    assert reader.text("name") == "x"
    assert reader.boolean("on") is True
    with pytest.raises(CheckpointError, match=r"factors.*3 numbers"):
        reader.numbers("factors", 3)
    with pytest.raises(CheckpointError, match=r"a in inner of config\.json"):
        reader.section("inner").text("a")
    with pytest.raises(CheckpointError, match="on in"):
        reader.items("on")


def test_a_prefix_stands_before_every_key():
    reader = Config({"llama.block_count": 2, "other.block_count": 3}, "metadata", "llama.")
    assert reader.integer("block_count") == 2
    with pytest.raises(CheckpointError, match=r"no llama\.head_count"):
        reader.integer("head_count")
    assert reader.unread() == []


def test_what_is_off_does_not_count_as_unread():
    reader = config(a=None, b=False, c=[], d={}, e=0, f="x")
    assert reader.unread() == ["e", "f"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_bias", True),
        ("final_logit_softcapping", 30.0),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"quant_method": "gptq"}),
        ("num_local_experts", 8),
        ("logits_scaling", 8.0),
        ("layer_types", ["full_attention", "sliding_attention"]),
    ],
)
def test_mathematics_that_the_family_did_not_read_is_refused_by_name(key, value):
    with pytest.raises(UnsupportedModelError, match=key):
        finish_hf(config(**{key: value}))
    read = config(**{key: value})
    read.skip(key)
    finish_hf(read)


def test_neutral_values_of_the_same_keys_pass(caplog):
    neutral = {"attention_bias": False, "partial_rotary_factor": 1.0, "num_local_experts": 1}
    finish_hf(config(**neutral, layer_types=["full_attention"], torch_dtype="bfloat16", _name_or_path="x"))
    assert not caplog.records


def test_an_unknown_key_of_config_json_is_named_in_the_log(caplog):
    with caplog.at_level(logging.WARNING):
        finish_hf(config(surprising_key=3))
    assert "surprising_key" in caplog.text


def test_an_unknown_key_of_gguf_metadata_is_refused_by_name():
    values = {"llama.surprising": 1, "general.other": 1, "llama.context_length": 8}
    with pytest.raises(UnsupportedModelError, match=r"llama\.surprising in"):
        finish_gguf(Config(values, "metadata", "llama."))
    finish_gguf(Config({"llama.expert_count": 0, "llama.vocab_size": 3}, "metadata", "llama."))
    with pytest.raises(UnsupportedModelError, match=r"llama\.expert_count = 8"):
        finish_gguf(Config({"llama.expert_count": 8}, "metadata", "llama."))

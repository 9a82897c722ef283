import json
from dataclasses import replace

import pytest

from headrace.base.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from headrace.cli.main import main
from headrace.plan.node_memory import (
    Placement,
    kv_bytes,
    plan_node,
    smallest_node,
    training_bytes,
    weight_bytes,
)
from headrace.plan.parameters import count_parameters
from tests.support.published_configs import DEEPSEEK_V3, KIMI_K2, LLAMA_1B, LLAMA_70B

H200 = Placement(gpu_bytes=141 * 10**9, tensor=8, context=32_768)
KIMI, DEEPSEEK, LLAMA = (count_parameters(each) for each in (KIMI_K2, DEEPSEEK_V3, LLAMA_70B))


def test_the_question_behind_int4_training():
    """A model of a trillion parameters: two nodes of H200 in bf16, one in int4 with room for long contexts."""
    assert not plan_node(KIMI, H200).fits
    assert smallest_node(KIMI, H200) == 32
    in_int4 = plan_node(KIMI, replace(H200, format="int4-g32"))
    assert in_int4.fits
    assert in_int4.kv_tokens > 500_000
    assert smallest_node(KIMI, replace(H200, format="int4-g32")) == 8


def test_kv_of_one_token_by_hand():
    assert kv_bytes(LLAMA, "bf16", 1) == 80 * 2 * 8 * 128 * 2, "327,680 bytes"
    assert kv_bytes(DEEPSEEK, "bf16", 1) == 61 * (512 + 64) * 2, "70,272 bytes"
    for name, bits in (("f32", 32), ("fp8", 8.5), ("int8", 8.5), ("int4", 5)):
        assert kv_bytes(LLAMA, name, 1000) / kv_bytes(LLAMA, "bf16", 1000) == pytest.approx(bits / 16)


def test_windowed_layers_keep_no_more_than_they_see():
    shape = count_parameters({**LLAMA_1B, "model_type": "mistral", "sliding_window": 1000})
    assert kv_bytes(shape, "bf16", 500) == kv_bytes(count_parameters(LLAMA_1B), "bf16", 500)
    assert kv_bytes(shape, "bf16", 5000) == kv_bytes(shape, "bf16", 1000)


def test_weights_by_class():
    sizes = weight_bytes(LLAMA, "int4-g128")
    assert sizes["embeddings"] == 2 * 128256 * 8192
    assert sizes["attention"] == LLAMA.attention * 4.125 / 8
    experts_alone = weight_bytes(KIMI, "int4-g32", "experts")
    assert experts_alone["attention"] == 2 * KIMI.attention
    assert experts_alone["experts"] == KIMI.experts * 4.5 / 8


def test_what_is_split_and_what_is_not():
    one, eight, sixteen = (plan_node(LLAMA, replace(H200, tensor=n)) for n in (1, 8, 16))
    assert eight.weights == pytest.approx(one.weights / 8, rel=1e-3), "all but norms"
    assert eight.kv == one.kv // 8
    assert sixteen.kv == eight.kv, "eight KV heads do not divide further"
    latent = [plan_node(DEEPSEEK, replace(H200, tensor=n)).kv for n in (1, 8)]
    assert latent[0] == latent[1], "every GPU needs the latent"
    staged = plan_node(LLAMA, replace(H200, tensor=1, pipeline=4))
    assert one.weights / 4 < staged.weights < one.weights / 3
    assert staged.kv == one.kv // 4


def test_what_is_left_is_filled_with_sequences():
    plan = plan_node(LLAMA, H200)
    assert plan_node(LLAMA, replace(H200, num_seqs=plan.sequences)).fits
    assert not plan_node(LLAMA, replace(H200, num_seqs=plan.sequences + 1)).fits
    assert plan.kv_tokens // 32_768 == plan.sequences


def test_training():
    parts = training_bytes(LLAMA, masters="f32", shards=8)
    assert sum(parts.values()) == pytest.approx(16 * LLAMA.total / 8, rel=1e-6)
    assert sum(training_bytes(LLAMA, masters="bf16", shards=8).values()) == pytest.approx(
        12 * LLAMA.total / 8, rel=1e-6
    )
    for wrong in ({"masters": "int4", "shards": 8}, {"masters": "f32", "shards": 0}):
        with pytest.raises(InvalidRequestError):
            training_bytes(LLAMA, **wrong)


def test_what_cannot_be_counted_is_named():
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*deepseek_v3.*qwen3_moe"):
        count_parameters({"model_type": "mamba"})
    with pytest.raises(CheckpointError, match="kv_lora_rank"):
        count_parameters({key: value for key, value in DEEPSEEK_V3.items() if key != "kv_lora_rank"})
    for wrong in ({"format": "int3"}, {"kv_format": "fp4"}, {"quantize": "all"}, {"tensor": 0}, {"usable": 1.5}):
        with pytest.raises(InvalidRequestError):
            replace(H200, **wrong)


def test_the_command(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(KIMI_K2))
    assert main(["plan", "memory", str(path), "--format", "bf16", "--format", "int4-g32"]) == 0
    shown = capsys.readouterr().out
    assert "1026.41 B parameters, 32.86 B activated" in shown
    assert shown.splitlines()[-1].split()[0] == "int4-g32"
    assert shown.splitlines()[-1].endswith("8 GPU")
    assert main(["plan", "memory", str(tmp_path), "--json", "--gpu", "b200"]) == 0
    held = json.loads(capsys.readouterr().out)
    assert {plan["format"]: plan["fits"] for plan in held["plans"]}["fp8"] is True
    assert main(["plan", "memory", str(tmp_path), "--train", "--tp", "256"]) == 0
    assert "masters in f32" in capsys.readouterr().out
    (tmp_path / "broken.json").write_text("[1]")
    for wrong in ([str(tmp_path / "broken.json")], [str(path), "--gpu", "tpu"], ["/nonexistent"]):
        assert main(["plan", "memory", *wrong]) == 1
        assert "error:" in capsys.readouterr().err

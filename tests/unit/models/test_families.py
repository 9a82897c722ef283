"""Families from hand-written descriptions, without transformers; tests/oracle holds them against it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from headrace import models
from headrace.base.errors import CheckpointError, UnsupportedModelError
from headrace.models.sources import Source, Transform

HF: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a checkpoint."""

    shape: tuple[int, ...]
    value: float = 1.0

    def to_f32(self) -> np.ndarray:
        return np.full(self.shape, self.value, np.float32)


def metadata(architecture: str, **changes: object) -> dict[str, object]:
    keys = {
        "block_count": 3,
        "context_length": 256,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10_000.0,
    }
    keys |= {name.replace("__", "."): value for name, value in changes.items()}
    return {"general.architecture": architecture} | {f"{architecture}.{name}": value for name, value in keys.items()}


def gguf(architecture: str, tensors: Mapping[str, Stored] | None = None, **changes: object) -> models.ModelSpec:
    stored = {"token_embd.weight": Stored((100, 64)), **(tensors or {})}
    return models.load_spec(metadata(architecture, **changes), "gguf", tensors=stored)


def hf(**changes: object) -> models.ModelSpec:
    return models.load_spec(HF | changes, "hf")


def test_llama_from_both_descriptions_is_the_same_model():
    assert hf() == gguf("llama", {"output.weight": Stored((100, 64))})


def test_gguf_tensors_tell_ties_and_biases():
    assert gguf("llama").tie_embeddings
    biased = gguf("llama", {"blk.0.attn_q.bias": Stored((64,)), "blk.0.ffn_down.bias": Stored((64,))})
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, False, True)


def test_missing_and_contradictory_numbers_are_named():
    with pytest.raises(CheckpointError, match=r"config\.json has no hidden_size"):
        hf(hidden_size=None)
    with pytest.raises(CheckpointError, match="4 attention heads do not share 3 KV heads"):
        hf(num_key_value_heads=3)
    with pytest.raises(CheckpointError, match="head_dim 15 is odd"):
        hf(head_dim=15)


def test_an_unknown_architecture_is_named_with_what_is_supported():
    with pytest.raises(UnsupportedModelError, match=r"LlamaForSequenceClassification.*Qwen3ForCausalLM"):
        hf(architectures=["LlamaForSequenceClassification"])
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*qwen3"):
        hf(architectures=None, model_type="mamba")
    with pytest.raises(UnsupportedModelError, match=r"'mistral3'.*gemma3"):
        gguf("mistral3")
    with pytest.raises(CheckpointError, match="model_type"):
        hf(architectures=None, model_type=None)


def test_llama_reorders_q_and_k_of_gguf_and_of_nothing_else():
    spec = gguf("llama")
    sources = models.sources(spec, "gguf")
    assert sources["layers.1.attn.q.weight"] == Source("blk.1.attn_q.weight", Transform.UNINTERLEAVE_ROPE, 4)
    assert sources["layers.1.attn.k.weight"] == Source("blk.1.attn_k.weight", Transform.UNINTERLEAVE_ROPE, 2)
    transformed = {name for name, source in sources.items() if source.transform is not Transform.NONE}
    assert transformed == {f"layers.{i}.attn.{part}.weight" for i in range(3) for part in "qk"}
    assert all(source.transform is Transform.NONE for source in models.sources(spec, "hf").values())


def test_tied_logits_have_no_source_of_their_own():
    assert "logits.weight" not in models.sources(hf(tie_word_embeddings=True), "hf")
    assert models.sources(hf(), "hf")["logits.weight"] == Source("lm_head.weight")
    assert models.sources(hf(), "hf")["embed.weight"] == Source("model.embed_tokens.weight")


def test_mistral_slides_everywhere():
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert {layer.window for layer in hf(**mistral, sliding_window=64).layers} == {64}
    assert {layer.window for layer in hf(**mistral, sliding_window=None).layers} == {0}
    assert {layer.window for layer in gguf("llama", attention__sliding_window=64).layers} == {64}
    with pytest.raises(UnsupportedModelError, match="sliding_window"):
        hf(sliding_window=64)  # llama has none


def test_qwen2_slides_from_max_window_layers_on_if_switched_on():
    qwen2 = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64, "max_window_layers": 2}
    assert [layer.window for layer in hf(**qwen2, use_sliding_window=True).layers] == [0, 0, 64]
    assert [layer.window for layer in hf(**qwen2, use_sliding_window=False).layers] == [0, 0, 0]
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert [layer.window for layer in hf(**qwen2, use_sliding_window=True, layer_types=types).layers] == [64, 0, 0]
    with pytest.raises(CheckpointError, match="layer_types"):
        hf(**qwen2, layer_types=["full_attention"])
    assert hf(**qwen2).qkv_bias
    assert not hf(**qwen2).o_bias


def test_qwen_rows_are_as_they_are_in_gguf():
    for architecture in ("qwen2", "qwen3"):
        sources = models.sources(gguf(architecture), "gguf")
        assert all(source.transform is Transform.NONE for source in sources.values())


def test_qwen3_normalizes_q_and_k_per_head():
    spec = hf(architectures=["Qwen3ForCausalLM"])
    assert spec.head_dim == 128
    graph = models.build_graph(spec)
    assert graph.node("layers.0.attn.q_rope").inputs == ("layers.0.attn.q_norm",)
    assert graph.params["layers.0.attn.k_norm.weight"].shape == (128,)
    assert models.sources(spec, "gguf")["layers.0.attn.q_norm.weight"] == Source("blk.0.attn_q_norm.weight")


GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh", "hidden_act": None}


def test_gemma3():
    spec = hf(**GEMMA3, num_hidden_layers=7, sliding_window=32, head_dim=32, query_pre_attn_scalar=100, rope_theta=1e6)
    assert [layer.window for layer in spec.layers] == [32] * 5 + [0, 32]
    assert spec.layers[0].rope.inv_freq[1] == pytest.approx(10_000 ** (-2 / 32))
    assert spec.layers[5].rope.inv_freq[1] == pytest.approx(1e6 ** (-2 / 32))
    assert (spec.embed_scale, spec.attention_scale, spec.activation) == (8.0, 0.1, "gelu_tanh")
    assert spec.tie_embeddings
    graph = models.build_graph(spec)
    assert graph.node("layers.0.attn_add").inputs == ("embed", "layers.0.attn_post_norm")
    assert graph.node("layers.0.mlp_add").inputs == ("layers.0.attn_add", "layers.0.mlp_post_norm")


def test_gemma3_pattern_of_the_window():
    assert [layer.window for layer in hf(**GEMMA3, sliding_window_pattern=2, sliding_window=32).layers] == [32, 0, 32]


def test_gemma3_norms_are_stored_less_one_in_hugging_face_format_alone():
    spec = hf(**GEMMA3)
    stored = models.sources(spec, "hf")
    assert stored["layers.0.mlp_norm.weight"] == Source(
        "model.layers.0.pre_feedforward_layernorm.weight", Transform.ADD_ONE
    )
    added = {name for name, source in stored.items() if source.transform is Transform.ADD_ONE}
    assert added == {name for name in stored if name.endswith("norm.weight")}
    assert len(added) == 3 * 6 + 1
    assert all(source.transform is Transform.NONE for source in models.sources(spec, "gguf").values())


def test_gemma3_from_gguf():
    spec = gguf("gemma3", block_count=7, attention__sliding_window=32, attention__key_length=32, rope__freq_base=1e6)
    spec_hf = hf(
        **GEMMA3, num_hidden_layers=7, sliding_window=32, head_dim=32, query_pre_attn_scalar=32, rope_theta=1e6
    )
    assert spec.layers == spec_hf.layers
    assert (spec.embed_scale, spec.activation, spec.qk_norm, spec.post_norms) == (8.0, "gelu_tanh", True, True)
    assert spec.attention_scale == pytest.approx(32**-0.5)


def test_gemma3_27b_scales_its_scores_by_the_hidden_size():
    spec = gguf("gemma3", block_count=62, attention__key_length=32)
    assert spec.attention_scale == pytest.approx((64 / 4) ** -0.5)


def test_gemma3_gguf_linear_scaling_is_the_global_layers_alone():
    spec = gguf(
        "gemma3", block_count=6, attention__sliding_window=32, rope__scaling__type="linear", rope__scaling__factor=8.0
    )
    assert [layer.rope.inv_freq[0] for layer in spec.layers] == [1.0] * 5 + [0.125]


def test_gemma3_gguf_pattern_as_a_period_and_as_flags():
    for pattern in (2, [True, False, True]):
        spec = gguf("gemma3", attention__sliding_window=32, attention__sliding_window_pattern=pattern)
        assert [layer.window for layer in spec.layers] == [32, 0, 32]
    with pytest.raises(CheckpointError, match="sliding_window_pattern"):
        gguf("gemma3", attention__sliding_window=32, attention__sliding_window_pattern=[True])


def test_gguf_rotary_factors_come_from_tensors():
    plain = gguf("llama").layers[0].rope.inv_freq
    llama3 = gguf("llama", {"rope_freqs.weight": Stored((8,), 4.0)}).layers[0].rope.inv_freq
    assert llama3 == tuple(f / 4 for f in plain)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        gguf("llama", {"rope_freqs.weight": Stored((9,), 4.0)})
    long = {"rope_factors_long.weight": Stored((8,), 2.0), "rope_factors_short.weight": Stored((8,), 8.0)}
    keys = {"rope__scaling__type": "longrope", "rope__scaling__original_context_length": 128}
    described = metadata("llama", **keys, rope__scaling__attn_factor=1.5)
    stored = {"token_embd.weight": Stored((100, 64)), **long}
    for context, factor in ((None, 2), (129, 2), (128, 8)):
        rope = models.load_spec(described, "gguf", tensors=stored, context_length=context).layers[0].rope
        assert rope.inv_freq == tuple(f / factor for f in plain)
        assert rope.scale == 1.5


def test_gguf_yarn_is_hugging_faces_yarn():
    keys = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 64}
    section = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert gguf("llama", **keys).layers == hf(rope_scaling=section).layers


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"rope_type": "proportional"}, "proportional"),
        ({"rope_type": "default", "mrope_section": [1, 2]}, "mrope_section"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_rotations_that_are_not_built_are_refused_by_name(section, named):
    with pytest.raises(UnsupportedModelError, match=named):
        hf(rope_scaling=section)


def test_a_scaling_without_its_numbers_is_named():
    with pytest.raises(CheckpointError, match=r"rope_scaling of config\.json has no factor"):
        hf(rope_scaling={"type": "linear"})
    with pytest.raises(CheckpointError, match="long_factor"):
        hf(rope_scaling={"type": "su", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7})
    with pytest.raises(UnsupportedModelError, match=r"rope\.scaling\.type 'spiral'"):
        gguf("llama", rope__scaling__type="spiral")
    with pytest.raises(UnsupportedModelError, match=r"rope\.dimension_count = 8"):
        gguf("llama", rope__dimension_count=8)


def test_the_original_context_may_stand_outside_the_section():
    section = {"rope_type": "yarn", "factor": 4.0}
    inside = hf(rope_scaling={**section, "original_max_position_embeddings": 64})
    assert hf(rope_scaling=section, original_max_position_embeddings=64) == inside


def test_names_of_the_graph():
    graph = models.build_graph(hf(tie_word_embeddings=True))
    block = "attn_norm attn.q attn.k attn.v attn.q_rope attn.k_rope attn.core attn.o attn_add"
    block += " mlp_norm mlp.gate mlp.up mlp.glu mlp.down mlp_add"
    layers = [f"layers.{i}.{name}" for i in range(3) for name in block.split()]
    assert [node.name for node in graph.nodes] == ["embed", *layers, "sampled", "final_norm", "logits"]
    assert graph.node("logits").params == ("embed.weight",)


def test_ignorable_names_are_patterns():
    assert "lm_head.weight" in models.ignorable("hf")
    assert "rope_freqs.weight" in models.ignorable("gguf")


def test_gemma3_inside_its_image_model():
    text = {key: value for key, value in (HF | GEMMA3).items() if key != "architectures"}
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {"depth": 1}}
    spec = models.load_spec(outer, "hf", tensors={"language_model.model.embed_tokens.weight": Stored((100, 64))})
    assert spec.hidden_size == 64
    assert models.sources(spec, "hf")["layers.0.attn.q.weight"].name == (
        "language_model.model.layers.0.self_attn.q_proj.weight"
    )
    untied = models.load_spec(outer | {"tie_word_embeddings": False}, "hf")
    assert not untied.tie_embeddings
    with pytest.raises(UnsupportedModelError, match="quantization_config"):
        models.load_spec(outer | {"quantization_config": {"bits": 4}}, "hf")

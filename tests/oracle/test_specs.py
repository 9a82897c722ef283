"""Configs as transformers writes them, and the names and shapes of its models' own parameters."""

import pytest

from headrace import models
from headrace.base.errors import UnsupportedModelError

transformers = pytest.importorskip("transformers", reason="the oracle is transformers")

TINY = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}

CASES = {
    "llama": (transformers.LlamaConfig, {}),
    "llama-biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama-tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 16}),
    "mistral-full": (transformers.MistralConfig, {"sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen2-window": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32}),
    "qwen3-bias": (transformers.Qwen3Config, {"head_dim": 32, "attention_bias": True}),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {"head_dim": 32, "sliding_window": 16, "num_hidden_layers": 7, "query_pre_attn_scalar": 24},
    ),
}


def saved(config, tmp_path) -> dict:
    """The config as a model folder holds it."""
    import json

    model = transformers.AutoModelForCausalLM.from_config(config)
    model.config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["architectures"] = [type(model).__name__]
    return written


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_of_the_graph_is_a_tensor_of_that_shape(name, tmp_path):
    config_class, options = CASES[name]
    config = config_class(**(TINY | options))
    spec = models.load_spec(saved(config, tmp_path), "hf")
    graph, sources = models.build_graph(spec), models.sources(spec, "hf")
    tensors = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    assert set(sources) == set(graph.params)
    shapes = {source.name: graph.params[name].shape for name, source in sources.items()}
    if spec.tie_embeddings:
        tensors.pop("lm_head.weight")
    assert shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", CASES)
def test_windows_are_those_of_the_layer_types(name, tmp_path):
    config_class, options = CASES[name]
    config = config_class(**(TINY | options))
    spec = models.load_spec(saved(config, tmp_path), "hf")
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or 0
    expected = [window if kinds is None or kind == "sliding_attention" else 0 for kind in kinds or ["any"] * 3]
    assert [layer.window for layer in spec.layers] == expected


def test_a_config_read_without_its_model_type_defaults_equals_the_full_one():
    """Published Gemma 3 configs leave out what equals the class's defaults."""
    brief = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    brief |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    full = transformers.Gemma3TextConfig(**{k: v for k, v in brief.items() if k != "model_type"})
    assert models.load_spec(brief, "hf") == models.load_spec(full.to_dict(), "hf")


def test_gemma3_scales_the_global_rotation_only():
    config = transformers.Gemma3TextConfig(**TINY, rope_scaling={"rope_type": "linear", "factor": 8.0}, head_dim=16)
    spec = models.load_spec(config.to_dict() | {"num_hidden_layers": 3}, "hf")
    assert {layer.window > 0: layer.rope.inv_freq[0] for layer in spec.layers} == {True: 1.0}
    deeper = transformers.Gemma3TextConfig(
        **(TINY | {"num_hidden_layers": 6}), rope_scaling={"rope_type": "linear", "factor": 8.0}, head_dim=16
    )
    spec = models.load_spec(deeper.to_dict(), "hf")
    assert spec.layers[0].rope.inv_freq[0] == 1.0
    assert spec.layers[5].rope.inv_freq[0] == 0.125


def test_gemma3_inside_its_image_model(tmp_path):
    text = transformers.Gemma3TextConfig(**TINY, head_dim=32)
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    config.architectures = ["Gemma3ForConditionalGeneration"]
    model = transformers.Gemma3ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    spec = models.load_spec(config.to_dict(), "hf", tensors=dict.fromkeys(shapes))
    graph = models.build_graph(spec)
    for name, source in models.sources(spec, "hf").items():
        assert shapes[source.name] == graph.params[name].shape


@pytest.mark.parametrize(
    ("config_class", "options", "named"),
    [
        (transformers.Gemma3TextConfig, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (transformers.Gemma3TextConfig, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (transformers.LlamaConfig, {"hidden_act": "relu"}, "hidden_act"),
        (transformers.LlamaConfig, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (transformers.Qwen2Config, {"attention_bias": True}, "attention_bias"),
    ],
)
def test_what_is_not_built_is_refused_by_name(config_class, options, named):
    config = config_class(**TINY, **options).to_dict()
    with pytest.raises(UnsupportedModelError, match=named):
        models.load_spec(config, "hf")


def test_other_architectures_are_refused_by_name():
    config = transformers.GPT2Config().to_dict()
    with pytest.raises(UnsupportedModelError, match=r"gpt2.*[Ss]upported.*llama"):
        models.load_spec(config, "hf")

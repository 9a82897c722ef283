"""Gemma 3, its language model.

Differences from llama: most layers see a sliding window and rotate by a local base without scaling; norms stand before
and after attention and MLP; q and k are normalized per head; embeddings are scaled by sqrt(hidden_size); GELU.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from headrace.graph.ir import RopeTable
from headrace.models.config import Config, Description, finish_gguf, finish_hf
from headrace.models.decoder import HF_NAMES, gguf_sources, hf_sources
from headrace.models.family import Family, Kind, gguf_base, hf_base
from headrace.models.layers import layer_types
from headrace.models.rope import HfRope, plain_rope
from headrace.models.sources import Source, Transform
from headrace.models.spec import LayerSpec, ModelSpec

_DEFAULTS: Mapping[str, object] = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
"""What published configs leave out because it equals the config class's default."""

_GLOBAL_THETA, _LOCAL_THETA, _PATTERN = 1_000_000.0, 10_000.0, 6
"""Bases of the two rotations; every sixth layer sees all positions, unless the checkpoint says otherwise."""

_HF_NAMES = {
    **HF_NAMES,
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}

_TEXT_PREFIXES = ("model.", "language_model.model.", "model.language_model.")
"""Where the decoder lies: alone, and inside the image model as older and newer checkpoints name it."""


def from_hf(model: Description) -> ModelSpec:
    """From `config.json`; of an image model's, the language model in its ``text_config``."""
    model = replace(model, config=_text_config(model.config).with_defaults(_DEFAULTS))
    config = model.config
    num_layers = config.positive("num_hidden_layers")
    pattern = config.positive("sliding_window_pattern", _PATTERN)
    default = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(num_layers)]
    ropes = _hf_ropes(model)
    windows = {"full_attention": 0, "sliding_attention": config.integer("sliding_window", 0)}
    kinds = layer_types(config, num_layers, default)
    layers = tuple(LayerSpec(rope=ropes[kind], window=windows[kind]) for kind in kinds)
    bias = config.boolean("attention_bias", False)
    spec = replace(
        hf_base(model, family="gemma3", layers=layers, activation_key="hidden_activation"),
        attention_scale=config.number("query_pre_attn_scalar") ** -0.5,
        qkv_bias=bias,
        o_bias=bias,
        tensor_prefix=next((p for p in _TEXT_PREFIXES if f"{p}embed_tokens.weight" in model.tensors), "model."),
    )
    finish_hf(config)
    return _gemma(spec)


def _text_config(config: Config) -> Config:
    """The language model's part, which is all there is unless the config is the image model's."""
    if not config.has("text_config"):
        return config
    text = config.section("text_config")
    if config.has("tie_word_embeddings"):  # the outer model's word counts
        text = text.overridden({"tie_word_embeddings": config.boolean("tie_word_embeddings")})
    config.skip("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index")
    finish_hf(config)
    return text


def _hf_ropes(model: Description) -> Mapping[str, RopeTable]:
    """Per kind of layer. Configs from before transformers 5 give one scaling, which is the global layers' alone."""
    config = model.config
    thetas = {
        "full_attention": config.number("rope_theta", _GLOBAL_THETA),
        "sliding_attention": config.number("rope_local_base_freq", _LOCAL_THETA),
    }
    sections = {kind: Config({}, config.where) for kind in thetas}
    if config.has("rope_parameters"):
        nested = config.section("rope_parameters")
        sections |= {kind: nested.section(kind) for kind in thetas if nested.has(kind)}
        nested.refuse_unread()
    if config.has("rope_scaling"):
        sections["full_attention"] = config.section("rope_scaling")
    max_positions = config.positive("max_position_embeddings")
    return {
        kind: HfRope(
            section=section,
            theta=section.number("rope_theta", thetas[kind]),
            head_dim=config.positive("head_dim"),
            max_positions=max_positions,
            context_length=model.context_length or max_positions,
        ).table()
        for kind, section in sections.items()
    }


def from_gguf(model: Description) -> ModelSpec:
    """From the metadata of architecture ``gemma3``.

    Most files say neither the period of the window (6), nor the local base (10000), nor the scale of the scores; the
    constants are llama.cpp's. The 27B model alone, known by its 62 layers, scales its scores by the features per head
    of the hidden size rather than by those of a head.
    """
    config = model.config.with_defaults({f"{model.config.prefix}rope.freq_base": _GLOBAL_THETA})
    spec = gguf_base(replace(model, config=config), family="gemma3")
    local = plain_rope(config.number("rope.freq_base_swa", _LOCAL_THETA), spec.head_dim)
    window = config.integer("attention.sliding_window", 0)
    layers = tuple(
        LayerSpec(rope=local, window=window) if slides else layer
        for layer, slides in zip(spec.layers, _gguf_slides(config, spec.num_layers, window), strict=True)
    )
    per_head = spec.hidden_size // spec.num_heads if spec.num_layers == 62 else spec.head_dim
    scale = config.number("attention.scale", per_head**-0.5)
    finish_gguf(config)
    return _gemma(replace(spec, layers=layers, attention_scale=scale, activation="gelu_tanh"))


def _gguf_slides(config: Config, num_layers: int, window: int) -> Sequence[bool]:
    """Which layers slide: a period, or one flag per layer; none where the file names no window."""
    key = "attention.sliding_window_pattern"
    if config.has(key) and not config.is_integer(key):
        flags = config.items(key)
        if len(flags) != num_layers:
            raise config.wrong(key, f"{num_layers} flags", flags)
        return [bool(flag) and window > 0 for flag in flags]
    period = config.positive(key, _PATTERN)
    return [window > 0 and (i + 1) % period != 0 for i in range(num_layers)]


def _gemma(spec: ModelSpec) -> ModelSpec:
    return replace(spec, embed_scale=math.sqrt(spec.hidden_size), qk_norm=True, post_norms=True)


def sources(spec: ModelSpec, kind: Kind) -> Mapping[str, Source]:
    """Where the parameters lie. Hugging Face stores norm weights less one; converters to GGUF add it back."""

    def rule(node: str, source: Source) -> Source:
        return replace(source, transform=Transform.ADD_ONE) if node.endswith("norm") else source

    return hf_sources(spec, names=_HF_NAMES, rule=rule) if kind == "hf" else gguf_sources(spec)


FAMILY = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    model_types=("gemma3_text", "gemma3"),
    gguf_architectures=("gemma3",),
    from_hf=from_hf,
    from_gguf=from_gguf,
    sources=sources,
)

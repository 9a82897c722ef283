"""Llama 1 to 3.3 and everything built like it (SmolLM2, TinyLlama, Yi, …)."""

from collections.abc import Mapping
from dataclasses import replace

from headrace.models.config import Description, finish_gguf, finish_hf
from headrace.models.decoder import gguf_sources, hf_sources
from headrace.models.family import Family, Kind, gguf_base, hf_base
from headrace.models.sources import Source, Transform
from headrace.models.spec import LayerSpec, ModelSpec


def from_hf(model: Description) -> ModelSpec:
    """From `config.json`; ``attention_bias`` puts biases on all four projections."""
    bias = model.config.boolean("attention_bias", False)
    spec = replace(
        hf_base(model, family="llama"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=model.config.boolean("mlp_bias", False),
    )
    finish_hf(model.config)
    return spec


def from_gguf(model: Description) -> ModelSpec:
    """From the metadata of architecture ``llama``, which Mistral's files carry too, then with a window if they have
    one."""
    spec = gguf_base(model, family="llama")
    window = model.config.integer("attention.sliding_window", 0)
    spec = replace(spec, layers=tuple(LayerSpec(rope=layer.rope, window=window) for layer in spec.layers))
    finish_gguf(model.config)
    return spec


def sources(spec: ModelSpec, kind: Kind) -> Mapping[str, Source]:
    """Where the parameters lie. Converters to GGUF reorder this architecture's q and k rows to rotary pairs."""

    def rule(node: str, source: Source) -> Source:
        heads = {"attn.q": spec.num_heads, "attn.k": spec.num_kv_heads}
        return (
            replace(source, transform=Transform.UNINTERLEAVE_ROPE, num_heads=heads[node]) if node in heads else source
        )

    return hf_sources(spec) if kind == "hf" else gguf_sources(spec, rule=rule)


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    gguf_architectures=("llama",),
    from_hf=from_hf,
    from_gguf=from_gguf,
    sources=sources,
)

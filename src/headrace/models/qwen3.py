"""Qwen 3, dense: Qwen 2 without its biases, with a norm on each head of q and k."""

from dataclasses import replace

from headrace.models import qwen2
from headrace.models.config import Description, finish_gguf, finish_hf
from headrace.models.family import Family, gguf_base, hf_base
from headrace.models.layers import windowed
from headrace.models.spec import ModelSpec


def from_hf(model: Description) -> ModelSpec:
    """From `config.json`; ``head_dim`` is independent of the hidden size here."""
    model = replace(model, config=model.config.with_defaults({"head_dim": 128}))
    bias = model.config.boolean("attention_bias", False)
    spec = replace(hf_base(model, family="qwen3"), qk_norm=True, qkv_bias=bias, o_bias=bias)
    spec = replace(spec, layers=windowed(model.config, spec.layers))
    finish_hf(model.config)
    return spec


def from_gguf(model: Description) -> ModelSpec:
    """From the metadata of architecture ``qwen3``."""
    spec = replace(gguf_base(model, family="qwen3"), qk_norm=True)
    finish_gguf(model.config)
    return spec


FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    gguf_architectures=("qwen3",),
    from_hf=from_hf,
    from_gguf=from_gguf,
    sources=qwen2.sources,
)

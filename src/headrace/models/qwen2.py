"""Qwen 2 and 2.5: biases on q, k and v; a sliding window on the later layers where switched on."""

from collections.abc import Mapping
from dataclasses import replace

from headrace.models.config import Description, finish_gguf, finish_hf
from headrace.models.decoder import gguf_sources, hf_sources
from headrace.models.family import Family, Kind, gguf_base, hf_base
from headrace.models.layers import windowed
from headrace.models.sources import Source
from headrace.models.spec import ModelSpec


def from_hf(model: Description) -> ModelSpec:
    """From `config.json`."""
    spec = replace(hf_base(model, family="qwen2"), qkv_bias=True)
    spec = replace(spec, layers=windowed(model.config, spec.layers))
    finish_hf(model.config)
    return spec


def from_gguf(model: Description) -> ModelSpec:
    """From the metadata of architecture ``qwen2``."""
    spec = replace(gguf_base(model, family="qwen2"), qkv_bias=True)
    finish_gguf(model.config)
    return spec


def sources(spec: ModelSpec, kind: Kind) -> Mapping[str, Source]:
    """Where the parameters lie, as they are."""
    return hf_sources(spec) if kind == "hf" else gguf_sources(spec)


FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    gguf_architectures=("qwen2",),
    from_hf=from_hf,
    from_gguf=from_gguf,
    sources=sources,
)

"""Mistral 7B and its successors of the same architecture: llama with, in some, a sliding window on every layer."""

from dataclasses import replace

from headrace.models import llama
from headrace.models.config import Description, finish_hf
from headrace.models.family import Family, hf_base
from headrace.models.spec import LayerSpec, ModelSpec


def from_hf(model: Description) -> ModelSpec:
    """From `config.json`; ``sliding_window`` null means none."""
    spec = hf_base(model, family="mistral")
    window = model.config.integer("sliding_window", 0)
    finish_hf(model.config)
    return replace(spec, layers=tuple(LayerSpec(rope=layer.rope, window=window) for layer in spec.layers))


FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    gguf_architectures=(),  # its GGUF files carry architecture llama
    from_hf=from_hf,
    from_gguf=llama.from_gguf,
    sources=llama.sources,
)

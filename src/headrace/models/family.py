"""What a model family is to the registry, and the reads that all families share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from headrace.models.config import Description
from headrace.models.rope import HfRope, hf_rope_section, rope_from_gguf
from headrace.models.sources import Source
from headrace.models.spec import LayerSpec, ModelSpec

Kind = Literal["hf", "gguf"]
"""The two descriptions of a model that can be read: Hugging Face `config.json`, GGUF metadata."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How one architecture is recognized, read and named.

    Attributes:
        name: as it stands in `ModelSpec.family`.
        architectures: Hugging Face ``architectures``.
        model_types: Hugging Face ``model_type``.
        gguf_architectures: GGUF ``general.architecture``.
        from_hf: a Hugging Face folder's description to the spec.
        from_gguf: a GGUF file's description to the spec.
        sources: where a spec's parameters lie in a checkpoint of either kind.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    gguf_architectures: tuple[str, ...]
    from_hf: Callable[[Description], ModelSpec]
    from_gguf: Callable[[Description], ModelSpec]
    sources: Callable[[ModelSpec, Kind], Mapping[str, Source]]


_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def hf_base(
    model: Description,
    *,
    family: str,
    layers: tuple[LayerSpec, ...] | None = None,
    activation_key: str = "hidden_act",
) -> ModelSpec:
    """What every llama-like `config.json` says; families replace what they do otherwise.

    `layers` is for families whose layers differ in their rotation; by default all share the config's one.
    """
    config = model.config
    hidden_size, num_heads = config.positive("hidden_size"), config.positive("num_attention_heads")
    head_dim = config.positive("head_dim", max(hidden_size // num_heads, 1))
    max_positions = config.positive("max_position_embeddings")
    if layers is None:
        section, theta = hf_rope_section(config)
        rope = HfRope(
            section=section,
            theta=theta,
            head_dim=head_dim,
            max_positions=max_positions,
            context_length=model.context_length or max_positions,
        ).table()
        layers = (LayerSpec(rope=rope),) * config.positive("num_hidden_layers")
    config.require(activation_key, *_ACTIVATIONS)
    return ModelSpec(
        family=family,
        vocab_size=config.positive("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.positive("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=config.positive("num_key_value_heads", num_heads),
        head_dim=head_dim,
        layers=layers,
        norm_eps=config.number("rms_norm_eps"),
        max_position_embeddings=max_positions,
        attention_scale=head_dim**-0.5,
        activation=_ACTIVATIONS[config.text(activation_key, "silu")],
        tie_embeddings=config.boolean("tie_word_embeddings", False),
    )


def gguf_base(model: Description, *, family: str) -> ModelSpec:
    """What every llama-like GGUF file says. Whether biases and a separate output matrix exist is for its tensors to
    tell."""
    config, tensors = model.config, model.tensors
    hidden_size, num_heads = config.positive("embedding_length"), config.positive("attention.head_count")
    head_dim = config.positive("attention.key_length", max(hidden_size // num_heads, 1))
    config.require("attention.value_length", head_dim)
    max_positions = config.positive("context_length")
    rope = rope_from_gguf(
        config, tensors, head_dim=head_dim, max_positions=max_positions, context_length=model.context_length
    )
    num_layers = config.positive("block_count")
    table = tensors.get("token_embd.weight")
    return ModelSpec(
        family=family,
        # The table's own rows, where they can be seen: some converters trim it and leave the metadata as it was.
        vocab_size=table.shape[0] if table is not None else config.positive("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.positive("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=config.positive("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        layers=(LayerSpec(rope=rope),) * num_layers,
        norm_eps=config.number("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=max_positions,
        attention_scale=head_dim**-0.5,
        tie_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_down.bias" in tensors,
    )

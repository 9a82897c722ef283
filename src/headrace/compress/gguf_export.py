"""A model as one GGUF file: names, order of rows and metadata as llama.cpp expects them, whatever it came from."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from headrace.base.errors import UnsupportedModelError
from headrace.formats.checkpoint import Checkpoint
from headrace.formats.gguf import stored_metadata
from headrace.formats.weights import interleave_rope
from headrace.models import load_spec, sources
from headrace.models.config import Config
from headrace.models.rope import hf_rope_section, plain_rope
from headrace.models.sources import Transform
from headrace.models.spec import ModelSpec
from headrace.numerics.gguf_blocks import gguf_format, gguf_tensor
from headrace.numerics.row_blocks import groups_in, row_blocks
from headrace.numerics.tensor import RawTensor
from headrace.text.gguf_export import gguf_text_metadata

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "bf16": 32}  # llama.h's llama_ftype
_QUANTIZATION_VERSION = 2
_FOLDER_INSTEAD = "Write the model as a folder instead (-o without .gguf)."
_ROPE_FACTORS = "rope_freqs.weight"
_TOLERANCE = 1e-6  # of what GGUF holds as f32


def gguf_metadata(
    checkpoint: Checkpoint, spec: ModelSpec, weights: Mapping[str, RawTensor], file_format: str
) -> dict[str, object]:
    """All that the file says beside its tensors: carried over as it is from a GGUF file, else made.

    Args:
        checkpoint: the source.
        spec: what it was read as.
        weights: its parameters.
        file_format: of most of its matrices.

    Raises UnsupportedModelError for what GGUF, or this module, has no keys for; names it.
    """
    ours = {"general.file_type": _FILE_TYPES[file_format], "general.quantization_version": _QUANTIZATION_VERSION}
    if checkpoint.kind == "gguf":
        return {**stored_metadata(checkpoint.path), **ours}
    architecture = _ARCHITECTURES.get(spec.family)
    if architecture is None or (spec.family == "qwen3" and spec.qkv_bias):
        raise UnsupportedModelError(
            f"Models like {checkpoint.path.name} ({spec.family}) are not written as GGUF.", _FOLDER_INSTEAD
        )
    metadata = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": checkpoint.path.name,
        **ours,
        **{f"{architecture}.{key}": value for key, value in _numbers(checkpoint, spec).items()},
        **gguf_text_metadata(checkpoint.folder, spec.vocab_size),
    }
    _check(checkpoint, spec, weights, metadata)
    return metadata


def gguf_tensors(checkpoint: Checkpoint, spec: ModelSpec, weights: Mapping[str, RawTensor]) -> dict[str, RawTensor]:
    """Parameters by their names in GGUF, and what else a GGUF source holds, in its order.

    All must be in formats that GGUF has, or in row blocks that equal one of them (`refuse_unheld`).
    """
    found = {_ROPE_FACTORS: factors} if (factors := _rope_factors(checkpoint, spec)) is not None else {}
    for name, source in sources(spec, "gguf").items():
        tensor = _in_gguf(weights[name])
        if source.transform is Transform.UNINTERLEAVE_ROPE:
            tensor = interleave_rope(tensor, source.num_heads)
        found[source.name] = tensor
    if checkpoint.kind == "gguf":
        return {name: found.get(name, stored) for name, stored in checkpoint.tensors.items()}
    return found


def refuse_unheld(weights: Mapping[str, RawTensor]) -> None:
    """Raise UnsupportedModelError, with the name, for a matrix in a number format that GGUF does not have."""
    for name, tensor in weights.items():
        layout = row_blocks(tensor.format.name)
        if layout is not None and gguf_format(layout) is None:
            raise UnsupportedModelError(
                f"{name} is stored as {tensor.format.name}, which GGUF does not hold.",
                "Quantize it too (--logits q8_0, no --ignore), or write the model as a folder.",
            )


def _in_gguf(tensor: RawTensor) -> RawTensor:
    layout = row_blocks(tensor.format.name)
    return tensor if layout is None else gguf_tensor(groups_in(layout, tensor.data))


def _numbers(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, object]:
    config = Config(checkpoint.config, "config.json")
    section, theta = hf_rope_section(config)
    numbers: dict[str, object] = {
        "vocab_size": spec.vocab_size,
        "context_length": spec.max_position_embeddings,
        "embedding_length": spec.hidden_size,
        "block_count": spec.num_layers,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.num_heads,
        "attention.head_count_kv": spec.num_kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": spec.norm_eps,
        "rope.dimension_count": spec.head_dim,
        "rope.freq_base": theta,
    }
    kind = section.text("rope_type", section.text("type", "default"))
    if kind in ("linear", "yarn"):
        numbers |= {"rope.scaling.type": kind, "rope.scaling.factor": section.number("factor")}
    if kind == "yarn":
        original = section.positive("original_max_position_embeddings", spec.max_position_embeddings)
        numbers["rope.scaling.original_context_length"] = original
    return numbers


def _rope_factors(checkpoint: Checkpoint, spec: ModelSpec) -> RawTensor | None:
    """What divides the frequencies where no key says it, as converters store Llama 3.1's scaling."""
    if checkpoint.kind == "gguf":
        return None
    section, theta = hf_rope_section(Config(checkpoint.config, "config.json"))
    if section.text("rope_type", section.text("type", "default")) != "llama3":
        return None
    plain, scaled = plain_rope(theta, spec.head_dim), spec.layers[0].rope
    return RawTensor.from_f32(np.float32(plain.inv_freq) / np.float32(scaled.inv_freq))


def _check(
    checkpoint: Checkpoint, spec: ModelSpec, weights: Mapping[str, RawTensor], metadata: Mapping[str, object]
) -> None:
    """The file is read as the model that it came from."""
    tensors = {source.name: weights[name] for name, source in sources(spec, "gguf").items()}
    if (factors := _rope_factors(checkpoint, spec)) is not None:
        tensors[_ROPE_FACTORS] = factors
    again = load_spec(metadata, "gguf", tensors=tensors)
    if not _alike(spec, again):
        raise UnsupportedModelError(
            f"{checkpoint.path.name} ({spec.family}) uses what GGUF's metadata would not say, such as sliding windows"
            " or another scaling of its rotary embeddings.",
            _FOLDER_INSTEAD,
        )


def _alike(spec: ModelSpec, again: ModelSpec) -> bool:
    """Equal but for what is rounded to f32, and for names."""
    ropes = [
        (ours.rope, theirs.rope, ours.window == theirs.window)
        for ours, theirs in zip(spec.layers, again.layers, strict=False)
    ]
    same_layers = len(spec.layers) == len(again.layers) and all(
        windows
        and np.allclose(ours.inv_freq, theirs.inv_freq, rtol=_TOLERANCE, atol=0)
        and np.isclose(ours.scale, theirs.scale, rtol=_TOLERANCE)
        for ours, theirs, windows in ropes
    )
    windowed = any(layer.window for layer in spec.layers)  # which llama.cpp does not have in these architectures
    named = replace(again, family=spec.family, tensor_prefix=spec.tensor_prefix, layers=spec.layers)
    close = bool(np.isclose(spec.norm_eps, again.norm_eps, rtol=_TOLERANCE, atol=0))
    return same_layers and not windowed and close and replace(named, norm_eps=spec.norm_eps) == spec

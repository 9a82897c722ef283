"""A model as a Hugging Face folder: names, config and text files, whatever it came from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headrace.base.errors import UnsupportedModelError
from headrace.formats.checkpoint import Checkpoint
from headrace.formats.compressed_tensors_writer import stored_bytes
from headrace.formats.model_folder import companions
from headrace.llm.text_side import load_text
from headrace.models import load_spec, sources
from headrace.models.sources import Transform
from headrace.models.spec import ModelSpec
from headrace.numerics.bitfields import Bytes
from headrace.numerics.formats import FORMATS
from headrace.numerics.schemes import GgufScheme, Scheme
from headrace.numerics.tensor import RawTensor
from headrace.text.tokenizer import Tokenizer

_ROWS = 1024  # of a matrix, rounded at once
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def hf_named(spec: ModelSpec, weights: Mapping[str, RawTensor]) -> dict[str, RawTensor]:
    """Parameters by their Hugging Face names, in the number formats they have: what ``update_weights`` takes."""
    found = {}
    for name, source in sources(spec, "hf").items():
        tensor = weights[name]
        if source.transform is Transform.ADD_ONE:
            tensor = RawTensor.from_f32(tensor.to_f32() - np.float32(1))
        found[source.name] = tensor
    return found


def hf_tensors(spec: ModelSpec, weights: Mapping[str, RawTensor]) -> dict[str, RawTensor]:
    """Parameters by their Hugging Face names, as such checkpoints hold them.

    Plain ones become bf16: matrices rounded when they are read, vectors only if that is exact, else they stay f32.
    """
    named = hf_named(spec, weights)
    return {name: tensor if _is_quantized(tensor) else _plain(tensor) for name, tensor in named.items()}


def folder_bytes(
    spec: ModelSpec, weights: Mapping[str, RawTensor], schemes: Mapping[str, Scheme], *, without: Sequence[str] = ()
) -> int:
    """Of all tensors in the files of the folder that `write_compressed_tensors` makes.

    Args:
        schemes: of the parameters that are quantized by them; others that are quantized already count as they are.
        without: parameters that do not count.
    """
    left_out = {hf_name(spec, name) for name in without}
    by_name = {hf_name(spec, name): scheme for name, scheme in schemes.items()}
    total = 0
    for name, tensor in hf_tensors(spec, weights).items():
        if name in left_out:
            continue
        scheme = by_name.get(name)
        assert not isinstance(scheme, GgufScheme), "a folder's scheme"
        total += tensor.num_bytes if scheme is None else stored_bytes(tensor, scheme)
    return total


def hf_name(spec: ModelSpec, name: str) -> str:
    """A parameter's name in a Hugging Face checkpoint."""
    return sources(spec, "hf")[name].name


def hf_config(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, Any]:
    """What config.json shall say. Raises UnsupportedModelError for a GGUF file that this does not say everything of."""
    if checkpoint.kind == "hf":
        return dict(checkpoint.config)
    architecture = str(checkpoint.config["general.architecture"])
    config = {
        "architectures": [_ARCHITECTURES.get(spec.family, "")],
        "model_type": spec.family,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps,
        "max_position_embeddings": spec.max_position_embeddings,
        "rope_theta": float(checkpoint.config.get(f"{architecture}.rope.freq_base", 10_000.0)),
        "tie_word_embeddings": spec.tie_embeddings,
        "torch_dtype": "bfloat16",
    }
    if spec.family == "llama":
        config |= {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias}
    if spec.family not in _ARCHITECTURES or load_spec(config, "hf") != spec:
        raise UnsupportedModelError(
            f"{checkpoint.path.name} ({spec.family}) uses what its config.json would not say.",
            "Quantize the model's Hugging Face folder instead.",
        )
    return config


def text_files(checkpoint: Checkpoint, folder: Path) -> list[Path]:
    """The files of tokenizer and template, made in `folder` if the model is one GGUF file.

    Raises UnsupportedModelError for a tokenizer that would not be the same.
    """
    if checkpoint.kind == "hf":
        return companions(checkpoint.folder)
    text = load_text(checkpoint)
    text.tokenizer.save(folder)
    metadata = checkpoint.config
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text())
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    config_path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    sample = "The quick brown fox, 42 times:\n\tdéjà vu… 你好"
    if Tokenizer.from_hf_folder(folder).encode(sample) != text.tokenizer.encode(sample):
        raise UnsupportedModelError(
            f"The tokenizer of {checkpoint.path.name} says something else once it is written as tokenizer.json.",
            "Quantize the model's Hugging Face folder instead.",
        )
    return sorted(folder.iterdir())


def _is_quantized(tensor: RawTensor) -> bool:
    return tensor.format.block_size > 1 and tensor.format.name not in FORMATS


def _plain(tensor: RawTensor) -> RawTensor:
    if tensor.format.name == "bf16":
        return tensor
    if len(tensor.shape) == 2:
        return RawTensor(FORMATS["bf16"], tensor.shape, lambda: _in_bf16(tensor))
    rounded = tensor.in_plain("bf16")
    return rounded if np.array_equal(rounded.to_f32(), tensor.to_f32()) else tensor.in_plain("f32")


def _in_bf16(tensor: RawTensor) -> Bytes:
    """The bytes of a matrix rounded to bf16, some rows at a time: f32 of a whole embedding would be the largest of all
    that quantization holds."""
    plain = RawTensor(tensor.format, tensor.shape, tensor.data)
    found = np.empty((tensor.shape[0], 2 * tensor.shape[1]), np.uint8)
    for begin in range(0, len(found), _ROWS):
        chosen = slice(begin, begin + _ROWS)
        found[chosen] = plain.rows(chosen).in_plain("bf16").data
    return found

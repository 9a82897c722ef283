"""Tiny random-weight models of every supported family, made with Hugging Face transformers: the oracle's truth.

Each comes as a transformers model, as a folder, and as the GGUF file that llama.cpp's converter would make of it; the
quantized GGUF files go with a transformers model that holds their dequantized weights.
"""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as QType
from transformers import PreTrainedConfig, PreTrainedModel

ORIGINAL_CONTEXT = 8
"""``original_max_position_embeddings`` where a rotary scaling has one: less than any test's prompt."""

MAX_POSITIONS = 32
"""``max_position_embeddings`` of every model."""

_TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "attn_implementation": "eager",
}


def _llama(**changes: object) -> PreTrainedConfig:
    return transformers.LlamaConfig(**{**_TINY, **changes})


def _scaled(rope_type: str, **parameters: object) -> Callable[[], PreTrainedConfig]:
    rope = {"rope_type": rope_type, "rope_theta": 500.0, **parameters}
    return lambda: _llama(rope_parameters=rope)


def _factors(start: float) -> list[float]:
    return [start + 0.3 * i for i in range(8)]


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _llama,
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "llama-biases": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama-linear": _scaled("linear", factor=4.0),
    "llama-dynamic": _scaled("dynamic", factor=4.0),
    "llama-yarn": _scaled("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL_CONTEXT),
    "llama-longrope": _scaled(
        "longrope",
        factor=4.0,
        original_max_position_embeddings=ORIGINAL_CONTEXT,
        short_factor=_factors(1.0),
        long_factor=_factors(1.5),
    ),
    "llama-llama3": _scaled(
        "llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=ORIGINAL_CONTEXT,
    ),
    # Blocks of the K formats are 256 values.
    "llama-wide": lambda: _llama(hidden_size=256, intermediate_size=512, num_hidden_layers=2),
    "mistral": lambda: transformers.MistralConfig(**_TINY, head_dim=16, sliding_window=7),
    "qwen2": lambda: transformers.Qwen2Config(**_TINY),
    "qwen2-window": lambda: transformers.Qwen2Config(
        **_TINY, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_TINY, head_dim=32, tie_word_embeddings=True),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **{**_TINY, "num_hidden_layers": 6},
        head_dim=32,
        query_pre_attn_scalar=24,
        sliding_window=7,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        },
    ),
}

GGUF_NAMES = tuple(name for name in CONFIGS if name not in ("llama-dynamic", "qwen2-window"))
"""Those that GGUF has metadata for."""

PLAIN_AND_LEGACY_FORMATS = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_FORMATS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}


def make_model(name: str) -> PreTrainedModel:
    """The model of that name in f32, always with the same weights.

    They are drawn wider than transformers initializes them, and norms and biases are drawn too: every parameter then
    moves the logits far more than the tolerance.
    """
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(sum(name.encode()))
    unit_norms = model.config.model_type != "gemma3_text"  # Gemma's norm weights are differences from one
    with torch.no_grad():
        for key, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if param.ndim == 2:
                param.copy_(noise / param.shape[1] ** 0.5)
            else:
                param.copy_(0.2 * noise + (1.0 if unit_norms and "norm" in key else 0.0))
    model.generation_config.eos_token_id = None
    return model


def write_hf(model: PreTrainedModel, folder: Path) -> Path:
    """Save as ``config.json`` and safetensors."""
    model.save_pretrained(folder)
    return folder


def write_gguf(model: PreTrainedModel, path: Path, number_format: str = "F32") -> Path:
    """Save as GGUF with all matrices in `number_format`; the model's own weights become the dequantized ones.

    The `gguf` package does not quantize to the K formats: for these, the stored blocks, and so the model's new weights,
    are random.
    """
    qtype = QType[number_format]
    architecture = _ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _write_metadata(writer, model)
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    generator = np.random.default_rng(len(number_format))
    for key, param in model.named_parameters():
        stored_name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        values = _to_gguf(model, key, param.detach().numpy())
        if param.ndim == 1:
            writer.add_tensor(stored_name, values)
            continue
        blocks = _random_k_blocks(values.shape, qtype, generator) if number_format in K_FORMATS else None
        if blocks is None:
            blocks = gguf.quants.quantize(values, qtype)
        writer.add_tensor(stored_name, blocks, raw_dtype=qtype)
        with torch.no_grad():
            param.copy_(torch.from_numpy(_from_gguf(model, key, gguf.quants.dequantize(blocks, qtype))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_metadata(writer: gguf.GGUFWriter, model: PreTrainedModel) -> None:
    config = model.config
    head_dim = _head_dim(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    if config.model_type == "gemma3_text":  # its period of six and its local base are constants of the architecture
        writer.add_attention_scale(config.query_pre_attn_scalar**-0.5)
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    if config.model_type in ("gemma3_text", "mistral"):
        writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base(rope["rope_theta"])
    _write_rope_scaling(writer, rope, head_dim)


def _write_rope_scaling(writer: gguf.GGUFWriter, rope: dict, head_dim: int) -> None:
    match rope["rope_type"]:
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        case "longrope":
            original = rope["original_max_position_embeddings"]
            writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
            writer.add_rope_scaling_orig_ctx_len(original)
            writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(rope["factor"]) / np.log(original))))
            writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], np.float32))
            writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], np.float32))
        case "llama3":
            writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, head_dim))


def _llama3_factors(rope: dict, head_dim: int) -> np.ndarray:
    """What llama.cpp's converter stores for Llama 3.1's scaling: by what each plain frequency is divided."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](_llama(rope_parameters=rope), torch.device("cpu"))
    plain = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2) / head_dim)
    return (plain / scaled).numpy().astype(np.float32)


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rotary_heads(model: PreTrainedModel, key: str) -> int:
    """Heads over a tensor's rows, where the converter reorders them to rotary pairs; 0 elsewhere."""
    if model.config.model_type not in ("llama", "mistral"):
        return 0
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    return next((count for part, count in heads.items() if part in key), 0)


def _to_gguf(model: PreTrainedModel, key: str, values: np.ndarray) -> np.ndarray:
    if heads := _rotary_heads(model, key):
        return values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
    if model.config.model_type == "gemma3_text" and "norm" in key:
        return values + np.float32(1)
    return values


def _from_gguf(model: PreTrainedModel, key: str, values: np.ndarray) -> np.ndarray:
    """Undo `_to_gguf` for a matrix."""
    if heads := _rotary_heads(model, key):
        return values.reshape(heads, values.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)
    return values


_K_SCALES = {"Q2_K": (80, 1.5), "Q3_K": (108, None), "Q4_K": (0, 7.5), "Q5_K": (0, 15.5), "Q6_K": (208, None)}
"""Where a block holds its f16 scale and, right after it, the scale of its minima, if it has one: then also which
multiple of the first makes the block's random values centre on zero."""


def _random_k_blocks(shape: tuple[int, ...], qtype: QType, generator: np.random.Generator) -> np.ndarray:
    """Valid blocks of random content, scaled as `make_model` scales a matrix."""
    offset, minimum = _K_SCALES[qtype.name]
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
    rows, features = shape
    blocks = generator.integers(0, 256, (rows, features // block_values, block_bytes), dtype=np.uint8)

    def set_scale(scale: float) -> None:
        scales = [scale] if minimum is None else [scale, scale * minimum]
        blocks[..., offset : offset + 2 * len(scales)] = np.array(scales, np.float16).view(np.uint8)

    set_scale(1.0)
    spread = gguf.quants.dequantize(blocks.reshape(rows, -1), qtype).std()
    set_scale(1.0 / (spread * features**0.5))
    return blocks.reshape(rows, -1)

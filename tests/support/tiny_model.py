"""A whole small llama in a GGUF file: two layers, random weights, a tokenizer of single characters, a chat template."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headrace.models import build_graph, load_spec, sources
from tests.support.checkpoints import write_tiny_gguf
from tests.support.raw_tensors import quantized

TOKENS = [*(chr(code) for code in range(33, 127)), "ab", "<|end|>"]
METADATA: dict[str, Any] = {
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10_000.0,
    "llama.vocab_size": len(TOKENS),
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [1] * (len(TOKENS) - 1) + [3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": len(TOKENS) - 1,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": "{{ messages[0].content }}",
}


def write_model(
    folder: Path,
    without: Sequence[str] = (),
    more: Sequence[str] = (),
    matrices: str = "f32",
    seed: int = 0,
    **metadata: Any,
) -> str:
    """Write it, lacking some of its tensors, holding more than it has a use for; returns the file's path.

    `matrices` is their number format, `seed` that of their values; keys of the metadata have ``__`` for a dot.
    """
    values = METADATA | {key.replace("__", "."): value for key, value in metadata.items()}
    spec = load_spec(values | {"general.architecture": "llama"}, "gguf", tensors={})
    params = build_graph(spec).params
    draw = np.random.default_rng(seed)
    shapes = {source.name: params[name].shape for name, source in sources(spec, "gguf").items()}
    tensors = {
        name: draw.normal(scale=0.3, size=shape).astype(np.float32)
        for name, shape in (shapes | dict.fromkeys(more, (4, 32))).items()
        if name not in without
    }
    stored = {name: quantized(v, matrices) if v.ndim == 2 else v for name, v in tensors.items()}
    folder.mkdir(exist_ok=True)
    return str(write_tiny_gguf(folder / "tiny.gguf", values, stored))

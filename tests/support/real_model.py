"""The embedded model's truth: transformers in f32 on the dequantized weights of the same GGUF file."""

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def load_transformers_llama(path: Path) -> LlamaForCausalLM:
    """A `LlamaForCausalLM` with the dequantized weights of a tied llama GGUF; every tensor is used, none is missing."""
    reader = gguf.GGUFReader(path)
    meta = {key.removeprefix("llama."): field.contents() for key, field in reader.fields.items()}
    config = LlamaConfig(
        vocab_size=meta["vocab_size"],
        hidden_size=meta["embedding_length"],
        intermediate_size=meta["feed_forward_length"],
        num_hidden_layers=meta["block_count"],
        num_attention_heads=meta["attention.head_count"],
        num_key_value_heads=meta["attention.head_count_kv"],
        max_position_embeddings=meta["context_length"],
        rms_norm_eps=meta["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": meta["rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    state = {}
    for key, _ in model.named_parameters():
        tensor = stored.pop(names.get_name(key, try_suffixes=(".weight",)))
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        for part, count in heads.items():
            if part in key:  # stored as rotary pairs; transformers wants halves
                values = values.reshape(count, len(values) // count // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)
        state[key] = torch.from_numpy(values.copy())
    assert not stored, f"unused: {sorted(stored)}"
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are in no checkpoint
    return model.eval()

"""Make models that have the shapes of real ones and random weights: what speed depends on, without a download.

    python benchmarks/shapes.py llama-3.2-1b q4_k out.gguf
    python benchmarks/shapes.py qwen3-0.6b bf16 out-folder

A GGUF holds matrices of random blocks in the format asked for and its embedding, which is also the language-model
head, in Q6_K, as such files do (Q8_0 if that was asked for); bf16 makes a Hugging Face folder. Both have the embedded
model's tokenizer, filled up to the vocabulary's size. Norms are ones; scales keep activations near unit size.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from headrace.formats.resolve import resolve_model

SEED = 0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """As in the models' published config.json."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    rope_theta: float

    def matrices(self) -> dict[str, tuple[str, int, int]]:
        """One layer's, by GGUF name: the Hugging Face name, rows, columns."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "attn_q": ("self_attn.q_proj", q, self.hidden),
            "attn_k": ("self_attn.k_proj", kv, self.hidden),
            "attn_v": ("self_attn.v_proj", kv, self.hidden),
            "attn_output": ("self_attn.o_proj", self.hidden, q),
            "ffn_gate": ("mlp.gate_proj", self.ffn, self.hidden),
            "ffn_up": ("mlp.up_proj", self.ffn, self.hidden),
            "ffn_down": ("mlp.down_proj", self.hidden, self.ffn),
        }

    def norms(self) -> dict[str, tuple[str, int]]:
        """One layer's, by GGUF name: the Hugging Face name, size."""
        found = {
            "attn_norm": ("input_layernorm", self.hidden),
            "ffn_norm": ("post_attention_layernorm", self.hidden),
        }
        if self.family == "qwen3":
            found |= {
                "attn_q_norm": ("self_attn.q_norm", self.head_dim),
                "attn_k_norm": ("self_attn.k_norm", self.head_dim),
            }
        return found


SHAPES = {
    "llama-3.2-1b": Shape(
        family="llama", hidden=2048, layers=16, heads=32, kv_heads=8, head_dim=64, ffn=8192, vocab=128256,
        rope_theta=500000.0,
    ),
    "qwen3-0.6b": Shape(
        family="qwen3", hidden=1024, layers=28, heads=16, kv_heads=8, head_dim=128, ffn=3072, vocab=151936,
        rope_theta=1000000.0,
    ),
    "qwen3-1.7b": Shape(
        family="qwen3", hidden=2048, layers=28, heads=16, kv_heads=8, head_dim=128, ffn=6144, vocab=151936,
        rope_theta=1000000.0,
    ),
}  # fmt: skip

# Where a block's f16 scales lie, and what a scale of one gives its values: their spread, for q4_k and q6_k with random
# six- and eight-bit multiples.
BLOCKS = {
    "q4_0": ([0], 4.6),
    "q8_0": ([0], 74.0),
    "q4_k": ([0], 170.0),
    "q6_k": ([208], 1370.0),
}
FILE_TYPES = {
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "q4_k": gguf.LlamaFileType.MOSTLY_Q4_K_M,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
"""What other engines ask for before they read anything."""


def random_matrix(name: str, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Stored rows [rows, bytes] of random codes whose values spread by about 1 / sqrt(columns)."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    raw = (
        np.frombuffer(rng.bytes(rows * columns // block * size), np.uint8).reshape(rows, columns // block, size).copy()
    )
    places, spread = BLOCKS[name]
    scale = np.full((rows, columns // block, 1), columns**-0.5 / spread, np.float16).view(np.uint8)
    for at in places:
        raw[:, :, at : at + 2] = scale
    if name == "q4_k":  # the mean of scale * code is taken off by dmin * min
        raw[:, :, 2:4] = (scale.view(np.float16) * np.float16(7.5)).view(np.uint8)
    return raw.reshape(rows, -1)


def vocabulary(size: int) -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types and merges: the embedded model's, and fillers."""
    fields = gguf.GGUFReader(resolve_model()).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    fillers = [f"<|filler_{i}|>" for i in range(size - len(tokens))]
    return (
        tokens + fillers,
        kinds + [int(gguf.TokenType.CONTROL)] * len(fillers),
        fields["tokenizer.ggml.merges"].contents(),
    )


def write_gguf(shape: Shape, name: str, path: Path) -> None:
    rng = np.random.default_rng(SEED)
    writer = gguf.GGUFWriter(path, shape.family)
    writer.add_name(path.stem)
    writer.add_file_type(FILE_TYPES[name])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_vocab_size(shape.vocab)
    tokens, kinds, merges = vocabulary(shape.vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(tensor: str, kind: str, rows: int, columns: int) -> None:
        raw = random_matrix(kind, rows, columns, rng)
        writer.add_tensor(tensor, raw, raw_dtype=gguf.GGMLQuantizationType[kind.upper()])

    add("token_embd.weight", "q8_0" if name == "q8_0" else "q6_k", shape.vocab, shape.hidden)
    writer.add_tensor("output_norm.weight", np.ones(shape.hidden, np.float32))
    for i in range(shape.layers):
        for tensor, (_, rows, columns) in shape.matrices().items():
            add(f"blk.{i}.{tensor}.weight", name, rows, columns)
        for tensor, (_, size) in shape.norms().items():
            writer.add_tensor(f"blk.{i}.{tensor}.weight", np.ones(size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_folder(shape: Shape, path: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns) * columns**-0.5).to(torch.bfloat16)

    tensors = {
        "model.embed_tokens.weight": matrix(shape.vocab, shape.hidden),
        "model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
    }
    for i in range(shape.layers):
        for tensor, rows, columns in shape.matrices().values():
            tensors[f"model.layers.{i}.{tensor}.weight"] = matrix(rows, columns)
        for tensor, size in shape.norms().values():
            tensors[f"model.layers.{i}.{tensor}.weight"] = torch.ones(size, dtype=torch.bfloat16)
    save_file(tensors, path / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM" if shape.family == "llama" else "Qwen3ForCausalLM"],
        "model_type": shape.family, "hidden_size": shape.hidden, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn, "vocab_size": shape.vocab, "rope_theta": shape.rope_theta,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu", "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, "attention_bias": False,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config, indent=1))
    tokens, _, merges = vocabulary(shape.vocab)
    bpe = models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(merge.split(" ")) for merge in merges])
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": tokens[2], "bos_token": tokens[1]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("format", choices=["q4_0", "q4_k", "q8_0", "bf16"])
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.format == "bf16":
        write_folder(SHAPES[args.shape], args.out)
    else:
        write_gguf(SHAPES[args.shape], args.format, args.out)


if __name__ == "__main__":
    main()

"""The numbers of published config.json files that decide how many parameters a model has, and what its authors say."""

_MLA = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_EXPERTS = {"num_experts_per_tok": 8, "n_shared_experts": 1, "moe_intermediate_size": 2048, "intermediate_size": 18432}

DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256, "first_k_dense_replace": 3,
    **_MLA, **_EXPERTS,
}  # fmt: skip
KIMI_K2 = {
    "model_type": "kimi_k2", "vocab_size": 163840, "hidden_size": 7168, "num_hidden_layers": 61,
    "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384, "first_k_dense_replace": 1,
    **_MLA, **_EXPERTS,
}  # fmt: skip
QWEN3_235B = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 4096, "num_hidden_layers": 94,
    "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536, "intermediate_size": 12288, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
QWEN3_30B = {
    **QWEN3_235B, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
    "moe_intermediate_size": 768, "intermediate_size": 6144,
}  # fmt: skip
LLAMA_70B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_1B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip

PUBLISHED = {
    "DeepSeek-V3": (DEEPSEEK_V3, 671e9, 37e9),
    "Kimi-K2-Instruct": (KIMI_K2, 1.03e12, 32e9),
    "Qwen3-235B-A22B": (QWEN3_235B, 235e9, 22e9),
    "Qwen3-30B-A3B": (QWEN3_30B, 30.5e9, 3.3e9),
    "Llama-3.1-70B": (LLAMA_70B, 70.6e9, 70.6e9),
    "Llama-3.2-1B": (LLAMA_1B, 1.24e9, 1.24e9),
}
"""Config, parameters, activated parameters, both as rounded as their authors state them."""

"""Parameters counted from a config against those of transformers' own models, made without memory."""

import pytest
import torch
import transformers

from headrace.plan.parameters import count_parameters
from tests.support.published_configs import PUBLISHED

SMALL = {
    "vocab_size": 500, "hidden_size": 96, "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 200,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24}
VARIANTS = {
    "llama biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True, "head_dim": 32},
    "mistral": {"model_type": "mistral", "sliding_window": 64},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3],
                  "head_dim": 16, **EXPERTS},
    "deepseek": {"model_type": "deepseek_v3", "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 2,
                 "q_lora_rank": 48, "n_group": 2, "topk_group": 1, **EXPERTS, **LATENT},
    "deepseek without a latent of queries": {"model_type": "deepseek_v3", "n_routed_experts": 8, "n_shared_experts": 1,
                 "first_k_dense_replace": 1, "q_lora_rank": None, "n_group": 2, "topk_group": 1, **EXPERTS, **LATENT},
}  # fmt: skip


def made(values):
    """Without memory. Kimi-K2 is DeepSeek-V3's architecture under another name."""
    kind = "deepseek_v3" if values["model_type"] == "kimi_k2" else values["model_type"]
    config = transformers.AutoConfig.for_model(**{**values, "model_type": kind})
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def numbers(model):
    return sum(p.numel() for p in model.parameters()) + sum(
        b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")
    )


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_small_variants_to_the_last_parameter(values):
    values = {**SMALL, **values}
    assert count_parameters(values).total == numbers(made(values))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_to_the_last_parameter(name):
    values, total, activated = PUBLISHED[name]
    shape = count_parameters(values)
    assert shape.total == numbers(made(values))
    assert shape.total == pytest.approx(total, rel=0.01)
    assert shape.activated == pytest.approx(activated, rel=0.03)

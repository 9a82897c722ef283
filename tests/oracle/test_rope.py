"""Rotary tables against transformers' own, for every scaling."""

import numpy as np
import pytest

from headrace import models

transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

POSITIONS = 4096
DIM = 64

SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.7},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn-every-option": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "attention_factor": 1.25,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "short_factor": [1.0 + i / 50 for i in range(DIM // 2)],
        "long_factor": [1.0 + i / 5 for i in range(DIM // 2)],
    },
}


def config_of(scaling: dict, theta: float):
    return transformers.LlamaConfig(
        hidden_size=4 * DIM,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        intermediate_size=32,
        vocab_size=64,
        max_position_embeddings=POSITIONS,
        rope_parameters={**scaling, "rope_theta": theta},
    )


def expected_of(config, length: int) -> tuple[np.ndarray, float]:
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        inv_freq, scale = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config, device=None, seq_len=length)
    return inv_freq.numpy(), scale


@pytest.mark.parametrize("length", [512, POSITIONS, 4 * POSITIONS])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_table_equals_transformers(name, theta, length):
    config = config_of(SCALINGS[name], theta)
    spec = models.load_spec(config.to_dict(), "hf", context_length=length)
    inv_freq, scale = expected_of(config, length)
    rope = spec.layers[0].rope
    assert rope.rotary_dim == DIM
    np.testing.assert_array_max_ulp(np.asarray(rope.inv_freq, np.float32), inv_freq, maxulp=2)
    assert rope.scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_context_length_chooses(name):
    tables = {
        length: models.load_spec(config_of(SCALINGS[name], 1e4).to_dict(), "hf", context_length=length).layers[0].rope
        for length in (1024, 16 * POSITIONS)
    }
    assert tables[1024] != tables[16 * POSITIONS]


def test_legacy_keys_mean_the_same():
    config = config_of(SCALINGS["llama3"], 500_000.0).to_dict()
    section = config.pop("rope_parameters")
    theta = section.pop("rope_theta")
    legacy = config | {"rope_theta": theta, "rope_scaling": section}
    assert models.load_spec(legacy, "hf") == models.load_spec(
        config | {"rope_parameters": {**section, "rope_theta": theta}}, "hf"
    )

"""A side that transformers runs: as near as f32 lets it be, node by node, in every family; and as far as planted."""

from math import isnan

import numpy as np
import pytest
import torch

from headrace.align.alignment import align
from headrace.align.huggingface import TransformersSide
from headrace.align.subjects import Subject
from headrace.base.errors import CheckpointError
from headrace.cli.main import main
from headrace.text.tokenizer import Tokenizer
from tests.support.hf_models import make_model, write_hf
from tests.support.tiny_model import TOKENS as VOCABULARY
from tests.support.tiny_model import write_model

TEXTS = [np.random.default_rng(i).integers(0, 90, 24).tolist() for i in range(2)]


def folder_of(name, tmp_path):
    folder = write_hf(make_model(name), tmp_path / name)
    Tokenizer.from_gguf_metadata(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": VOCABULARY,
            "tokenizer.ggml.token_type": [1] * len(VOCABULARY),
            "tokenizer.ggml.merges": ["a b"],
        }
    ).save(folder)
    return str(folder)


def compared(a, b):
    return align(a, b, TEXTS, threshold=1e-4, by_cause=False)


@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "gemma3", "mistral"])
def test_every_family_departs_nowhere(name, tmp_path):
    folder = folder_of(name, tmp_path)
    ours = Subject(model=folder, executor="torch", kv="f32")
    for a, b in ((TransformersSide(model=folder), ours), (ours, TransformersSide(model=folder, attn="sdpa"))):
        found = compared(a, b)
        assert found.divergence.kl_max < 1e-8
        assert found.divergence.logprob_delta_max < 1e-4
        totals = {node.name: node.total for node in found.nodes if not isnan(node.total)}
        assert max(totals.values()) < 1e-4
        assert {"embed", "layers.0.attn.q", "layers.1.attn.core", "layers.1.mlp.glu", "final_norm", "logits"} <= set(
            totals
        )
        assert found.first is None
        own = {node.name for node in found.nodes if not isnan(node.own)}
        assert "layers.1.mlp.down" in own


def test_a_gguf_file_and_what_bf16_costs(tmp_path, capsys):
    model = write_model(tmp_path, matrices="q8_0")
    ours = Subject(model=model, executor="torch", kv="f32")
    assert compared(TransformersSide(model=model), ours).divergence.kl_max < 1e-8
    coarse = compared(ours, TransformersSide(model=model, dtype="bfloat16"))
    assert coarse.divergence.kl_mean > 1e-6
    assert coarse.first == "embed"
    few = ["--texts", "2", "--length", "32"]
    assert main(["align", f"hf:{model}", f"{model}?kv=f32&activation=f32", *few, "--budget", "kl<1e-6"]) == 0
    assert "hf:" in capsys.readouterr().out
    assert main(["align", f"hf:{model}?dtype=bfloat16", model, *few, "--budget", "kl<1e-9"]) == 1
    assert main(["align", f"hf:{model}", "--ladder", *few]) == 1
    assert main(["align", "hf:/nonexistent", model, *few]) == 1


def test_a_planted_difference_is_seen_from_its_layer_on(tmp_path):
    module = make_model("llama-tied")
    plain = folder_of("llama-tied", tmp_path)
    with torch.no_grad():
        module.model.layers[1].self_attn.q_proj.weight.mul_(1.01)
    changed = write_hf(module, tmp_path / "changed")
    found = compared(Subject(model=plain, executor="torch", kv="f32"), TransformersSide(model=str(changed)))
    departed = [node.name for node in found.nodes if node.total > 1e-4]
    assert departed[0] == "layers.1.attn.q"


def test_what_transformers_cannot_load_is_said(tmp_path, monkeypatch):
    model = write_model(tmp_path)

    def refuse(*_, **__):
        raise ValueError("no such thing")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", refuse)
    with pytest.raises(CheckpointError, match="no such thing"):
        compared(TransformersSide(model=model), Subject(model=model))

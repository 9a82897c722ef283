"""The rounding rule on transformers' models: what they compute is what is packed and served."""

from contextlib import closing

import numpy as np
import pytest
import torch

from headrace.align.forced import forced_logits
from headrace.base.errors import InvalidRequestError
from headrace.compress.recipe import Recipe
from headrace.executors.torch_executor import TorchExecutor
from headrace.formats.checkpoint import open_checkpoint
from headrace.formats.weights import load_weights
from headrace.models import build_graph, ignorable, load_spec, sources
from headrace.numerics.schemes import IntegerScheme
from headrace.train import fake_quantize, masters
from headrace.train.qat import packed
from tests.support.hf_models import make_model

IDS = list(range(5, 25))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3"])
def test_what_is_trained_is_packed_and_served(name, tmp_path):
    model = make_model(name)
    found = fake_quantize(model, IntegerScheme())
    assert len(found) == 21, "seven of each of three layers"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = model.get_submodule(found[0]).parametrizations.weight.original.detach().clone()
    for _ in range(3):
        loss = model(torch.tensor([IDS]), labels=torch.tensor([IDS])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not torch.equal(model.get_submodule(found[0]).parametrizations.weight.original, before)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    model.save_pretrained(tmp_path, state_dict=masters(model))
    graph, weights = opened(tmp_path)
    weights = packed(weights, Recipe().schemes(graph))
    with closing(TorchExecutor(graph, weights, num_blocks=4)) as executor:
        logits = forced_logits(executor, graph.output, IDS)
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


def opened(folder):
    checkpoint = open_checkpoint(folder)
    spec = load_spec(checkpoint.config, "hf", tensors=checkpoint.tensors)
    graph = build_graph(spec)
    return graph, load_weights(checkpoint, graph.params, sources(spec, "hf"), ignorable("hf"))


def test_what_cannot_be_rounded_is_named():
    model = make_model("llama")
    with pytest.raises(InvalidRequestError, match=r"q_proj: Groups of 48"):
        fake_quantize(model, IntegerScheme(group_size=48))
    with pytest.raises(InvalidRequestError, match="No linear layer"):
        fake_quantize(model, IntegerScheme(), ignore=("*",))
    fake_quantize(model, IntegerScheme())
    with pytest.raises(InvalidRequestError, match="already"):
        fake_quantize(model, IntegerScheme())

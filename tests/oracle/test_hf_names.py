"""A model's parameters under their Hugging Face names are the checkpoint that it was read from."""

import numpy as np
import pytest

from headrace.compress.export import hf_named
from headrace.formats.checkpoint import open_checkpoint
from headrace.formats.weights import load_weights
from headrace.models import build_graph, ignorable, load_spec, sources
from tests.support.hf_models import make_model, write_hf


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])  # gemma's norms are stored less one
def test_names_and_values_come_back(name, tmp_path):
    checkpoint = open_checkpoint(write_hf(make_model(name), tmp_path))
    spec = load_spec(checkpoint.config, "hf", tensors=checkpoint.tensors)
    graph = build_graph(spec)
    found = hf_named(spec, load_weights(checkpoint, graph.params, sources(spec, "hf"), ignorable("hf")))
    assert found.keys() == checkpoint.tensors.keys()
    for key, tensor in found.items():
        np.testing.assert_allclose(tensor.to_f32(), checkpoint.tensors[key].to_f32(), atol=1e-7)

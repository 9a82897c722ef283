"""Hugging Face folders as GGUF files: as llama.cpp's converter would name, order and describe them."""

import json

import gguf
import numpy as np
import pytest
import torch

from headrace.base.errors import UnsupportedModelError
from headrace.compress.gguf_export import gguf_metadata, gguf_tensors
from headrace.compress.pipeline import open_source
from headrace.formats.gguf_writer import write_gguf
from headrace.text.tokenizer import Tokenizer
from tests.support import hf_models
from tests.support.executors import executor_of
from tests.support.stepping import Stepper
from tests.support.tiny_model import METADATA as TINY

TOLERANCE = 1e-4
LLAMAS = ("llama", "llama-tied", "llama-biases", "llama-linear", "llama-dynamic", "llama-yarn", "llama-llama3")
WRITABLE = (*LLAMAS, "qwen2", "qwen3")


def folder_of(model, folder):
    """The model with some tokenizer."""
    hf_models.write_hf(model, folder)
    Tokenizer.from_gguf_metadata(TINY).save(folder)
    return folder


def exported(folder, target):
    source = open_source(str(folder))
    metadata = gguf_metadata(source.checkpoint, source.spec, source.weights, "f32")
    write_gguf(target, metadata, gguf_tensors(source.checkpoint, source.spec, source.weights))
    return gguf.GGUFReader(target)


@pytest.mark.parametrize("name", WRITABLE)
def test_tensors_and_metadata_of_the_converter(tmp_path, name):
    """Those of the converter's rules, written with the gguf package (`hf_models.write_gguf`)."""
    model = hf_models.make_model(name)
    found = exported(folder_of(model, tmp_path / "hf"), tmp_path / "ours.gguf")
    if name == "llama-dynamic":  # which GGUF has no key for: it changes nothing within the model's own context
        model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "default"}
    hf_models.write_gguf(model, tmp_path / "theirs.gguf")
    expected = gguf.GGUFReader(tmp_path / "theirs.gguf")
    ours, theirs = ({tensor.name: tensor for tensor in reader.tensors} for reader in (found, expected))
    assert ours.keys() == theirs.keys()
    for tensor_name, tensor in theirs.items():
        assert ours[tensor_name].shape.tolist() == tensor.shape.tolist()
        if tensor_name == "rope_freqs.weight":
            np.testing.assert_allclose(ours[tensor_name].data, tensor.data, rtol=1e-5)
        else:
            np.testing.assert_array_equal(ours[tensor_name].data, tensor.data)
    for key, field in expected.fields.items():
        if not key.startswith("GGUF."):
            assert found.fields[key].contents() == field.contents(), key
            assert found.fields[key].types == field.types, key


@pytest.mark.parametrize("name", WRITABLE)
def test_logits_of_transformers(tmp_path, name):
    model = hf_models.make_model(name)
    exported(folder_of(model, tmp_path / "hf"), tmp_path / "m.gguf")
    tokens = np.random.default_rng(0).integers(0, 320, 20).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    with executor_of("torch", tmp_path / "m.gguf") as executor:
        found = Stepper(executor).logits({"a": tokens})["a"]
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mistral", "would not say, such as sliding windows"),
        ("qwen2-window", "would not say, such as sliding windows"),
        ("llama-longrope", "would not say"),
        ("gemma3", r"\(gemma3\) are not written as GGUF"),
    ],
)
def test_what_the_metadata_would_not_say(tmp_path, name, why):
    folder = folder_of(hf_models.make_model(name), tmp_path / "hf")
    with pytest.raises(UnsupportedModelError, match=why) as caught:
        exported(folder, tmp_path / "m.gguf")
    assert "folder" in caught.value.remedy
    assert not (tmp_path / "m.gguf").exists()


def test_a_mistral_without_windows(tmp_path):
    model = hf_models.make_model("mistral")
    folder = folder_of(model, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    found = exported(folder, tmp_path / "m.gguf")
    assert found.fields["general.architecture"].contents() == "llama"
    tokens = np.random.default_rng(0).integers(0, 320, 20).tolist()
    logits = []
    for path in (folder, tmp_path / "m.gguf"):
        with executor_of("torch", path) as executor:
            logits.append(Stepper(executor).logits({"a": tokens})["a"])
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-4, atol=1e-4)

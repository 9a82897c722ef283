"""Opening a model on disk, whatever its files."""

import numpy as np
import pytest

from headrace.base.errors import CheckpointError, ModelNotFoundError
from headrace.formats.checkpoint import open_checkpoint
from tests.support.checkpoints import write_hf_folder, write_tiny_gguf

TENSORS = {"a": np.ones((2, 4), np.float32), "b": np.zeros(3, np.float32)}


def test_a_gguf_file(tmp_path):
    path = write_tiny_gguf(tmp_path / "m.gguf", {"llama.block_count": 2}, TENSORS)
    checkpoint = open_checkpoint(str(path))
    assert (checkpoint.kind, checkpoint.path, checkpoint.folder) == ("gguf", path, tmp_path)
    assert checkpoint.config["llama.block_count"] == 2
    assert tuple(checkpoint.tensors) == ("a", "b")


def test_a_hugging_face_folder(tmp_path):
    folder = write_hf_folder(tmp_path, {"model_type": "llama"}, TENSORS)
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.kind, checkpoint.path, checkpoint.folder) == ("hf", folder, folder)
    assert checkpoint.config == {"model_type": "llama"}
    assert tuple(checkpoint.tensors) == ("a", "b")


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        open_checkpoint(tmp_path)


def test_a_config_that_is_no_object(tmp_path):
    write_hf_folder(tmp_path, {}, TENSORS)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json is not a JSON object"):
        open_checkpoint(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        open_checkpoint(tmp_path / "none")

"""A model on disk, whatever its files: a config, and tensors by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from headrace.base.errors import CheckpointError, ModelNotFoundError
from headrace.formats.gguf import read_gguf
from headrace.formats.quantized import unpack
from headrace.formats.safetensors import read_json_object, read_safetensors_folder
from headrace.numerics.tensor import RawTensor

CONFIG_FILE = "config.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk, opened: its tensors are mapped into memory, and none has been read.

    A quantized Hugging Face folder looks like a plain one whose weights are in row blocks (`numerics.row_blocks`).

    Attributes:
        kind: "gguf" for one GGUF file, "hf" for a Hugging Face folder.
        path: the file or the folder.
        config: GGUF metadata by key (a vocabulary is a lazily decoded `StringArray`), or ``config.json`` without its
            ``quantization_config``, which the tensors already follow.
        tensors: by the names they have in the files; a quantized weight by that of the weight.
    """

    kind: Literal["gguf", "hf"]
    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, RawTensor]

    @property
    def folder(self) -> Path:
        """Where the files beside the weights are: tokenizer, chat template, generation config."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def weight_files(self) -> list[Path]:
        """The files that tensors are read from."""
        return sorted(self.path.glob("*.safetensors")) if self.path.is_dir() else [self.path]


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a GGUF file, or a Hugging Face folder of ``config.json`` and safetensors.

    Raises:
        ModelNotFoundError: nothing is at `path`.
        CheckpointError: the files are damaged, incomplete or contradict each other; names the item at fault.
        UnsupportedModelError: the files are well-formed, but hold something that is not read; names it.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise ModelNotFoundError(f"{path} does not exist.", "Give a .gguf file or a folder with config.json.")
    gguf = read_gguf(path)
    return Checkpoint("gguf", path, gguf.metadata, gguf.tensors)


def _open_folder(folder: Path) -> Checkpoint:
    config_path = folder / CONFIG_FILE
    if not config_path.is_file():
        raise CheckpointError(f"{folder} holds no {CONFIG_FILE}.", "Give a .gguf file or a complete model folder.")
    config = read_json_object(config_path.read_bytes(), str(config_path))
    return Checkpoint("hf", folder, *unpack(folder, config, read_safetensors_folder(folder)))

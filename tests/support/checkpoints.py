"""Small checkpoints for tests, GGUF files by the gguf package, safetensors by hand (so that they can lie)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from headrace.numerics.tensor import RawTensor

Stored = np.ndarray[Any, Any] | RawTensor


def write_tiny_gguf(
    path: Path, metadata: Mapping[str, Any] | None = None, tensors: Mapping[str, Stored] | None = None
) -> Path:
    """Write a GGUF file.

    Args:
        path: where to.
        metadata: values whose GGUF type follows from their Python type: bool, int (u32; i32 if negative), float (f32),
            str, or a list of one of these. ``general.architecture`` defaults to "llama".
        tensors: float32 arrays, or tensors in any format.
    """
    values = dict(metadata or {})
    writer = gguf.GGUFWriter(path, str(values.pop("general.architecture", "llama")))
    if "general.alignment" in values:
        writer.add_custom_alignment(values.pop("general.alignment"))
    for key, value in values.items():
        _add_value(writer, key, value)
    for name, stored in (tensors or {}).items():
        tensor = _raw(stored)
        kind = gguf.GGMLQuantizationType[tensor.format.name.upper()]
        row_bytes = tensor.data.shape[1]
        writer.add_tensor(name, tensor.data.reshape(*tensor.shape[:-1], row_bytes), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_hf_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Stored],
    num_shards: int = 1,
    companions: Mapping[str, Any] | None = None,
) -> Path:
    """Write a Hugging Face folder: config.json, safetensors in one file or in shards, other JSON files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, content in {"config.json": config, **(companions or {})}.items():
        (folder / file_name).write_text(json.dumps(content))
    if num_shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    weight_map = {}
    for number in range(num_shards):
        file_name = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        names = list(tensors)[number::num_shards]
        write_safetensors(folder / file_name, {name: tensors[name] for name in names})
        weight_map.update(dict.fromkeys(names, file_name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_safetensors(path: Path, tensors: Mapping[str, Stored]) -> Path:
    """Write one safetensors file of float32 arrays, or of tensors in plain and parts' formats."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts, end = [], 0
    for name, stored in tensors.items():
        tensor = _raw(stored)
        begin, end = end, end + tensor.num_bytes
        header[name] = {
            "dtype": tensor.format.name.upper(),
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        parts.append(tensor.data.tobytes())
    path.write_bytes(safetensors_bytes(header, b"".join(parts)))
    return path


def safetensors_bytes(header: Mapping[str, Any] | bytes, data: bytes = b"") -> bytes:
    """A safetensors file of this header, which may lie, and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _raw(stored: Stored) -> RawTensor:
    return stored if isinstance(stored, RawTensor) else RawTensor.from_f32(stored)


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_int32 if value < 0 else writer.add_uint32)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, Sequence):
        writer.add_array(key, list(value))
    else:
        raise TypeError(f"{key} is {value!r}, which has no GGUF type")

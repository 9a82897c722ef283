"""Small checkpoints for tests, GGUF files by the gguf package, safetensors by hand (so that they can lie)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from headrace.numerics.formats import FORMATS, format_named
from headrace.numerics.quantize import quantize
from headrace.numerics.rounding import f32_to_bf16, f32_to_f16
from headrace.numerics.row_blocks import row_blocks
from headrace.numerics.schemes import IntegerScheme
from headrace.numerics.tensor import RawTensor

HALF_OFFSETS = {
    "q4_0": [0],
    "q4_1": [0, 2],
    "q5_0": [0],
    "q5_1": [0, 2],
    "q8_0": [0],
    "q2_k": [80, 82],
    "q3_k": [108],
    "q4_k": [0, 2],
    "q5_k": [0, 2],
    "q6_k": [208],
}
"""Where each block format keeps its f16 scales and minimums."""

Stored = np.ndarray[Any, Any] | RawTensor


def quantized(values: np.ndarray[Any, Any], format_name: str) -> RawTensor:
    """Values rounded to a plain format, to integer row blocks, or to one that the gguf package can quantize to (not the
    k-quants)."""
    values = np.ascontiguousarray(values, np.float32)
    if (layout := row_blocks(format_name)) is not None:
        scheme = IntegerScheme(
            bits=layout.bits, group_size=layout.group_size, symmetric=not layout.has_zero_point, scale=layout.scale
        )
        return RawTensor.from_groups(quantize(values, scheme))
    number_format = FORMATS[format_name]
    if format_name == "f32":
        return RawTensor.from_f32(values)
    if format_name in ("f16", "bf16"):
        data = (f32_to_f16 if format_name == "f16" else f32_to_bf16)(values).view(np.uint8)
    else:
        data = gguf.quantize(values, gguf.GGMLQuantizationType[format_name.upper()])
    return RawTensor(number_format, values.shape, data.reshape(-1, number_format.row_bytes(values.shape[-1])))


def random_tensor(format_name: str, shape: tuple[int, ...], seed: int = 0) -> RawTensor:
    """A tensor of random bytes in any format, with finite scales (of about 1e-2) so that its values are finite."""
    rng = np.random.default_rng(seed)
    number_format = FORMATS[format_name]
    if number_format.block_size == 1:
        return quantized(rng.normal(size=shape).astype(np.float32), format_name)
    rows, row_bytes = int(np.prod(shape[:-1])), number_format.row_bytes(shape[-1])
    data = rng.integers(0, 256, (rows, row_bytes), np.uint8)
    blocks = data.reshape(-1, number_format.block_bytes)
    for offset in HALF_OFFSETS[format_name]:
        scales = rng.normal(scale=1e-2, size=len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales[:, None].view(np.uint8)
    return RawTensor(number_format, shape, data)


def part(format_name: str, array: np.ndarray[Any, Any]) -> RawTensor:
    """An array of a plain or a part's format (codes as their bytes), as it is stored."""
    stored = format_named(format_name)
    row_bytes = stored.row_bytes(array.shape[-1] if array.ndim else 1)
    return RawTensor(stored, array.shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, row_bytes))


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

"""Reading safetensors files, one or sharded, as views of the mapped files.

Source: https://github.com/huggingface/safetensors#format. A header is believed in nothing: every extent, type and
offset is checked against the file before a tensor is made.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.base.errors import CheckpointError, UnsupportedModelError
from headrace.formats.mapped_file import DOWNLOAD_AGAIN, map_file, rows_view
from headrace.numerics.formats import FORMATS, PARTS, NumberFormat
from headrace.numerics.tensor import RawTensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own implementation
_MAX_DIMENSIONS = 8
_FORMAT_OF_DTYPE: Mapping[str, NumberFormat] = {
    found.name.upper(): found for found in (FORMATS["f32"], FORMATS["f16"], FORMATS["bf16"], *PARTS.values())
}
_UNREAD_DTYPES = {
    "BOOL", "F4", "F6_E2M3", "F6_E3M2", "F8_E5M2", "I16", "U16", "U32", "U64", "F64", "C64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    name: str
    format: NumberFormat
    shape: tuple[int, ...]
    begin: int
    end: int


def read_safetensors(path: Path) -> dict[str, RawTensor]:
    """The tensors of one file, by name, as views of the mapped file.

    Raises:
        CheckpointError: the file is damaged, truncated, or its header contradicts it; names the tensor at fault.
        UnsupportedModelError: a tensor has an element type that is not read; names it.
    """
    data = map_file(path)
    if len(data) < 8:
        raise _damaged(path, "the file ends before the length of its header")
    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > min(_MAX_HEADER_BYTES, len(data) - 8):
        raise _damaged(path, f"the header's length is given as {header_bytes}, but the file has {len(data)} bytes")
    header = read_json_object(data[8 : 8 + header_bytes], f"{path}: the header")
    header.pop("__metadata__", None)
    infos = [_tensor_info(path, name, entry) for name, entry in header.items()]
    start = 8 + header_bytes
    _check_layout(path, infos, len(data) - start)
    tensors = {}
    for info in infos:
        rows = math.prod(info.shape[:-1])
        row_bytes = info.format.row_bytes(info.shape[-1] if info.shape else 1)
        tensors[info.name] = RawTensor(info.format, info.shape, rows_view(data, start + info.begin, rows, row_bytes))
    return tensors


def read_safetensors_folder(folder: Path) -> dict[str, RawTensor]:
    """The tensors of a Hugging Face folder: ``model.safetensors``, or the shards that its index names.

    Raises:
        CheckpointError: as `read_safetensors`, and where files are missing or contradict the index; names them.
    """
    if (folder / SINGLE_FILE).is_file():
        return read_safetensors(folder / SINGLE_FILE)
    if (folder / INDEX_FILE).is_file():
        return _read_shards(folder)
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1:
        return read_safetensors(folder / found[0])
    if found:
        raise CheckpointError(
            f"{folder} holds {len(found)} safetensors files, but no {INDEX_FILE} that says what is where.",
            f"Download {INDEX_FILE} too.",
        )
    if pickles := sorted(path.name for path in folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder} holds its weights as pickle files ({pickles[0]}), which can run code and are not read.",
            "Use the model's safetensors version, or save it again with transformers' save_pretrained().",
        )
    raise CheckpointError(
        f"{folder} holds no safetensors file.", f"Download {SINGLE_FILE}, or {INDEX_FILE} and shards."
    )


def read_json_object(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for anything else, and for a key that stands in an object twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise CheckpointError(f"{what} has the key {twice!r} twice.", DOWNLOAD_AGAIN)
        return entries

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}.", DOWNLOAD_AGAIN) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object.", DOWNLOAD_AGAIN)
    return value


def _read_shards(folder: Path) -> dict[str, RawTensor]:
    index_path = folder / INDEX_FILE
    weight_map = read_json_object(index_path.read_bytes(), str(index_path)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has no weight_map.", DOWNLOAD_AGAIN)
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(f"{index_path} maps tensor {name!r} to {file_name!r}, no file name.", DOWNLOAD_AGAIN)
    shard_names = sorted(set(weight_map.values()))
    if missing := [name for name in shard_names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(shard_names)} shards: {', '.join(missing)}.", "Download them too."
        )
    shards = {name: read_safetensors(folder / name) for name in shard_names}
    tensors: dict[str, RawTensor] = {}
    for name, shard_name in weight_map.items():
        if name not in shards[shard_name]:
            raise CheckpointError(
                f"{shard_name} lacks tensor {name!r}, which {INDEX_FILE} says it holds.", DOWNLOAD_AGAIN
            )
        tensors[name] = shards[shard_name][name]
    for shard in shards.values():  # what the index does not list is still there, to be used or named as unused
        for name, tensor in shard.items():
            tensors.setdefault(name, tensor)
    return tensors


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}.", DOWNLOAD_AGAIN)


def _tensor_info(path: Path, name: str, entry: object) -> _TensorInfo:
    tensor = f"tensor {name!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the header's entry for {tensor} is not a dtype, a shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise _damaged(path, f"{tensor} has no valid shape: {shape!r:.100}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"{tensor} has no valid data_offsets: {offsets!r:.100}")
    if not isinstance(dtype, str) or dtype not in _FORMAT_OF_DTYPE.keys() | _UNREAD_DTYPES:
        raise _damaged(path, f"{tensor} has dtype {dtype!r:.100}, which safetensors does not define")
    if dtype in _UNREAD_DTYPES:
        raise UnsupportedModelError(
            f"{path}: {tensor} is stored as {dtype}, which is not read.", f"Use one of {', '.join(_FORMAT_OF_DTYPE)}."
        )
    number_format = _FORMAT_OF_DTYPE[dtype]
    begin, end = offsets
    expected = math.prod(shape) * number_format.block_bytes
    if end - begin != expected:
        raise _damaged(path, f"{tensor} ({dtype} {shape}) takes {expected} bytes, but its offsets span {end - begin}")
    return _TensorInfo(name, number_format, tuple(shape), begin, end)


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_layout(path: Path, infos: list[_TensorInfo], data_bytes: int) -> None:
    """Tensors follow each other without gap or overlap, and fill the file to its end, as the format demands."""
    end = 0
    for info in sorted(infos, key=lambda info: (info.begin, info.end)):
        if info.begin != end:
            kind = "overlaps the tensor before it" if info.begin < end else "leaves a gap before it"
            raise _damaged(path, f"tensor {info.name!r} {kind}: it begins at {info.begin}, not at {end}")
        if info.end > data_bytes:
            raise _damaged(
                path, f"the file is truncated: tensor {info.name!r} ends at {info.end} of {data_bytes} bytes"
            )
        end = info.end
    if end != data_bytes:
        raise _damaged(path, f"{data_bytes - end} bytes at its end belong to no tensor")

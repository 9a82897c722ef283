"""Reading GGUF files, versions 2 and 3, little-endian: metadata, and tensors as views of the mapped file.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from headrace.base.errors import CheckpointError, UnsupportedModelError
from headrace.formats.gguf_metadata import HeaderReader, Value
from headrace.formats.mapped_file import map_file, rows_view
from headrace.numerics.formats import FORMATS, NumberFormat
from headrace.numerics.tensor import RawTensor

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
_MAX_DIMENSIONS = 4
_LEAST_METADATA_BYTES = 8 + 4 + 1  # key length, value type, one byte of value
_LEAST_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # name length, dimensions, one extent, type, offset

TYPE_NAMES: Mapping[int, str] = {
    0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 10: "q2_k", 11: "q3_k", 12: "q4_k",
    13: "q5_k", 14: "q6_k", 30: "bf16",
}  # fmt: skip
"""The number format behind each of ggml's types that is read and written."""

_FORMAT_OF_TYPE = {code: FORMATS[name] for code, name in TYPE_NAMES.items()}
_UNREAD_TYPES: Mapping[int, str] = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What a GGUF file holds: metadata by key, tensors by name as views of the mapped file."""

    metadata: Mapping[str, Value]
    tensors: Mapping[str, RawTensor]


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    name: str
    format: NumberFormat
    shape: tuple[int, ...]
    offset: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def num_bytes(self) -> int:
        return self.rows * self.format.row_bytes(self.shape[-1])


def read_gguf(path: Path) -> GgufFile:
    """Open a GGUF file: its header is parsed, its tensors are mapped, none is read.

    Raises:
        CheckpointError: the file is not GGUF, is damaged or truncated; names the item at fault.
        UnsupportedModelError: the file is well-formed, but of a kind that is not read; names it.
    """
    data = map_file(path)
    reader = HeaderReader(data, str(path))
    _check_preamble(reader)
    num_tensors = reader.count("the number of tensors", _LEAST_TENSOR_BYTES)
    num_metadata = reader.count("the number of metadata entries", _LEAST_METADATA_BYTES)
    metadata = _read_metadata(reader, num_metadata)
    if (num_splits := metadata.get("split.count", 1)) not in (0, 1):
        raise UnsupportedModelError(
            f"{path} is one of {num_splits} parts of a split GGUF.", "Join them first: llama-gguf-split --merge."
        )
    infos = _read_tensor_infos(reader, num_tensors)
    alignment = _alignment(reader, metadata)
    start = -(-reader.position // alignment) * alignment
    _check_layout(reader, infos, start, alignment)
    tensors = {
        info.name: RawTensor(
            info.format,
            info.shape,
            rows_view(data, start + info.offset, info.rows, info.format.row_bytes(info.shape[-1])),
        )
        for info in infos
    }
    return GgufFile(metadata, tensors)


def stored_metadata(path: Path) -> dict[str, bytes]:
    """A file's metadata by key, each value with its type as the file holds it: to be copied into another file.

    Raises as `read_gguf` does.
    """
    data = map_file(path)
    reader = HeaderReader(data, str(path))
    _check_preamble(reader)
    reader.count("the number of tensors", _LEAST_TENSOR_BYTES)
    found: dict[str, bytes] = {}
    for index in range(reader.count("the number of metadata entries", _LEAST_METADATA_BYTES)):
        key = reader.string(f"the key of metadata entry {index}")
        start = reader.position
        reader.value(key)
        found[key] = data[start : reader.position]
    return found


def _check_preamble(reader: HeaderReader) -> None:
    magic = reader.data[:4]
    if magic != MAGIC:
        raise CheckpointError(
            f"{reader.path} is not a GGUF file: it starts with {magic!r}, not {MAGIC!r}.",
            "Give the path of a .gguf file, or of a folder with config.json and safetensors.",
        )
    reader.position = 4
    version = reader.u32("the version")
    if version in _VERSIONS:
        return
    (swapped,) = struct.unpack(">I", struct.pack("<I", version))
    if swapped in _VERSIONS:
        raise UnsupportedModelError(f"{reader.path} is a big-endian GGUF file.", "Use the little-endian one.")
    raise CheckpointError(
        f"{reader.path} is GGUF version {version}; versions {_VERSIONS[0]} and {_VERSIONS[1]} are read.",
        "Convert the model again with a current llama.cpp.",
    )


def _read_metadata(reader: HeaderReader, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for index in range(count):
        key = reader.string(f"the key of metadata entry {index}")
        if key in metadata:
            raise reader.error(f"metadata key {key!r} appears twice")
        metadata[key] = reader.value(key)
    return metadata


def _read_tensor_infos(reader: HeaderReader, count: int) -> list[_TensorInfo]:
    infos: dict[str, _TensorInfo] = {}
    for index in range(count):
        info = _read_tensor_info(reader, index)
        if info.name in infos:
            raise reader.error(f"tensor {info.name!r} appears twice")
        infos[info.name] = info
    return list(infos.values())


def _read_tensor_info(reader: HeaderReader, index: int) -> _TensorInfo:
    name = reader.string(f"the name of tensor {index}")
    tensor = f"tensor {name!r}"
    num_dimensions = reader.u32(f"the number of dimensions of {tensor}")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise reader.error(f"{tensor} has {num_dimensions} dimensions")
    shape = tuple(reader.u64(f"the shape of {tensor}") for _ in range(num_dimensions))[::-1]
    if 0 in shape:
        raise reader.error(f"{tensor} is empty: its shape is {list(shape)}")
    code = reader.u32(f"the type of {tensor}")
    offset = reader.u64(f"the offset of {tensor}")
    number_format = _FORMAT_OF_TYPE.get(code)
    if number_format is None and code in _UNREAD_TYPES:
        raise UnsupportedModelError(
            f"{reader.path}: {tensor} is stored as {_UNREAD_TYPES[code]}, which is not read.",
            f"Use a file quantized to one of {', '.join(FORMATS)}.",
        )
    if number_format is None:
        raise reader.error(f"{tensor} has type {code}, which GGUF does not define")
    if shape[-1] % number_format.block_size:
        raise reader.error(
            f"{tensor} has rows of {shape[-1]} values, no multiple of {number_format.name}'s {number_format.block_size}"
        )
    return _TensorInfo(name, number_format, shape, offset)


def _alignment(reader: HeaderReader, metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    is_power = isinstance(value, int) and 8 <= value <= _MAX_ALIGNMENT and value & (value - 1) == 0
    if not is_power:
        raise reader.error(f"general.alignment is {value!r}, not a power of two from 8 to {_MAX_ALIGNMENT}")
    assert isinstance(value, int)
    return value


def _check_layout(reader: HeaderReader, infos: list[_TensorInfo], start: int, alignment: int) -> None:
    """Every tensor lies aligned within the file, after the header, and shares no byte with another."""
    size = len(reader.data)
    end, previous = 0, ""
    for info in sorted(infos, key=lambda info: info.offset):
        if info.offset % alignment:
            raise reader.error(f"tensor {info.name!r} is at offset {info.offset}, no multiple of {alignment}")
        if info.offset < end:
            raise reader.error(f"tensor {info.name!r} overlaps tensor {previous!r}")
        end, previous = info.offset + info.num_bytes, info.name
        if start + end > size:
            missing = start + end - size
            raise reader.error(f"the file is truncated: tensor {info.name!r} ends {missing} bytes after its end")

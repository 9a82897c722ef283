"""Writing GGUF files, version 3, little-endian.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import struct
from collections.abc import Mapping
from pathlib import Path

from headrace.base.errors import InvalidRequestError
from headrace.formats.gguf import DEFAULT_ALIGNMENT, MAGIC, TYPE_NAMES
from headrace.formats.gguf_metadata import encoded, encoded_string
from headrace.formats.planned_file import PlannedFile
from headrace.numerics.tensor import RawTensor

_VERSION = 3
_MAX_NAME_BYTES = 63  # ggml's GGML_MAX_NAME, with the zero at its end
_TYPES = {name: code for code, name in TYPE_NAMES.items()}


def write_gguf(path: Path, metadata: Mapping[str, object], tensors: Mapping[str, RawTensor]) -> None:
    """Make a file. Each tensor is read once, one after the other.

    Args:
        path: a file that does not exist yet (`model_folder.new_files` gives one).
        metadata: by key, ``general.architecture`` and all else; values of the types that `encoded` takes, or bytes,
            which are a value already encoded (`gguf.stored_metadata`). ``general.alignment`` is this writer's.
        tensors: by the names that GGUF has for them, in formats that GGUF has, their rows in its order.

    Raises:
        InvalidRequestError: a tensor that GGUF does not hold; names it. No file is made then.
        OSError: the file cannot be written.
    """
    entries = {key: value for key, value in metadata.items() if key != "general.alignment"}
    header = b"".join(
        [
            MAGIC,
            struct.pack("<IQQ", _VERSION, len(tensors), len(entries)),
            *(
                encoded_string(key) + (value if isinstance(value, bytes) else encoded(value))
                for key, value in entries.items()
            ),
        ]
    )
    offset, offsets = 0, {}
    for name, tensor in tensors.items():
        header += _tensor_info(name, tensor, offset)
        offsets[name] = offset
        offset += _aligned(tensor.num_bytes)
    start = _aligned(len(header))
    spans = {name: (start + at, start + at + tensors[name].num_bytes) for name, at in offsets.items()}
    with PlannedFile(path, header, spans, start + offset) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor.data)


def _tensor_info(name: str, tensor: RawTensor, offset: int) -> bytes:
    if tensor.format.name not in _TYPES:
        raise InvalidRequestError(
            f"{name} is stored as {tensor.format.name}, which GGUF does not hold.",
            f"Turn it into one of {', '.join(_TYPES)} first.",
        )
    if len(name.encode()) > _MAX_NAME_BYTES:
        raise InvalidRequestError(
            f"The tensor's name {name!r} is longer than {_MAX_NAME_BYTES} bytes.", "Write the model as a folder."
        )
    extents = tensor.shape[::-1]
    fields = struct.pack(f"<I{len(extents)}QIQ", len(extents), *extents, _TYPES[tensor.format.name], offset)
    return encoded_string(name) + fields


def _aligned(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT

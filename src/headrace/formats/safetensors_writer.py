"""Writing a safetensors file, tensor by tensor, in any order.

Source: https://github.com/huggingface/safetensors#format.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np

from headrace.numerics.bitfields import Bytes
from headrace.numerics.formats import FORMATS, PARTS, NumberFormat

STORABLE = ("f32", "bf16", "f16", *PARTS)
"""Number formats that a safetensors file has an element type for."""

_PIECE = 16 << 20
_ALIGNMENT = 8

Plan = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensors to come: by name, the number format (one of `STORABLE`) and the shape."""


class SafetensorsFile:
    """A file with a header and room for all its tensors, which `write` fills. A context manager; raises OSError.

    Its whole size is claimed at once, so that a disk without room says so before it is filled. On a clean exit every
    tensor must have been written, and the bytes are on the disk.
    """

    def __init__(self, path: Path, plan: Plan, metadata: Mapping[str, str]) -> None:
        """
        Args:
            path: a file that does not exist yet.
            plan: what will be written.
            metadata: kept in the header.
        """
        self._offsets, header, size = _layout(plan, metadata)
        self._pending = set(plan)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            os.posix_fallocate(self._fd, 0, size)
            _write(self._fd, memoryview(header), 0)
        except BaseException:
            os.close(self._fd)
            raise

    def write(self, name: str, data: Bytes) -> None:
        """One tensor's bytes, as `RawTensor.data` has them."""
        begin, end = self._offsets[name]
        assert data.nbytes == end - begin, f"{name} takes {end - begin} bytes, not {data.nbytes}"
        self._pending.remove(name)
        _write(self._fd, np.ascontiguousarray(data).reshape(-1).data, begin)

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                assert not self._pending, f"not written: {sorted(self._pending)}"
                os.fsync(self._fd)
        finally:
            os.close(self._fd)


def _layout(plan: Plan, metadata: Mapping[str, str]) -> tuple[dict[str, tuple[int, int]], bytes, int]:
    """Where in the file each tensor is, the bytes before the first, and the file's size.

    Wider elements come first, so that all are aligned.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    spans, end = {}, 0
    for name in sorted(plan, key=lambda name: (-_format(plan[name][0]).block_bytes, name)):
        format_name, shape = plan[name]
        assert format_name in STORABLE, f"{name} is {format_name}, for which there is no element type"
        begin, end = end, end + _format(format_name).block_bytes * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": format_name.upper(), "shape": list(shape), "data_offsets": [begin, end]}
        spans[name] = (begin, end)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = 8 + len(text)
    offsets = {name: (start + begin, start + end) for name, (begin, end) in spans.items()}
    return offsets, len(text).to_bytes(8, "little") + text, start + end


def _format(name: str) -> NumberFormat:
    return FORMATS[name] if name in FORMATS else PARTS[name]


def _write(fd: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(fd, data[:_PIECE], at)
        data, at = data[written:], at + written

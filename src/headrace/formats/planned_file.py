"""A file whose layout is known before its bytes are: a header, and tensors written in any order."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from headrace.numerics.bitfields import Bytes

_PIECE = 16 << 20


class PlannedFile:
    """A file with a header and room for all its tensors, which `write` fills. A context manager; raises OSError.

    Its whole size is claimed at once, so that a disk without room says so before it is filled. On a clean exit every
    tensor must have been written, and the bytes are on the disk.
    """

    def __init__(self, path: Path, header: bytes, spans: Mapping[str, tuple[int, int]], size: int) -> None:
        """
        Args:
            path: a file that does not exist yet.
            header: its first bytes.
            spans: where each tensor begins and ends; what lies between them stays zero.
            size: of the file.
        """
        self._spans = spans
        self._pending = set(spans)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            os.posix_fallocate(self._fd, 0, size)
            _write(self._fd, memoryview(header), 0)
        except BaseException:
            os.close(self._fd)
            raise

    def write(self, name: str, data: Bytes) -> None:
        """One tensor's bytes, as `RawTensor.data` has them."""
        begin, end = self._spans[name]
        assert data.nbytes == end - begin, f"{name} takes {end - begin} bytes, not {data.nbytes}"
        self._pending.remove(name)
        _write(self._fd, np.ascontiguousarray(data).reshape(-1).data, begin)

    def __enter__(self) -> Self:
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


def _write(fd: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(fd, data[:_PIECE], at)
        data, at = data[written:], at + written

"""Logits in a file without a name: they take room on a disk in place of memory, and go with whoever holds them."""

import math
import os
import tempfile
import weakref
from pathlib import Path

import numpy as np

from headrace.base.errors import StorageError
from headrace.engine.step import Float32


class KeptLogits:
    """Rows of float32 logits: written once, one after the other, then read in pieces.

    Args:
        num_rows: how many there will be; the room for them is taken at once.
        vocab_size: logits of a row.
        folder: of the file; None: where temporary files are.

    Raises StorageError if there is no room.
    """

    def __init__(self, num_rows: int, vocab_size: int, folder: Path | None = None) -> None:
        self._vocab_size, self._written = vocab_size, 0
        place = Path(tempfile.gettempdir()) if folder is None else folder
        size = 4 * num_rows * vocab_size
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place) as file:
                self._file = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._file)
            os.posix_fallocate(self._file, 0, size)
        except OSError as error:
            raise StorageError(
                f"{place} has no room for {math.ceil(size / 1e6):,} MB of the source's logits: {error.strerror}.",
                "Free some, write elsewhere, or judge by fewer or shorter texts (--held-out-texts, --length).",
            ) from error

    def append(self, rows: Float32) -> None:
        """Write the next rows, ``[n, vocab]``."""
        data = memoryview(np.ascontiguousarray(rows, np.float32)).cast("B")
        place = 4 * self._written * self._vocab_size
        while data:
            count = os.pwrite(self._file, data, place)
            data, place = data[count:], place + count
        self._written += len(rows)

    def rows(self, begin: int, count: int) -> Float32:
        """Rows that were written, ``[count, vocab]``."""
        assert begin + count <= self._written, "rows that were not written"
        found = np.empty((count, self._vocab_size), np.float32)
        view, place = memoryview(found).cast("B"), 4 * begin * self._vocab_size
        while view:
            read = os.preadv(self._file, [view], place)
            assert read, "the file ends before its rows"
            view, place = view[read:], place + read
        return found

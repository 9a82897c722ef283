"""Model files mapped into memory: never read whole, never copied, every access within bounds."""

import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt

from headrace.base.errors import CheckpointError

DOWNLOAD_AGAIN = "Download the file again: it is damaged or incomplete."


def map_file(path: Path) -> mmap.mmap:
    """The file's bytes, read-only. Raises CheckpointError for a file that is empty or cannot be read."""
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise CheckpointError(f"{path} is empty.", DOWNLOAD_AGAIN)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}.", "Check the path and its permissions."
        ) from error


def rows_view(data: mmap.mmap, offset: int, rows: int, row_bytes: int) -> npt.NDArray[np.uint8]:
    """Bytes ``[rows, row_bytes]`` at an offset of a mapped file, as a view that keeps the mapping alive."""
    assert 0 <= offset <= offset + rows * row_bytes <= len(data)
    return np.frombuffer(data, np.uint8, rows * row_bytes, offset).reshape(rows, row_bytes)

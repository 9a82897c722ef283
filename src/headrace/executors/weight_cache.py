"""Packed weights kept on disk, so that the next start reads them instead of packing again.

One file per model and way of packing: a preamble, the entry's description, then the packed bytes, aligned to a page.
It is named after a checksum of the description and holds all of it, so it is taken only for exactly what is asked. All
bytes are checksummed as they are read: damage anywhere means packing again, never a wrong weight.
"""

import fcntl
import json
import logging
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace import _native

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]

LEAST_BYTES = 64 << 20
"""Less is packed in a few hundredths of a second: not worth a file."""
MOST_BYTES = 32 << 30
"""What all entries may take; the least recently used ones go first."""

_SUFFIX = ".packed"
_MAGIC = b"headrace packed\n"
_PREAMBLE = struct.Struct("<16sQQQQ")  # magic, bytes of description and weights, checksum of each
_PIECE = 4 << 20  # bytes under one checksum
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class WeightCache:
    """Entries in one folder, shared by all processes that name it.

    Attributes:
        folder: made when first written to. If it cannot be, or is full, starts go on without it, and say so.
        source: identifies the checkpoint's files.
        least_bytes: of an entry.
        most_bytes: of all entries together.
    """

    folder: Path
    source: tuple[str, ...]
    least_bytes: int = LEAST_BYTES
    most_bytes: int = MOST_BYTES

    def load(self, description: dict[str, Any], runtime: _native.Runtime) -> bool:
        """Give the runtime's pending matrices their packed form. False, and nothing done, where there is no sound
        entry."""
        text = self._text(description)
        path = self._path(text)
        try:
            with path.open("rb") as file:
                loaded = _read(file.fileno(), text, runtime)
        except FileNotFoundError:
            return False
        except OSError as error:
            log.warning("%s cannot be read (%s): the weights are packed again.", path, error.strerror)
            return False
        if loaded:
            with suppress(OSError):  # in a read-only folder too, entries can be used
                os.utime(path)
        else:
            log.warning("%s is damaged: the weights are packed again.", path)
        return loaded

    def keep(self, description: dict[str, Any], packed: Bytes) -> threading.Thread | None:
        """Write an entry beside whatever the process does next; returns the thread that does, which ends by itself.

        `packed` must not change any more.
        """
        if not self.least_bytes <= packed.nbytes <= self.most_bytes:
            return None
        arguments = (self._text(description), packed)
        writer = threading.Thread(target=self._write_quietly, args=arguments, name="headrace-weight-cache")
        writer.start()
        return writer

    def _text(self, description: dict[str, Any]) -> bytes:
        whole = {"packing": _native.packing_id, "source": self.source, **description}
        return json.dumps(whole, sort_keys=True).encode()

    def _path(self, text: bytes) -> Path:
        return self.folder / f"{_checksum(text):016x}{_SUFFIX}"

    def _write_quietly(self, text: bytes, packed: Bytes) -> None:
        with suppress(OSError):  # requests come first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            self.write(text, packed)
        except OSError as error:
            log.warning(
                "Packed weights are not kept in %s (%s): the next start packs again. weight_cache='off' stops trying.",
                self.folder,
                error.strerror,
            )

    def write(self, text: bytes, packed: Bytes) -> None:
        """Write an entry, then remove the least recently used ones beyond `most_bytes`. Does nothing while another
        process writes. Raises OSError."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(self.folder) as alone:
            if not alone:
                return
            for leftover in self.folder.glob("*.partial"):  # of a writer that was killed: it holds no lock
                leftover.unlink()
            path = self._path(text)
            partial = path.with_suffix(".partial")
            try:
                _write(partial, text, packed)
                partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
            _sync_folder(self.folder)
            self._evict(spared=path)

    def _evict(self, spared: Path) -> None:
        entries = [(path.stat(), path) for path in self.folder.glob(f"*{_SUFFIX}")]
        total = sum(stat.st_size for stat, _ in entries)
        for stat, path in sorted(entries, key=lambda entry: entry[0].st_mtime_ns):
            if total > self.most_bytes and path != spared:
                path.unlink()  # who is reading it just now keeps what it opened
                total -= stat.st_size


def source_of(files: list[Path]) -> tuple[str, ...]:
    """What identifies files without reading them: inode, size and time of the last change.

    A file that is changed in place and given its old time back is not told apart by this.
    """
    stats = [path.stat() for path in files]
    return tuple(f"{stat.st_dev}:{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}" for stat in stats)


def sample_of(data: Bytes) -> str:
    """A checksum of a matrix's first, middle and last row, which tells models apart that only look alike."""
    rows = (0, data.shape[0] // 2, data.shape[0] - 1)
    return f"{_checksum(b''.join(data[row].tobytes() for row in rows)):016x}"


def _checksum(data: bytes) -> int:
    return _native.checksums(np.frombuffer(data, np.uint8), max(1, len(data)))[0]


def _checksum_of_all(packed: Bytes) -> int:
    return _checksum(np.array(_native.checksums(packed, _PIECE), np.uint64).tobytes())


def _begin(text_bytes: int) -> int:
    return -(-(_PREAMBLE.size + text_bytes) // _PAGE) * _PAGE


def _read(fd: int, text: bytes, runtime: _native.Runtime) -> bool:
    begin, num_bytes = _begin(len(text)), runtime.pending_bytes
    if os.fstat(fd).st_size != begin + num_bytes:
        return False
    head = os.pread(fd, _PREAMBLE.size + len(text), 0)
    if len(head) < _PREAMBLE.size + len(text):
        return False
    magic, text_bytes, packed_bytes, text_sum, packed_sum = _PREAMBLE.unpack_from(head)
    if (magic, text_bytes, packed_bytes, text_sum) != (_MAGIC, len(text), num_bytes, _checksum(text)):
        return False
    return head[_PREAMBLE.size :] == text and runtime.read_packed(fd, begin, _PIECE, packed_sum)


def _write(path: Path, text: bytes, packed: Bytes) -> None:
    head = _PREAMBLE.pack(_MAGIC, len(text), packed.nbytes, _checksum(text), _checksum_of_all(packed)) + text
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        size = _begin(len(text)) + packed.nbytes
        os.posix_fallocate(fd, 0, size)  # a disk without room says so before it is filled
        os.pwrite(fd, head, 0)
        view, at = memoryview(packed), _begin(len(text))
        for start in range(0, packed.nbytes, _PIECE):
            piece = view[start : start + _PIECE]
            while piece:
                written = os.pwrite(fd, piece, at)
                piece, at = piece[written:], at + written
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process is the only one that writes to the folder, until the end of the block."""
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

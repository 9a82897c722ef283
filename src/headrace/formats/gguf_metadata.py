"""The scalar values, strings and arrays that a GGUF header is made of.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Nothing here trusts a length: each is held against
the bytes that are left before anything is allocated or looped over.
"""

import mmap
import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import overload

import numpy as np

from headrace._native import string_offsets
from headrace.base.errors import CheckpointError
from headrace.formats.mapped_file import DOWNLOAD_AGAIN

_U32_TYPE, _I32_TYPE, _F32_TYPE, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    _BOOL: struct.Struct("<B"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32, _U64 = _SCALARS[4], _SCALARS[10]
_MIN_ARRAY_BYTES = 12  # of an empty array: element type and count
_MAX_NESTING = 4
_MAX_ITEMS = 1 << 24  # of one array; the largest vocabularies have a million
_MAX_TEXT_BYTES = 1 << 28  # of one string, or of one array of strings

Scalar = int | float | bool | str


class StringArray(Sequence[str]):
    """Many strings, decoded when asked for: a vocabulary of 50,000 costs a few milliseconds to find the ends of.

    Iterating (or ``list(array)``) decodes all of them at once. Raises CheckpointError, naming the array and the index,
    for bytes that are not UTF-8.
    """

    def __init__(self, name: str, packed: bytes, offsets: list[int]) -> None:
        """
        Args:
            name: what to call the array in errors.
            packed: the strings, each after its length (u64).
            offsets: where in `packed` each string's length stands, then the end of the last string.
        """
        self._name = name
        self._packed = packed
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"{self._name}[{index}] of {len(self)}")
        return self._decode(position)

    def __iter__(self) -> Iterator[str]:
        packed, offsets = self._packed, self._offsets
        try:
            strings = [packed[start + 8 : end].decode() for start, end in pairwise(offsets)]
        except UnicodeDecodeError:
            strings = [self._decode(position) for position in range(len(self))]  # names the culprit
        return iter(strings)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"StringArray({self._name}, {len(self)} strings)"

    def _decode(self, position: int) -> str:
        text = self._packed[self._offsets[position] + 8 : self._offsets[position + 1]]
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self._name}[{position}] is not UTF-8: {text[:32]!r}.", DOWNLOAD_AGAIN) from error


Value = Scalar | StringArray | list[int] | list[float] | list[bool] | list["Value"]


def encoded(value: object) -> bytes:
    """A value with its type, as a GGUF file holds it.

    str, bool, int from 0 up (u32), float (f32), and sequences of str, int (i32) or float (f32), which are what
    llama.cpp asks for under its own keys.
    """
    match value:
        case str():
            return _encoded_type(_STRING) + encoded_string(value)
        case bool():
            return _encoded_type(_BOOL) + bytes([value])
        case int():
            return _encoded_type(_U32_TYPE) + _U32.pack(value)
        case float():
            return _encoded_type(_F32_TYPE) + _SCALARS[_F32_TYPE].pack(value)
    assert isinstance(value, Sequence), f"GGUF has no type for {type(value).__name__}"
    items = list(value)
    if all(isinstance(item, str) for item in items):
        kind, packed = _STRING, b"".join(map(encoded_string, items))
    else:
        kind = _I32_TYPE if all(isinstance(item, int) for item in items) else _F32_TYPE
        packed = np.asarray(items, _SCALARS[kind].format).tobytes()
    return _encoded_type(_ARRAY) + _encoded_type(kind) + _U64.pack(len(items)) + packed


def _encoded_type(kind: int) -> bytes:
    return _U32.pack(kind)


def encoded_string(text: str) -> bytes:
    """A key, or a tensor's name, as a GGUF file holds it."""
    data = text.encode()
    return _U64.pack(len(data)) + data


class HeaderReader:
    """A position in a mapped GGUF file that moves forward over its header.

    Every method raises CheckpointError, naming what was being read, where the file ends too early or holds nonsense.
    """

    def __init__(self, data: mmap.mmap, path: str, position: int = 0) -> None:
        self.data = data
        self.path = path
        self.position = position

    def error(self, what: str) -> CheckpointError:
        """An error that blames the file."""
        return CheckpointError(f"{self.path}: {what}.", DOWNLOAD_AGAIN)

    def u32(self, what: str) -> int:
        return int(self._unpack(_U32, what))

    def u64(self, what: str) -> int:
        return int(self._unpack(_U64, what))

    def count(self, what: str, least_bytes: int, limit: int = _MAX_ITEMS) -> int:
        """A number of things of `least_bytes` bytes or more, all of which must fit in the rest of the file."""
        count = self.u64(what)
        left = len(self.data) - self.position
        if count > limit:
            raise self.error(f"{what} is {count}, an absurd number")
        if count * least_bytes > left:
            raise self.error(f"{what} is {count}, but only {left} bytes follow")
        return count

    def string(self, what: str) -> str:
        length = self.count(f"the length of {what}", 1, _MAX_TEXT_BYTES)
        text = self.data[self.position : self.position + length]
        self.position += length
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8: {text[:32]!r}") from error

    def value(self, what: str) -> Value:
        """A value after its type."""
        return self._typed_value(self.u32(f"the type of {what}"), what, nesting=0)

    def _typed_value(self, kind: int, what: str, nesting: int) -> Value:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self._array(what, nesting + 1)
        if kind not in _SCALARS:
            raise self.error(f"{what} has value type {kind}, which GGUF does not define")
        value = self._unpack(_SCALARS[kind], what)
        if kind != _BOOL:
            return value
        if value > 1:
            raise self.error(f"{what} is a bool of value {value}")
        return bool(value)

    def _array(self, what: str, nesting: int) -> Value:
        if nesting > _MAX_NESTING:
            raise self.error(f"{what} has arrays nested deeper than {_MAX_NESTING}")
        kind = self.u32(f"the element type of {what}")
        if kind == _STRING:
            return self._string_array(what)
        if kind == _ARRAY:
            count = self.count(f"the length of {what}", _MIN_ARRAY_BYTES)
            return [self._array(what, nesting + 1) for _ in range(count)]
        if kind not in _SCALARS:
            raise self.error(f"{what} has element type {kind}, which GGUF does not define")
        scalar = _SCALARS[kind]
        count = self.count(f"the length of {what}", scalar.size)
        values = np.frombuffer(self.data, np.dtype(scalar.format), count, self.position)
        self.position += count * scalar.size
        if kind != _BOOL:
            numbers: list[int] | list[float] = values.tolist()
            return numbers
        if values.max(initial=0) > 1:
            raise self.error(f"{what} has a bool of value {values.max()}")
        return [bool(value) for value in values]

    def _string_array(self, what: str) -> StringArray:
        count = self.count(f"the length of {what}", _U64.size)
        data = np.frombuffer(self.data, np.uint8)
        try:
            offsets = string_offsets(data, self.position, count)
        except IndexError as error:
            raise self.error(f"{what}[{error}] ends after the end of the file") from None
        if offsets[-1] > _MAX_TEXT_BYTES:
            raise self.error(f"{what} takes {offsets[-1]} bytes, an absurd number")
        start, self.position = self.position, self.position + offsets[-1]
        return StringArray(what, self.data[start : self.position], offsets)

    def _unpack(self, scalar: struct.Struct, what: str) -> int | float:
        if self.position + scalar.size > len(self.data):
            raise self.error(f"the file ends before {what}")
        (value,) = scalar.unpack_from(self.data, self.position)
        self.position += scalar.size
        return value  # type: ignore[no-any-return]

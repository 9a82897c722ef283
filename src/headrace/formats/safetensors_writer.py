"""Writing safetensors, in one file or in shards, tensor by tensor, in any order.

Source: https://github.com/huggingface/safetensors#format.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from headrace.formats.planned_file import PlannedFile
from headrace.formats.safetensors import INDEX_FILE, SINGLE_FILE
from headrace.numerics.bitfields import Bytes
from headrace.numerics.formats import FORMATS, PARTS, NumberFormat

STORABLE = ("f32", "bf16", "f16", *PARTS)
"""Number formats that a safetensors file has an element type for."""

_ALIGNMENT = 8

Plan = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensors to come: by name, the number format (one of `STORABLE`) and the shape."""


class SafetensorsFile(PlannedFile):
    """A safetensors file to fill."""

    def __init__(self, path: Path, plan: Plan, metadata: Mapping[str, str]) -> None:
        """
        Args:
            path: a file that does not exist yet.
            plan: what will be written.
            metadata: kept in the header.
        """
        offsets, header, size = _layout(plan, metadata)
        super().__init__(path, header, offsets, size)


class SafetensorsFolder:
    """The tensors of a Hugging Face folder to fill: ``model.safetensors``, or shards and the index that names them.

    A context manager as `SafetensorsFile` is: room for all shards is claimed at once.
    """

    def __init__(self, folder: Path, plans: Sequence[Plan], max_bytes: int | None = None) -> None:
        """
        Args:
            folder: has none of the files yet.
            plans: what will be written, in order; the tensors of one plan go into one shard.
            max_bytes: of one shard's tensors; a plan that alone is larger gets a shard of its own. None: one file.
        """
        shards = _shards(plans, max_bytes)
        names = [SINGLE_FILE]
        if len(shards) > 1:
            names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        self._file_of: dict[str, SafetensorsFile] = {}
        with ExitStack() as opened:
            for file_name, shard in zip(names, shards, strict=True):
                file = opened.enter_context(SafetensorsFile(folder / file_name, shard, {"format": "pt"}))
                self._file_of |= dict.fromkeys(shard, file)
            if len(shards) > 1:
                _write_index(folder / INDEX_FILE, dict(zip(names, shards, strict=True)))
            self._opened = opened.pop_all()

    def write(self, name: str, data: Bytes) -> None:
        """One tensor's bytes, as `RawTensor.data` has them."""
        self._file_of[name].write(name, data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, traceback)


def _shards(plans: Sequence[Plan], max_bytes: int | None) -> list[Plan]:
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    size = 0
    for plan in plans:
        num_bytes = planned_bytes(plan)
        if max_bytes is not None and shards[-1] and size + num_bytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1] |= plan
        size += num_bytes
    return [*shards]


def _write_index(path: Path, shards: Mapping[str, Plan]) -> None:
    index = {
        "metadata": {"total_size": sum(map(planned_bytes, shards.values()))},
        "weight_map": {name: file_name for file_name, plan in shards.items() for name in plan},
    }
    path.write_text(json.dumps(index, indent=2) + "\n")


def planned_bytes(plan: Plan) -> int:
    """Of the tensors to come."""
    return sum(_format(name).block_bytes * math.prod(shape) for name, shape in plan.values())


def _layout(plan: Plan, metadata: Mapping[str, str]) -> tuple[dict[str, tuple[int, int]], bytes, int]:
    """Where in the file each tensor is, the bytes before the first, and the file's size.

    Wider elements come first, so that all are aligned.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    spans, end = {}, 0
    for name in sorted(plan, key=lambda name: (-_format(plan[name][0]).block_bytes, name)):
        format_name, shape = plan[name]
        assert format_name in STORABLE, f"{name} is {format_name}, for which there is no element type"
        begin, end = end, end + _format(format_name).block_bytes * math.prod(shape)
        header[name] = {"dtype": format_name.upper(), "shape": list(shape), "data_offsets": [begin, end]}
        spans[name] = (begin, end)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = 8 + len(text)
    offsets = {name: (start + begin, start + end) for name, (begin, end) in spans.items()}
    return offsets, len(text).to_bytes(8, "little") + text, start + end


def _format(name: str) -> NumberFormat:
    return FORMATS[name] if name in FORMATS else PARTS[name]

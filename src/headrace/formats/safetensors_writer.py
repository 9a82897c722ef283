"""Writing a safetensors file, tensor by tensor, in any order.

Source: https://github.com/huggingface/safetensors#format.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from headrace.formats.planned_file import PlannedFile
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

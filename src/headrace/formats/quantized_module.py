"""A quantized module as a Hugging Face folder stores it: parts that are checked against its scheme, read when used."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from headrace.base.errors import CheckpointError
from headrace.numerics.formats import PARTS, format_named
from headrace.numerics.row_blocks import Groups, RowBlocks
from headrace.numerics.tensor import RawTensor

DO_NOT_MATCH = "The weights and their quantization config do not belong together: download both again."
FLOATS = ("f32", "bf16", "f16")

Parts = Mapping[str, RawTensor]
"""Tensors of one module by the last part of their names: weight, bias, weight_scale, …"""


@dataclass(frozen=True, slots=True)
class QuantizedModule:
    """The parts of one module and the scheme that they must fit.

    Attributes:
        name: ``model.layers.0.mlp.up_proj``.
        parts: what is stored of it.
        scheme: what to call the scheme in errors.
    """

    name: str
    parts: Parts
    scheme: str

    def part(self, name: str, *formats: str) -> RawTensor:
        """One part, of two dimensions or less. Raises CheckpointError if it is missing or in none of these formats."""
        tensor = self.parts.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.name} ({self.scheme}) lacks its {name}.", DO_NOT_MATCH)
        if tensor.format.name not in formats:
            raise self.error(name, f"is stored as {tensor.format.name}, not as {' or '.join(formats)}")
        return tensor

    def matrix(self, name: str, *formats: str) -> RawTensor:
        """One part that has two dimensions, neither of them 0."""
        tensor = self.part(name, *formats)
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            raise self.error(name, f"has shape {list(tensor.shape)}, no matrix")
        return tensor

    def shaped(self, name: str, shape: Sequence[int], *formats: str) -> RawTensor:
        """One part that has the shape which the scheme calls for."""
        tensor = self.part(name, *formats)
        if tensor.shape != tuple(shape):
            raise self.error(name, f"has shape {list(tensor.shape)}, not {list(shape)}")
        return tensor

    def scalar(self, name: str, *formats: str) -> RawTensor:
        """One part of a single number."""
        tensor = self.part(name, *formats)
        if any(extent != 1 for extent in tensor.shape):
            raise self.error(name, f"has shape {list(tensor.shape)}, not a single number")
        return tensor

    def error(self, part: str, what: str) -> CheckpointError:
        """An error that blames one part."""
        return CheckpointError(f"{self.name}.{part} {what}, as {self.scheme} would have it.", DO_NOT_MATCH)

    def group_size_of(self, features: int, group_size: int | None) -> int:
        """Values under one scale, None standing for the row. Raises CheckpointError if they do not divide it."""
        if group_size is None:
            return features
        if features % group_size:
            raise CheckpointError(
                f"{self.name} ({self.scheme}) has rows of {features}, no multiple of its groups of {group_size}.",
                DO_NOT_MATCH,
            )
        return group_size


def stored_quantized(modules: Mapping[str, Parts], part_names: Sequence[str]) -> dict[str, Parts]:
    """The modules of which a part is stored that only quantized ones have, or a weight that is none by itself."""
    telling = set(part_names) - {"weight"}
    return {
        name: parts
        for name, parts in modules.items()
        if parts.keys() & telling or ("weight" in parts and parts["weight"].format.name in PARTS)
    }


def transcoded(layout: RowBlocks, shape: tuple[int, int], read: Callable[[], Groups]) -> RawTensor:
    """A weight that is put together, into row blocks, each time that it is read."""
    return RawTensor(format_named(layout.name), shape, lambda: read().encode())


def modules_in(tensors: Mapping[str, RawTensor]) -> dict[str, dict[str, RawTensor]]:
    """All tensors by module, then by the last part of their names."""
    modules: dict[str, dict[str, RawTensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = tensor
    return modules

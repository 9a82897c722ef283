"""Where a graph's parameters come from in a checkpoint: one entry per canonical name."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class Transform(StrEnum):
    """What must be done to a stored tensor to make it the graph's parameter. Each is exact in any number format."""

    NONE = "none"
    UNINTERLEAVE_ROPE = "uninterleave_rope"
    """Reorder the rows of each head from rotary pairs (2i, 2i + 1), as llama GGUF files hold them, to halves."""
    ADD_ONE = "add_one"
    """A norm weight stored as its difference from one (Gemma in Hugging Face format)."""


@dataclass(frozen=True, slots=True)
class Source:
    """The stored tensor behind a parameter.

    Attributes:
        name: the tensor's name in the checkpoint.
        transform: how it becomes the parameter.
        num_heads: heads over its rows, where the transform needs it.
    """

    name: str
    transform: Transform = Transform.NONE
    num_heads: int = 0


class StoredTensor(Protocol):
    """What a family may ask of a tensor in a checkpoint while it reads the model's description."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def to_f32(self) -> "npt.NDArray[np.float32]": ...


StoredTensors = Mapping[str, StoredTensor]
"""A checkpoint's tensors by stored name."""

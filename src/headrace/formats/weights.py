"""From stored tensors to a graph's parameters: every parameter found, shaped right, and transformed exactly."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np

from headrace.base.errors import CheckpointError, UnsupportedModelError
from headrace.formats.checkpoint import Checkpoint
from headrace.graph.ir import Param
from headrace.models.sources import Source, Transform
from headrace.numerics.bitfields import Bytes
from headrace.numerics.formats import PARTS
from headrace.numerics.tensor import RawTensor


@dataclass(frozen=True, slots=True)
class Weights(Mapping[str, RawTensor]):
    """A graph's parameters by canonical name.

    Matrices keep the checkpoint's number format, and are views of its mapped files unless a transform moved them;
    vectors are f32.

    Attributes:
        unused: stored tensors that no parameter came from and that are not known to be ignorable.
    """

    params: Mapping[str, RawTensor]
    unused: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> RawTensor:
        return self.params[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.params)

    def __len__(self) -> int:
        return len(self.params)


def load_weights(
    checkpoint: Checkpoint,
    params: Mapping[str, Param],
    sources: Mapping[str, Source],
    ignorable: Sequence[str] = (),
) -> Weights:
    """Take a graph's parameters out of a checkpoint.

    Args:
        checkpoint: opened files.
        params: the graph's parameters, whose shapes the stored tensors must have.
        sources: where each parameter comes from.
        ignorable: shell-style patterns of stored names that need not be used, so that they are not named as unused.

    Raises:
        CheckpointError: tensors are missing (all are named), or one has another shape than its parameter.
        UnsupportedModelError: a tensor is no more than a part of a quantized one.
    """
    lacking = sorted(params.keys() - sources.keys())
    assert not lacking, f"parameters without a source: {lacking}"
    wanted = {name: sources[name] for name in params}
    missing = sorted({source.name for source in wanted.values()} - checkpoint.tensors.keys())
    if missing:
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} tensors that its config calls for: {', '.join(missing)}.",
            "Download the model again, or correct its config.",
        )
    loaded = {name: _load(checkpoint, param, wanted[name]) for name, param in params.items()}
    used = {source.name for source in wanted.values()}
    left = (name for name in checkpoint.tensors if name not in used)
    unused = tuple(name for name in left if not any(fnmatchcase(name, pattern) for pattern in ignorable))
    return Weights(loaded, unused)


def _load(checkpoint: Checkpoint, param: Param, source: Source) -> RawTensor:
    stored = checkpoint.tensors[source.name]
    if stored.shape != param.shape:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {source.name!r} has shape {list(stored.shape)}, "
            f"but {list(param.shape)} is expected for {param.name}.",
            "The weights and the config do not belong together: download both again.",
        )
    if stored.format.name in PARTS:
        raise UnsupportedModelError(
            f"{checkpoint.path}: tensor {source.name!r} is stored as {stored.format.name}, part of a quantized weight, "
            f"without the others that make it {param.name}.",
            "Give config.json the quantization_config that the model was published with.",
        )
    if len(param.shape) == 1 and stored.format.name != "f32":
        stored = RawTensor.from_f32(stored.to_f32())
    match source.transform:
        case Transform.NONE:
            return stored
        case Transform.ADD_ONE:
            return RawTensor.from_f32(stored.to_f32() + np.float32(1))
        case Transform.UNINTERLEAVE_ROPE:
            return uninterleave_rope(stored, source.num_heads)


def matrices_in(format_name: str, weights: Weights) -> Weights:
    """The same parameters with every matrix in ``f32`` (the exact values) or ``bf16`` (the nearest), in memory."""
    assert format_name in ("f32", "bf16"), "a plain format"
    changed = {
        name: stored if len(stored.shape) == 1 else stored.in_plain(format_name)
        for name, stored in weights.params.items()
    }
    return Weights(changed, weights.unused)


def uninterleave_rope(stored: RawTensor, num_heads: int) -> RawTensor:
    """Reorder each head's outputs from rotary pairs (2i, 2i + 1) to halves (i, i + head_dim / 2).

    Outputs are the rows of a matrix, moved as stored bytes, or the elements of a vector (a bias). They are moved when
    they are read: a copy of every such matrix would take memory that packing needs.
    """
    outputs = stored.shape[0]
    assert num_heads > 0, "the number of heads is not known"
    assert outputs % (2 * num_heads) == 0, f"{outputs} outputs are not {num_heads} heads of pairs"
    return RawTensor(stored.format, stored.shape, stored.source, num_heads)


def interleave_rope(tensor: RawTensor, num_heads: int) -> RawTensor:
    """The inverse of `uninterleave_rope`: what that was given, or a tensor whose outputs are moved when it is read."""
    if tensor.interleaved_heads == num_heads:
        return replace(tensor, interleaved_heads=0)

    def moved() -> Bytes:
        data = tensor.data
        halves = data.reshape(num_heads, 2, tensor.shape[0] // num_heads // 2, -1)
        return halves.swapaxes(1, 2).reshape(data.shape)

    return RawTensor(tensor.format, tensor.shape, moved)

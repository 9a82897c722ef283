"""New weights for a running model: read, accounted for, and turned into the number formats that it runs in.

What is served may be quantized while what a trainer sends is not: then each matrix is rounded again by the rule of its
scheme, the one that training's fake quantization follows.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from headrace.base.errors import CheckpointError, InvalidRequestError
from headrace.executors.native_quantize import quantize_tensor
from headrace.formats.checkpoint import Checkpoint, open_checkpoint
from headrace.formats.weights import load_weights
from headrace.llm.loader import LoadedModel
from headrace.models import ignorable, sources
from headrace.numerics.row_blocks import RowBlocks, row_blocks
from headrace.numerics.schemes import IntegerScheme
from headrace.numerics.tensor import RawTensor

PLAIN = ("f32", "bf16", "f16")

WeightSource = str | Path | Mapping[str, RawTensor]
"""A GGUF file or a Hugging Face folder; or all tensors of the latter by their names there."""


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """What an update was and what it took.

    Attributes:
        version: of the weights that run from now on.
        replaced: the version that ran before.
        num_parameters: how many were replaced: all of them.
        requantized: how many of them were rounded to the scheme that is served.
        source_bytes: of the tensors that were given.
        seconds: of each part: read (and checksums), convert, pack, and swap, during which no step runs.
    """

    version: int
    replaced: int
    num_parameters: int
    requantized: int
    source_bytes: int
    seconds: Mapping[str, float] = field(default_factory=dict)


def read_update(source: WeightSource, model: LoadedModel, sha256: Mapping[str, str] | None) -> dict[str, RawTensor]:
    """The graph's parameters from new weights, as they were given.

    Args:
        source: see `WeightSource`.
        model: what runs, whose parameters and shapes the source must have: no more, no fewer.
        sha256: hexadecimal digests: of every weight file by its name, or of every given tensor's bytes by its name.

    Raises:
        InvalidRequestError: a digest is missing, unknown or wrong; tensors that this model does not have.
        CheckpointError and its like: tensors missing or misshapen (all named), files damaged.
    """
    checkpoint = _opened(source, model)
    if sha256 is not None:
        _verify(checkpoint, sha256, by_tensor=isinstance(source, Mapping))
    found = load_weights(
        checkpoint, model.graph.params, sources(model.spec, checkpoint.kind), ignorable(checkpoint.kind)
    )
    if found.unused:
        raise InvalidRequestError(
            f"The new weights hold {len(found.unused)} tensors that {model.name} does not have: "
            f"{', '.join(found.unused[:5])}.",
            "Send the tensors of this very model.",
        )
    return dict(found.params)


def as_served(name: str, tensor: RawTensor, served: RawTensor) -> RawTensor:
    """A parameter in the format that it is served in: itself, rounded to a plain format, or quantized anew.

    Raises InvalidRequestError where that would be a guess.
    """
    if tensor.format.name == served.format.name:
        return tensor
    if tensor.format.name in PLAIN:
        if served.format.name in PLAIN:
            return tensor.in_plain(served.format.name)
        layout = row_blocks(served.format.name)
        if layout is not None and (scheme := _scheme_of(layout)) is not None:
            return quantize_tensor(tensor, scheme)
    raise InvalidRequestError(
        f"{name} is served as {served.format.name} and cannot be made of {tensor.format.name}.",
        f"Send it as {served.format.name}, or serve a model in f32, bf16, int4 or int8 groups.",
    )


def _opened(source: WeightSource, model: LoadedModel) -> Checkpoint:
    if isinstance(source, Mapping):
        return Checkpoint("hf", model.path, {}, source)
    try:
        return open_checkpoint(source)
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read: {error.strerror}.", "Check the path.") from error


def _verify(checkpoint: Checkpoint, sha256: Mapping[str, str], *, by_tensor: bool) -> None:
    """Every file, or every tensor, has its digest; no digest is of something else."""
    names = set(checkpoint.tensors) if by_tensor else {path.name for path in checkpoint.weight_files}
    if names != sha256.keys():
        odd = sorted(names ^ sha256.keys())
        whose = "has no digest" if odd[0] in names else "has a digest, but is not there"
        raise InvalidRequestError(f"{odd[0]} {whose}.", "Give one digest for each, or none at all.")
    for name in sorted(names):
        if by_tensor:
            found = hashlib.sha256(checkpoint.tensors[name].stored).hexdigest()
        else:
            with (checkpoint.folder / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256[name].lower():
            raise InvalidRequestError(
                f"{name} has the SHA-256 digest {found}, not {sha256[name]}.",
                "Send it again.",
                code="checksum_mismatch",
            )


def _scheme_of(layout: RowBlocks) -> IntegerScheme | None:
    """The scheme that gives a layout, if the layout says enough. Of two clipping ranges it is that of training."""
    if layout.element not in ("int4", "int8", "uint4", "uint8"):
        return None
    return IntegerScheme(
        bits=4 if layout.bits == 4 else 8,
        group_size=layout.group_size,
        symmetric=not layout.has_zero_point,
        scale=layout.scale,  # type: ignore[arg-type]  # RowBlocks has checked it
    )

"""Node by node: what of B's error each node makes itself, and what it only hands on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace.align.huggingface import OpenTransformers
from headrace.align.subjects import Opened
from headrace.engine.step import Float32
from headrace.executors.torch_sequences import run_sequences
from headrace.graph.ir import Graph

Tapped = Opened | OpenTransformers

_AT_ONCE = 48  # nodes tapped in one pass: their values are held


@dataclass(frozen=True, slots=True)
class NodeError:
    """One node's output in B.

    Attributes:
        name, op: the node.
        total: RMS of B's output minus A's, relative to A's RMS.
        cosine: of the two, flattened.
        own: RMS of B's output minus what the reference op makes, in float64, of B's own inputs and parameters, relative
            to that. What is in `total` and not here, the node inherited or its parameters differ.

    What a side does not show of a node (transformers: rotated keys, say) makes NaN of it.
    """

    name: str
    op: str
    total: float
    cosine: float
    own: float


def node_errors(a: Tapped, b: Tapped, token_ids: Sequence[int]) -> Iterator[NodeError]:
    """Every node, in order, on one text. Both run it in passes, some nodes tapped in each."""
    names = [node.name for node in b.graph.nodes]
    by_name = {node.name: node for node in b.graph.nodes}
    with a.tapping(token_ids) as first, b.tapping(token_ids) as second:
        for at in range(0, len(names), _AT_ONCE):
            wanted = names[at : at + _AT_ONCE]
            inputs = [name for each in wanted for name in by_name[each].inputs]
            from_a, from_b = first(wanted), second(list(dict.fromkeys((*wanted, *inputs))))
            made = _references(b, token_ids, wanted, from_b)
            for name in wanted:
                x, y = from_a.get(name), from_b.get(name)
                total, cosine = (np.nan, np.nan) if x is None or y is None else (_relative(y, x), _cosine(x, y))
                own = _relative(y, made[name]) if y is not None and name in made else np.nan
                yield NodeError(name, by_name[name].op, total, cosine, own)


def _references(
    b: Tapped, token_ids: Sequence[int], wanted: Sequence[str], values: Mapping[str, Float32]
) -> dict[str, np.ndarray]:
    """What the reference ops make of B's values, node by node, where B shows all that they read."""
    made = {}
    for name in wanted:
        inputs = b.graph.node(name).inputs
        if all(each in values for each in inputs):
            made[name] = _one_node(b, token_ids, name, [values[each] for each in inputs])
    return made


def _one_node(b: Tapped, token_ids: Sequence[int], name: str, inputs: Sequence[Float32]) -> np.ndarray:
    node = b.graph.node(name)
    alone = Graph((node,), {each: b.graph.params[each] for each in node.params}, name)
    given = dict(zip(node.inputs, (torch.from_numpy(x).double() for x in inputs), strict=True))

    def params(*_: object) -> list[Tensor]:
        return [torch.from_numpy(np.array(b.weights[each].to_f32())).double() for each in node.params]

    with torch.inference_mode():
        return run_sequences(alone, torch.tensor([list(token_ids)]), params, given=given).numpy()


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    size = float(np.sqrt(np.mean(expected**2)))
    error = float(np.sqrt(np.mean((found - expected) ** 2)))
    return error / size if size > 0 else error


def _cosine(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.astype(np.float64), y.astype(np.float64)
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float((x * y).sum()) / norm if norm > 0 else 1.0

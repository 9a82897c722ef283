"""Nodes, parameters and graphs: frozen data, no behaviour beyond look-up and validation.

Every activation is a matrix ``[rows, features]``. Rows are either the tokens of the whole ragged batch, flattened, or
the rows of them that are sampled. A node has one output, which is known by the node's name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType


class Rows(StrEnum):
    """What the rows of an activation are."""

    TOKENS = "tokens"
    SAMPLED = "sampled"


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Rotary frequencies of one kind of layer, computed once from the model's config.

    Feature ``i`` of the first half of a head is rotated with feature ``i + rotary_dim / 2`` ("half" layout) by
    ``position * inv_freq[i]`` radians; cos and sin are multiplied by `scale` (YaRN's attention factor).
    """

    inv_freq: tuple[float, ...]
    scale: float = 1.0

    @property
    def rotary_dim(self) -> int:
        """Leading features of each head that are rotated; the rest pass through."""
        return 2 * len(self.inv_freq)


Attr = int | float | bool | str | RopeTable


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter by its canonical name: ``[out_features, in_features]`` for matrices, ``[features]`` for vectors.

    Its number format is not part of the graph: it follows from the checkpoint that is loaded.
    """

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """One op applied to earlier nodes' outputs.

    Attributes:
        name: in checkpoint terms, ``layers.3.attn.qkv``; unique in its graph; the name of its output value.
        op: a key of `headrace.graph.ops.OPS`.
        inputs: names of the nodes read.
        params: names of the parameters read; the op says their order.
        attrs: plain values; the op says which.
        rows: what the output's rows are.
        features: the output's columns.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    params: tuple[str, ...]
    attrs: Mapping[str, Attr]
    rows: Rows
    features: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "attrs", MappingProxyType(dict(self.attrs)))

    def integer(self, attr: str) -> int:
        """The attribute as an int; asserts its type."""
        value = self.attrs[attr]
        assert isinstance(value, int), f"{self.name}.{attr} is {value!r}, not an int"
        return value

    def number(self, attr: str) -> float:
        """The attribute as a float; asserts its type."""
        value = self.attrs[attr]
        assert isinstance(value, int | float), f"{self.name}.{attr} is {value!r}, not a number"
        return float(value)

    def text(self, attr: str) -> str:
        """The attribute as a string; asserts its type."""
        value = self.attrs[attr]
        assert isinstance(value, str), f"{self.name}.{attr} is {value!r}, not a string"
        return value

    def rope(self) -> RopeTable:
        """The attribute ``rope``; asserts its type."""
        value = self.attrs["rope"]
        assert isinstance(value, RopeTable), f"{self.name}.rope is {value!r}, not a RopeTable"
        return value


@dataclass(frozen=True, slots=True)
class KVLayer:
    """What one attention node keeps per token: keys and values of ``num_kv_heads * head_dim`` features each."""

    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes in an order in which they can run, the parameters they name, and the node whose output is the logits."""

    nodes: tuple[Node, ...]
    params: Mapping[str, Param]
    output: str
    _index: Mapping[str, Node] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", MappingProxyType(dict(self.params)))
        object.__setattr__(self, "_index", MappingProxyType({node.name: node for node in self.nodes}))

    def node(self, name: str) -> Node:
        """The node of that name; KeyError if there is none."""
        return self._index[name]

    @property
    def linear_matrices(self) -> tuple[str, ...]:
        """The parameters that linear layers multiply with, each once, in order; biases are not among them."""
        names = (name for node in self.nodes if node.op == "linear" for name in node.params[: node.integer("parts")])
        return tuple(dict.fromkeys(names))

    @property
    def logits_params(self) -> frozenset[str]:
        """The parameters of the node that makes the logits."""
        return frozenset(self.node(self.output).params)

    @property
    def kv_layers(self) -> tuple[KVLayer, ...]:
        """One entry per attention node, indexed by its ``layer`` attribute."""
        layers = {
            node.integer("layer"): KVLayer(node.integer("num_kv_heads"), node.integer("head_dim"))
            for node in self.nodes
            if node.op == "attention"
        }
        assert sorted(layers) == list(range(len(layers))), f"attention layers are numbered {sorted(layers)}"
        return tuple(layers[i] for i in range(len(layers)))

"""Write a graph down op by op; every call is checked against its op's shape rule as it is made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace.graph.ir import Attr, Graph, Node, Param, RopeTable, Rows
from headrace.graph.ops import Operand, output_of


@dataclass(frozen=True, slots=True)
class Value:
    """A node's output, as the handle that later calls read."""

    name: str
    rows: Rows
    features: int


class GraphBuilder:
    """Collects nodes in the order of the calls.

    Node names are given in full (``layers.3.attn.q``); parameters take their node's name: ``<node>.weight`` and
    ``<node>.bias``. Each method returns the new node's value and raises ValueError, naming the node, if its op does
    not take these operands.
    """

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        self._params: dict[str, Param] = {}

    def embed(self, name: str, vocab_size: int, features: int, *, scale: float = 1.0) -> Value:
        """Rows of a table ``<name>.weight`` [vocab_size, features] looked up by the step's token ids."""
        table = self._param(f"{name}.weight", (vocab_size, features))
        return self._node(name, "embed", (), (table,), {"scale": scale})

    def linear(self, name: str, x: Value, out_features: int, *, bias: bool = False, weight: str | None = None) -> Value:
        """``x @ Wᵀ``, plus a bias if asked; `weight` names another node's parameter to share (tied embeddings)."""
        params = [self._param(weight or f"{name}.weight", (out_features, x.features))]
        if bias:
            params.append(self._param(f"{name}.bias", (out_features,)))
        return self._node(name, "linear", (x,), params, {"parts": 1, "bias": bias})

    def rms_norm(self, name: str, x: Value, *, eps: float, group: int | None = None) -> Value:
        """Root-mean-square norm over runs of `group` features; by default over the whole row."""
        size = x.features if group is None else group
        return self._node(
            name, "rms_norm", (x,), (self._param(f"{name}.weight", (size,)),), {"eps": eps, "group": size}
        )

    def slice(self, name: str, x: Value, *, start: int, size: int) -> Value:
        """Columns ``start … start + size`` of x."""
        return self._node(name, "slice", (x,), (), {"start": start, "size": size})

    def add(self, name: str, a: Value, b: Value) -> Value:
        """``a + b``."""
        return self._node(name, "add", (a, b), (), {})

    def glu(self, name: str, gate: Value, up: Value, *, activation: str) -> Value:
        """``activation(gate) * up``."""
        return self._node(name, "glu", (gate, up), (), {"activation": activation})

    def rope(self, name: str, x: Value, *, head_dim: int, table: RopeTable) -> Value:
        """Every head of x rotated at its row's position."""
        return self._node(name, "rope", (x,), (), {"head_dim": head_dim, "rope": table})

    def attention(
        self,
        name: str,
        q: Value,
        k: Value,
        v: Value,
        *,
        layer: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        window: int = 0,
    ) -> Value:
        """Causal attention over the KV cache of `layer`, to which k and v are appended; `window` 0 is unlimited."""
        attrs: dict[str, Attr] = {
            "layer": layer,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "scale": scale,
            "window": window,
        }
        return self._node(name, "attention", (q, k, v), (), attrs)

    def select_rows(self, name: str, x: Value) -> Value:
        """The rows of x that the step samples."""
        return self._node(name, "select_rows", (x,), (), {})

    def build(self, output: Value) -> Graph:
        """The graph of everything called so far, each node checked when it was added, whose result is `output`."""
        if output.name not in self._nodes:
            raise ValueError(f"output {output.name!r} is not a node")
        return Graph(nodes=tuple(self._nodes.values()), params=self._params, output=output.name)

    def _param(self, name: str, shape: tuple[int, ...]) -> Param:
        param = self._params.setdefault(name, Param(name, shape))
        if param.shape != shape:
            raise ValueError(f"parameter {name} is {list(param.shape)}, and cannot be shared as {list(shape)}")
        return param

    def _node(
        self, name: str, op: str, inputs: Sequence[Value], params: Sequence[Param], attrs: Mapping[str, Attr]
    ) -> Value:
        if name in self._nodes:
            raise ValueError(f"node {name}: its name is taken")
        try:
            made = output_of(op, [Operand(value.rows, value.features) for value in inputs], params, attrs)
        except ValueError as error:
            raise ValueError(f"node {name}: {error}") from None
        self._nodes[name] = Node(
            name=name,
            op=op,
            inputs=tuple(value.name for value in inputs),
            params=tuple(param.name for param in params),
            attrs=attrs,
            rows=made.rows,
            features=made.features,
        )
        return Value(name, made.rows, made.features)

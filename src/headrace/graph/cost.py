"""What each node costs: arithmetic, and bytes moved, for a given amount of work and given number formats."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from headrace.graph.ir import Graph, Node, Rows


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceWork:
    """One sequence's part of a step: its last `new_tokens` positions are computed, `context_len` are then in the KV
    cache."""

    new_tokens: int
    context_len: int

    def __post_init__(self) -> None:
        assert 0 < self.new_tokens <= self.context_len, "a step computes the last tokens of its context"

    def pairs(self, window: int) -> int:
        """Query-key pairs that causal attention scores; `window` 0 is unlimited."""
        first, end = self.context_len - self.new_tokens, self.context_len
        if not window:
            return (first + 1 + end) * self.new_tokens // 2
        whole = max(0, end - max(first, window))  # queries that see a whole window; the others see all before them
        short = self.new_tokens - whole
        return whole * window + (first + 1 + first + short) * short // 2

    def keys(self, window: int) -> int:
        """Positions whose key is read by at least one query."""
        first = self.context_len - self.new_tokens
        return self.context_len - (max(0, first - window + 1) if window else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One step's work.

    Attributes:
        sequences: what it advances.
        sampled_rows: rows whose logits are wanted.
    """

    sequences: tuple[SequenceWork, ...]
    sampled_rows: int

    @classmethod
    def decode(cls, num_seqs: int, context_len: int) -> "Workload":
        """One token for each of some sequences."""
        return cls(sequences=(SequenceWork(new_tokens=1, context_len=context_len),) * num_seqs, sampled_rows=num_seqs)

    @classmethod
    def prefill(cls, num_tokens: int) -> "Workload":
        """A prompt from its start, and its first token."""
        return cls(sequences=(SequenceWork(new_tokens=num_tokens, context_len=num_tokens),), sampled_rows=1)

    def rows(self, kind: Rows) -> int:
        """How many rows an activation of that kind has."""
        return self.sampled_rows if kind is Rows.SAMPLED else sum(each.new_tokens for each in self.sequences)


@dataclass(frozen=True, kw_only=True, slots=True)
class Formats:
    """Bytes that numbers take.

    Attributes:
        param_bytes: of each whole parameter, as it is kept in memory.
        kv_element_bytes: of one element of a cached key or value.
        activation_element_bytes: of one element of an activation.
    """

    param_bytes: Mapping[str, int]
    kv_element_bytes: float = 2.0
    activation_element_bytes: float = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Arithmetic and traffic. A multiply-add is two FLOPs; one evaluation of exp or tanh counts as one.

    Attributes:
        flops: floating-point operations. Attention counts its two matrix products, not the softmax between them.
        weight_bytes: parameters read, once however many rows use them.
        activation_bytes: inputs read and output written, were each to go through memory.
        kv_bytes: cached keys and values read, once per sequence, and new ones written.
    """

    flops: float = 0.0
    weight_bytes: float = 0.0
    activation_bytes: float = 0.0
    kv_bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            flops=self.flops + other.flops,
            weight_bytes=self.weight_bytes + other.weight_bytes,
            activation_bytes=self.activation_bytes + other.activation_bytes,
            kv_bytes=self.kv_bytes + other.kv_bytes,
        )

    @property
    def memory_bytes(self) -> float:
        """What must come from memory even if every activation stays in cache."""
        return self.weight_bytes + self.kv_bytes


def total(costs: Iterable[Cost]) -> Cost:
    """The sum."""
    return sum(costs, Cost())


def graph_cost(graph: Graph, work: Workload, formats: Formats) -> Cost:
    """One step over the whole graph. A matrix that two nodes share is read by both."""
    return total(node_cost(graph, node, work, formats) for node in graph.nodes)


def node_cost(graph: Graph, node: Node, work: Workload, formats: Formats) -> Cost:
    """One step of one node of the graph. Views cost nothing."""
    if node.op == "slice":
        return Cost()
    rows = work.rows(node.rows)
    weights = sum(formats.param_bytes[param] for param in node.params)
    if node.op == "embed":  # reads only the rows that are looked up
        weights = weights * rows // graph.params[node.params[0]].shape[0]
    # Every op reads as many rows as it writes: selecting rows reads those it selects.
    moved = rows * (node.features + sum(graph.node(name).features for name in node.inputs))
    return Cost(
        flops=_flops(graph, node, rows, work),
        weight_bytes=weights,
        activation_bytes=moved * formats.activation_element_bytes,
        kv_bytes=_kv_elements(node, work) * formats.kv_element_bytes if node.op == "attention" else 0.0,
    )


def _kv_elements(node: Node, work: Workload) -> int:
    per_token = 2 * node.integer("num_kv_heads") * node.integer("head_dim")
    window = node.integer("window")
    return per_token * sum(each.keys(window) + each.new_tokens for each in work.sequences)


def _flops(graph: Graph, node: Node, rows: int, work: Workload) -> float:
    elements = rows * node.features
    match node.op:
        case "embed":
            return 0.0 if node.number("scale") == 1.0 else elements
        case "rms_norm":
            return 4.0 * elements  # square, sum, scale, weight
        case "linear":
            products = 2.0 * elements * graph.node(node.inputs[0]).features
            return products + elements if node.attrs["bias"] else products
        case "add":
            return elements
        case "glu":
            return elements * _GLU_FLOPS[node.text("activation")]
        case "rope":  # two products and their sum
            return 3.0 * elements * node.rope().rotary_dim / node.integer("head_dim")
        case "attention":
            pairs = sum(each.pairs(node.integer("window")) for each in work.sequences)
            return 4.0 * pairs * node.integer("num_heads") * node.integer("head_dim")
        case "select_rows":
            return 0.0
    raise AssertionError(f"op {node.op} has no cost")


_GLU_FLOPS = {"silu": 4.0, "gelu_tanh": 10.0}
"""Per element, with the product by `up`. silu: exp, add, divide. gelu_tanh: four for x + 0.044715 x³, a factor, tanh,
an addition and two products."""

"""The least time that a step can take on a machine, node by node and as a whole.

A node moves bytes and does arithmetic, and neither can go faster than the machine was seen to go:

    memory_seconds  = (weight bytes + KV bytes) / bandwidth(working set) / cpu_share
    compute_seconds = multiply-adds' FLOPs / rate(arithmetic) + other FLOPs / rate("f32"), / cpu_share
    node's seconds  = the larger of the two
    step's seconds  = the larger of the two sums over all nodes

- The working set is all that the step reads: each step reads the same weights again, so each byte comes from the cache
  level in which the whole of them lies, at the bandwidth measured by reading that much over and over.
- Activations are taken to stay in caches, at no cost: a lower bound that kernels approach for decode batches and that
  long prefill chunks, whose activations leave L2, do not.
- A multiply-add of linear and attention costs what `arithmetic` costs on all threads from registers. Everything else
  (norms, rotations, activations) is counted at the f32 rate of multiply-adds, although exp and division cost more.
- Sums over nodes assume that loading one node's weights may overlap another's arithmetic. `seconds_in_turn`, the sum of
  the nodes' own limits, is what remains if nodes wait for each other.
- Nothing is counted for barriers between nodes, sampling, scheduling or detokenization.

So the limit cannot be beaten by a better kernel, only by another format, another arithmetic, or fewer bytes. It can be
exceeded where the machine was measured while something else used it. (S. Williams, A. Waterman, D. Patterson,
"Roofline: an insightful visual performance model", CACM 52(4), 2009.)
"""

from dataclasses import dataclass

from headrace import _native
from headrace.graph.cost import Cost, Formats, Workload, node_cost
from headrace.graph.ir import Graph
from headrace.plan.machine import Machine

MATRIX_OPS = frozenset({"linear", "attention"})
DECODE_SEQUENCES = (1, 8, 64)
PREFILL_TOKENS = (512, 2048)


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeLimit:
    """One node's share of a step.

    Attributes:
        name, op: the node's.
        flops: floating-point operations, a multiply-add being two.
        bytes: weights and KV that it reads and writes.
        memory_seconds, compute_seconds: least time for each.
    """

    name: str
    op: str
    flops: float
    bytes: float
    memory_seconds: float
    compute_seconds: float

    @property
    def seconds(self) -> float:
        """The least time that the node takes by itself."""
        return max(self.memory_seconds, self.compute_seconds)

    @property
    def bound(self) -> str:
        """What takes it: "memory" or "compute"."""
        return "memory" if self.memory_seconds >= self.compute_seconds else "compute"

    @property
    def intensity(self) -> float:
        """FLOPs per byte; infinite for a node that moves none."""
        return self.flops / self.bytes if self.bytes else float("inf")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLimit:
    """A step's least time, if bytes and arithmetic of different nodes may overlap.

    Attributes:
        flops, bytes: of all nodes.
        memory_seconds, compute_seconds: sums over all nodes.
        seconds_in_turn: the sum of the nodes' own limits.
    """

    flops: float
    bytes: float
    memory_seconds: float
    compute_seconds: float
    seconds_in_turn: float

    @property
    def seconds(self) -> float:
        return max(self.memory_seconds, self.compute_seconds)

    @property
    def bound(self) -> str:
        """What takes it: "memory" or "compute"."""
        return "memory" if self.memory_seconds >= self.compute_seconds else "compute"


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadLimit:
    """A named workload at best: `tokens` of output (decode) or of prompt (prefill) a step, and the step's limit."""

    name: str
    tokens: int
    step: StepLimit

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step.seconds


def kernel_arithmetic(isa: str, activation: str = "auto", *, kind: str = "blocks") -> str:
    """What one multiply-add of a linear takes with that instruction set, precision of activations and kind of weight
    (`headrace.llm.loader.kernel_kind`), as `Machine.rate` reads it."""
    activation = _native.choose_activation(activation, isa)
    if isa == "amx" and kind in ("row_blocks", "byte_rows") and activation not in ("int16", "int8"):
        isa = "avx512_vnni"  # AMX's other kernels do not take them
    quantized = kind != "plain"
    if quantized and isa == "avx2" and activation in ("int16", "int8"):
        return activation
    if quantized and isa in ("avx512_vnni", "amx") and activation in ("int16", "int8"):
        if isa == "amx":  # inputs are 16 bits, and weights, too, but for what is 8 and those who ask for 8
            return "int8x4" if activation == "int16" and kind != "byte_rows" else "int8x2"
        return {"int16": "int8x2", "int8": "int8"}[activation]  # 16 bits are two products of 8
    if isa == "amx":
        return "bf16" if activation == "bf16" else "bf16x2"  # an f32 activation is two bf16 halves
    return "f32"


def node_limits(graph: Graph, work: Workload, formats: Formats, machine: Machine, arithmetic: str) -> list[NodeLimit]:
    """Each node's limit, in the graph's order; nodes that cost nothing (views) are left out.

    Raises InvalidRequestError for an arithmetic that the machine does not have.
    """
    costs = [(node, node_cost(graph, node, work, formats)) for node in graph.nodes]
    bandwidth = machine.bandwidth(sum(cost.memory_bytes for _, cost in costs)) * machine.cpu_share
    matrix, vector = (machine.rate(name) * machine.cpu_share for name in (arithmetic, "f32"))
    return [
        NodeLimit(
            name=node.name,
            op=node.op,
            flops=cost.flops,
            bytes=cost.memory_bytes,
            memory_seconds=cost.memory_bytes / bandwidth,
            compute_seconds=cost.flops / (matrix if node.op in MATRIX_OPS else vector),
        )
        for node, cost in costs
        if cost != Cost()
    ]


def step_limit(graph: Graph, work: Workload, formats: Formats, machine: Machine, arithmetic: str) -> StepLimit:
    """The least time of one step. Raises as `node_limits` does."""
    nodes = node_limits(graph, work, formats, machine, arithmetic)
    return StepLimit(
        flops=sum(node.flops for node in nodes),
        bytes=sum(node.bytes for node in nodes),
        memory_seconds=sum(node.memory_seconds for node in nodes),
        compute_seconds=sum(node.compute_seconds for node in nodes),
        seconds_in_turn=sum(node.seconds for node in nodes),
    )


def limits_for_model(
    graph: Graph, formats: Formats, machine: Machine, arithmetic: str, *, context_len: int = 256
) -> list[WorkloadLimit]:
    """The usual workloads at best: decoding 1, 8 and 64 sequences with `context_len` tokens each in the KV cache, and
    prompts of 512 and 2,048 tokens, each in one step."""
    works = {f"decode{n}": (n, Workload.decode(n, context_len)) for n in DECODE_SEQUENCES}
    works |= {f"prefill{n}": (n, Workload.prefill(n)) for n in PREFILL_TOKENS}
    return [
        WorkloadLimit(name=name, tokens=tokens, step=step_limit(graph, work, formats, machine, arithmetic))
        for name, (tokens, work) in works.items()
    ]

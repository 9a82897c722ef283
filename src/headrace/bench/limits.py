"""What this machine could do with a model at best: `headrace.plan` asked for batches, kinds of op, and matrices."""

from collections.abc import Mapping
from dataclasses import dataclass

from headrace.bench.workloads import Batch, least_steps
from headrace.graph.cost import Cost, Formats, Workload, node_cost
from headrace.graph.ir import Graph
from headrace.llm.loader import kernel_kind
from headrace.plan.machine import Machine
from headrace.plan.roofline import kernel_arithmetic, node_limits, step_limit

ALIKE = 0.1
"""Bandwidths closer than this share are one line in a picture."""


@dataclass(frozen=True, slots=True)
class Roofs:
    """Ceilings for the picture: bytes per second by working set, and operations per second by arithmetic."""

    bandwidths: Mapping[str, float]
    rates: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Least seconds of things to do with one model on one machine.

    Attributes:
        machine: as it was calibrated.
        graph, formats: the model, priced as it is stored.
        main_kind: which kernels most of its matrices take (`headrace.llm.loader.main_kernel_kind`).
        activation: in what precision linears read their input, as in `LLMConfig`.
        max_batched_tokens: tokens of one step.
    """

    machine: Machine
    graph: Graph
    formats: Formats
    main_kind: str
    activation: str
    max_batched_tokens: int

    @property
    def vocab_size(self) -> int:
        return self.graph.node(self.graph.output).features

    def arithmetic(self, format_name: str, in_features: int) -> str:
        """In what the kernels multiply a matrix of that format."""
        return kernel_arithmetic(self.machine.isa, self.activation, kind=kernel_kind(format_name, in_features))

    def step_seconds(self, work: Workload) -> float:
        """Of one step."""
        return step_limit(self.graph, work, self.formats, self.machine, self._main_arithmetic).seconds

    def batch_seconds(self, batch: Batch, cached: int = 0) -> float:
        """Of a batch on a perfect schedule, the first `cached` tokens of each prompt being in the prefix cache."""
        steps = least_steps(batch, self.max_batched_tokens, cached)
        return sum(count * self.step_seconds(work) for count, work in steps)

    def op_costs(self, work: Workload) -> dict[str, Cost]:
        """What a step costs, by kind of node."""
        costs: dict[str, Cost] = {}
        for node in self.graph.nodes:
            costs[node.op] = costs.get(node.op, Cost()) + node_cost(self.graph, node, work, self.formats)
        return costs

    def op_seconds(self, work: Workload) -> dict[str, float]:
        """Of the nodes of each kind in a step, one after the other; their activations come from the nearest cache."""
        seconds: dict[str, float] = {}
        for node in node_limits(self.graph, work, self.formats, self.machine, self._main_arithmetic):
            seconds[node.op] = seconds.get(node.op, 0.0) + node.seconds
        nearest = self.machine.bandwidth(0) * self.machine.cpu_share
        costs = self.op_costs(work)
        return {op: max(least, costs[op].activation_bytes / nearest) for op, least in seconds.items()}

    def matrix_seconds(
        self, format_name: str, in_features: int, flops: float, num_bytes: float, working_set: float
    ) -> float:
        """Of one product with a matrix of so many bytes, read from a working set of that size."""
        rate = self.machine.rate(self.arithmetic(format_name, in_features))
        return max(num_bytes / self.machine.bandwidth(working_set), flops / rate) / self.machine.cpu_share

    def roofs(self) -> Roofs:
        """Of all that was measured, what a picture has room for: the nearest and the farthest memory, and what one
        decoded token reads; and every arithmetic."""
        nearest, farthest = min(self.machine.read_bandwidth), max(self.machine.read_bandwidth)
        model = sum(cost.memory_bytes for cost in self.op_costs(Workload.decode(1, 1)).values())
        places: dict[str, float] = {}
        for size, name in ((nearest, ""), (model, " (the model)"), (farthest, "")):
            speed = self.machine.bandwidth(size)
            if all(abs(speed / other - 1) > ALIKE for other in places.values()):
                places[f"reads of {_size(size)}{name}"] = speed
        used = self._main_arithmetic
        return Roofs(places, {**self.machine.matrix_rate, f"{used} (used)": self.machine.rate(used)})

    @property
    def _main_arithmetic(self) -> str:
        return kernel_arithmetic(self.machine.isa, self.activation, kind=self.main_kind)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.0f} KiB"

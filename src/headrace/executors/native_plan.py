"""From a graph to a native plan: which ops run in which order, and where in the arena their values live.

Slices are views of what they slice. A value's bytes are given to later values once nothing reads it any more. Values
that one op alone reads, and nobody taps, are never written out: norms and gated units go straight into what the next
linear reads, a residual is added where the linear before it leaves its columns, queries and keys are turned when
attention takes them, and of logits only the highest is kept where that is all a step needs. The arithmetic is the same.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from headrace._native import Plan, Runtime, View
from headrace.executors.native_weights import PackedWeights
from headrace.graph.ir import Graph, Node, Rows

ALIGNMENT = 64
FLOAT_BYTES = 4


@dataclass(eq=False, slots=True)
class Buffer:
    """Bytes that an instruction writes and later ones read; `offset` is its place, once it has one."""

    num_bytes: int
    offset: int = -1


@dataclass(frozen=True, slots=True)
class Columns:
    """A node's output: columns ``start … start + features`` of a buffer of rows of `width` floats."""

    buffer: Buffer
    width: int
    start: int
    features: int
    rows: Rows

    def view(self) -> View:
        return View(
            begin=self.buffer.offset,
            end=self.buffer.offset + self.buffer.num_bytes,
            ld=self.width,
            column=self.start,
            features=self.features,
            sampled=self.rows is Rows.SAMPLED,
        )

    def part(self, start: int, features: int) -> "Columns":
        return Columns(self.buffer, self.width, self.start + start, features, self.rows)


@dataclass(frozen=True, slots=True)
class Instruction:
    """Ops to add to a plan once buffers have places."""

    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    emit: Callable[[Plan], None]


@dataclass(slots=True)
class CompiledPlan:
    """A native plan, and where it leaves the values that were asked for."""

    plan: Plan
    taps: Mapping[str, View]
    tap_rows: Mapping[str, Rows]


@dataclass(slots=True)
class _Lowering:
    """Instructions for a graph's nodes in order.

    `values` holds the outputs that exist as rows of floats; `converted` those that exist only as linears read them.
    `rotations` holds what attention has still to turn outputs by: their `values` are not turned yet.
    """

    graph: Graph
    weights: PackedWeights
    runtime: Runtime
    max_rows: Mapping[Rows, int]
    taps: Sequence[str]
    fuse: bool
    consumers: dict[str, list[Node]] = field(default_factory=dict)
    values: dict[str, Columns] = field(default_factory=dict)
    converted: dict[str, Buffer] = field(default_factory=dict)
    rotations: dict[str, int] = field(default_factory=dict)
    prepared: dict[tuple[int, int, int, tuple[int, ...]], Buffer] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)

    def run(self) -> None:
        rules: Mapping[str, Callable[[Node], None]] = {
            "embed": self._embed,
            "rms_norm": self._rms_norm,
            "linear": self._linear,
            "slice": self._slice,
            "add": self._add,
            "glu": self._glu,
            "rope": self._rope,
            "attention": self._attention,
            "select_rows": self._select_rows,
        }
        for node in self.graph.nodes:
            for name in node.inputs:
                self.consumers.setdefault(name, []).append(node)
        for node in self.graph.nodes:
            if not self._makes_logits_only(node):
                rules[node.op](node)
        self._sample(self.graph.node(self.graph.output))

    def _makes_logits_only(self, node: Node) -> bool:
        """Whether the node is a linear whose output only sampling reads."""
        return (
            self.fuse
            and node.name == self.graph.output
            and node.name not in self.taps
            and node.op == "linear"
            and node.integer("parts") == 1
            and node.name not in self.consumers
        )

    def _sample(self, node: Node) -> None:
        if not self._makes_logits_only(node):
            logits = self.values[node.name]
            self._append((logits,), (), lambda plan: plan.sample(logits.view()))
            return
        linear, bias = self.weights.linear(node.params[0]), self._bias(node, 0)
        prepared, out = self._prepared(linear, node.inputs[0]), self._output(node)

        def emit(plan: Plan) -> None:
            plan.sample_linear(*_span(prepared), linear, bias, out.view())

        self.instructions.append(Instruction((prepared,), (out.buffer,), emit))

    def _append(self, reads: Iterable[Columns], writes: Iterable[Columns], emit: Callable[[Plan], None]) -> None:
        self.instructions.append(
            Instruction(tuple(value.buffer for value in reads), tuple(value.buffer for value in writes), emit)
        )

    def _inputs(self, node: Node) -> list[Columns]:
        return [self.values[name] for name in node.inputs]

    def _output(self, node: Node) -> Columns:
        width = _round_up(node.features, ALIGNMENT // FLOAT_BYTES)
        buffer = Buffer(self.max_rows[node.rows] * width * FLOAT_BYTES)
        self.values[node.name] = Columns(buffer, width, 0, node.features, node.rows)
        return self.values[node.name]

    def _embed(self, node: Node) -> None:
        out, table, scale = self._output(node), self.weights.table(node.params[0]), node.number("scale")
        self._append((), (out,), lambda plan: plan.embed(table, scale, out.view()))

    def _rms_norm(self, node: Node) -> None:
        (x,), weight = self._inputs(node), self.weights.vector(node.params[0])
        group, eps = node.integer("group"), node.number("eps")
        if (linear := self._only_reader(node)) is not None:
            made = self._convert(node, linear)
            self._append_conversion(
                (x,), made, lambda plan: plan.norm_prepare(x.view(), weight, group, eps, linear, *_span(made))
            )
            return
        out = self._output(node)
        self._append((x,), (out,), lambda plan: plan.rms_norm(x.view(), weight, group, eps, out.view()))

    def _linear(self, node: Node) -> None:
        parts, residual = node.integer("parts"), None
        target = node
        if (sum_node := self._residual_sum(node)) is not None:
            target = sum_node
            residual = self.values[next(name for name in sum_node.inputs if name != node.name)]
        out, start = self._output(target), 0
        for i, name in enumerate(node.params[:parts]):
            linear, bias = self.weights.linear(name), self._bias(node, i)
            size = self.graph.params[name].shape[0]
            self._one_linear(linear, bias, node.inputs[0], residual, out.part(start, size))
            start += size

    def _one_linear(self, linear: int, bias: int, source: str, residual: Columns | None, out: Columns) -> None:
        prepared = self._prepared(linear, source)
        reads = (prepared,) if residual is None else (prepared, residual.buffer)

        def emit(plan: Plan) -> None:
            plan.linear(*_span(prepared), linear, bias, None if residual is None else residual.view(), out.view())

        self.instructions.append(Instruction(reads, (out.buffer,), emit))

    def _bias(self, node: Node, part: int) -> int:
        return self.weights.vector(node.params[node.integer("parts") + part]) if node.attrs["bias"] else -1

    def _only_reader(self, node: Node) -> int | None:
        """A linear that stands for all readers of the node, if they are linears and want the same form of it."""
        readers = self.consumers.get(node.name, []) if self.fuse else []
        if node.name in self.taps or not readers or any(reader.op != "linear" for reader in readers):
            return None
        linears = [self.weights.linear(name) for reader in readers for name in reader.params[: reader.integer("parts")]]
        return linears[0] if len({self.runtime.input_form(linear) for linear in linears}) == 1 else None

    def _is_turned_by_attention(self, node: Node) -> bool:
        readers = self.consumers.get(node.name, []) if self.fuse else []
        if node.name in self.taps or len(readers) != 1:
            return False
        return readers[0].op == "attention" and node.name in readers[0].inputs[:2]

    def _residual_sum(self, node: Node) -> Node | None:
        """The addition that alone reads this linear, if what it adds is there already."""
        readers = self.consumers.get(node.name, []) if self.fuse else []
        if node.name in self.taps or len(readers) != 1 or readers[0].op != "add" or node.integer("parts") != 1:
            return None
        others = [name for name in readers[0].inputs if name != node.name]
        return readers[0] if len(others) == 1 and others[0] in self.values else None

    def _convert(self, node: Node, linear: int) -> Buffer:
        made = Buffer(_round_up(self.runtime.prepared_bytes(linear, self.max_rows[node.rows]), ALIGNMENT))
        self.converted[node.name] = made
        return made

    def _append_conversion(self, reads: Iterable[Columns], made: Buffer, emit: Callable[[Plan], None]) -> None:
        self.instructions.append(Instruction(tuple(value.buffer for value in reads), (made,), emit))

    def _prepared(self, linear: int, source: str) -> Buffer:
        """The input converted to the form that the kernel wants; made once for all linears that want the same."""
        if source in self.converted:
            return self.converted[source]
        x = self.values[source]
        key = (id(x.buffer), x.start, x.features, self.runtime.input_form(linear))
        if key not in self.prepared:
            made = Buffer(_round_up(self.runtime.prepared_bytes(linear, self.max_rows[x.rows]), ALIGNMENT))
            self.prepared[key] = made
            self.instructions.append(
                Instruction((x.buffer,), (made,), lambda plan: plan.prepare(x.view(), linear, *_span(made)))
            )
        return self.prepared[key]

    def _slice(self, node: Node) -> None:
        (x,) = self._inputs(node)
        self.values[node.name] = x.part(node.integer("start"), node.integer("size"))

    def _add(self, node: Node) -> None:
        if node.name in self.values:  # made by the linear before it
            return
        (a, b), out = self._inputs(node), self._output(node)
        self._append((a, b), (out,), lambda plan: plan.add(a.view(), b.view(), out.view()))

    def _glu(self, node: Node) -> None:
        (gate, up), activation = self._inputs(node), node.text("activation")
        if (linear := self._only_reader(node)) is not None:
            made = self._convert(node, linear)
            self._append_conversion(
                (gate, up),
                made,
                lambda plan: plan.glu_prepare(activation, gate.view(), up.view(), linear, *_span(made)),
            )
            return
        out = self._output(node)
        self._append((gate, up), (out,), lambda plan: plan.glu(activation, gate.view(), up.view(), out.view()))

    def _rope(self, node: Node) -> None:
        head_dim, rotation = node.integer("head_dim"), self.weights.rotation(node.rope())
        if self._is_turned_by_attention(node):
            self.values[node.name], self.rotations[node.name] = self.values[node.inputs[0]], rotation
            return
        (x,), out = self._inputs(node), self._output(node)
        self._append((x,), (out,), lambda plan: plan.rope(x.view(), head_dim, rotation, out.view()))

    def _attention(self, node: Node) -> None:
        (q, k, v), out = self._inputs(node), self._output(node)
        layer, window, scale = node.integer("layer"), node.integer("window"), node.number("scale")
        heads, kv_heads, dim = node.integer("num_heads"), node.integer("num_kv_heads"), node.integer("head_dim")
        q_rotation, k_rotation = (self.rotations.get(name, -1) for name in node.inputs[:2])

        def emit(plan: Plan) -> None:
            turned = (q.view(), q_rotation, k.view(), k_rotation)
            plan.attention(*turned, v.view(), out.view(), layer, heads, kv_heads, dim, window, scale)

        self._append((q, k, v), (out,), emit)

    def _select_rows(self, node: Node) -> None:
        (x,), out = self._inputs(node), self._output(node)
        self._append((x,), (out,), lambda plan: plan.select_rows(x.view(), out.view()))


def compile_plan(
    graph: Graph,
    weights: PackedWeights,
    runtime: Runtime,
    max_rows: Mapping[Rows, int],
    taps: Sequence[str] = (),
    *,
    fuse: bool = True,
) -> CompiledPlan:
    """A plan for `graph` that leaves the values of the nodes `taps` readable until the next step.

    Reserves the arena that it needs; `max_rows` says how many rows of each kind a step may have. Without `fuse`, every
    node's value is written out.
    """
    lowering = _Lowering(graph, weights, runtime, max_rows, taps, fuse)
    lowering.run()
    kept = {name: lowering.values[name] for name in taps}
    runtime.reserve_arena(place(lowering.instructions, [value.buffer for value in kept.values()]))
    plan = Plan(runtime)
    for instruction in lowering.instructions:
        instruction.emit(plan)
    views = {name: value.view() for name, value in kept.items()}
    return CompiledPlan(plan, views, {name: value.rows for name, value in kept.items()})


def place(instructions: Sequence[Instruction], kept: Sequence[Buffer] = ()) -> int:
    """Give every buffer an offset such that buffers alive at the same time are apart; returns the bytes needed in all.

    A buffer lives from the instruction that first writes it through the last that touches it; `kept` ones to the end.
    """
    last_use: dict[Buffer, int] = {}
    for i, instruction in enumerate(instructions):
        for buffer in (*instruction.reads, *instruction.writes):
            last_use[buffer] = i
    for buffer in kept:
        last_use[buffer] = len(instructions)
    live: list[Buffer] = []
    total = 0
    for i, instruction in enumerate(instructions):
        for buffer in instruction.writes:
            if buffer.offset < 0:
                buffer.offset = _first_fit(live, buffer.num_bytes)
                total = max(total, buffer.offset + buffer.num_bytes)
                live.append(buffer)
        live = [buffer for buffer in live if last_use[buffer] > i]
    return total


def _first_fit(live: Iterable[Buffer], num_bytes: int) -> int:
    offset = 0
    for buffer in sorted(live, key=lambda buffer: buffer.offset):
        if buffer.offset - offset >= num_bytes:
            break
        offset = max(offset, buffer.offset + buffer.num_bytes)
    return offset


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _span(buffer: Buffer) -> tuple[int, int]:
    return buffer.offset, buffer.offset + buffer.num_bytes

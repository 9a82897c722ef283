"""A graph as text: one line per node, with layers that are alike shown once."""

from collections.abc import Iterable, Sequence

from headrace.graph.cost import Cost, Formats, Workload, graph_cost, node_cost
from headrace.graph.ir import Graph, Node

_HEADER = ("node", "op", "inputs", "params", "features", "FLOPs/token", "bytes/token")


def describe(graph: Graph, formats: Formats, *, context_len: int = 1024) -> str:
    """A table of the graph for people.

    FLOPs and bytes are those of decoding one token of one sequence with `context_len` tokens in the KV cache; bytes
    are what comes from memory (weights and KV). Layers equal in structure and cost share one entry.
    """
    work = Workload.decode(1, context_len)
    rows: list[tuple[str, ...]] = []
    for title, nodes in _sections(graph, work, formats):
        if title:
            rows.append((title,))
        indent = "  " if title else ""
        rows += [_row(graph, node, node_cost(graph, node, work, formats), indent) for node in nodes]
    whole = graph_cost(graph, work, formats)
    elements = sum(_elements(param.shape) for param in graph.params.values())
    stored = sum(formats.param_bytes[name] for name in graph.params)
    summary = (
        f"{len(graph.nodes)} nodes, {len(graph.params)} parameters: {quantity(elements)} elements in "
        f"{size(stored)}. One token at context {context_len}: {quantity(whole.flops)} FLOPs, "
        f"{size(whole.memory_bytes)} from memory ({size(whole.kv_bytes)} of it KV)."
    )
    return f"{_table(rows)}\n\n{summary}"


def layer_number(node: Node) -> int | None:
    """The layer that a node belongs to by its name, ``layers.<number>.``."""
    parts = node.name.split(".", 2)
    return int(parts[1]) if parts[0] == "layers" and len(parts) == 3 else None


def local_name(name: str) -> str:
    """A node's or parameter's name without its layer."""
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def quantity(value: float) -> str:
    """A number in three figures and a decimal prefix: 1234567 is ``1.23 M``."""
    prefixes = ["", "k", "M", "G", "T"]
    while value >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.3g} {prefixes[0]}".rstrip()


def size(num_bytes: float) -> str:
    """Bytes, in decimal units: 1234567 is ``1.23 MB``."""
    text = quantity(num_bytes)
    return f"{text}B" if " " in text else f"{text} B"


def _sections(graph: Graph, work: Workload, formats: Formats) -> Iterable[tuple[str, Sequence[Node]]]:
    """Runs of nodes outside layers under no title, and one run for each set of layers that are alike."""
    layers: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if (number := layer_number(node)) is not None:
            layers.setdefault(number, []).append(node)
    alike: dict[object, list[int]] = {}
    for number, nodes in layers.items():
        alike.setdefault(_likeness(graph, nodes, work, formats), []).append(number)
    first = min(layers, default=None)
    outside: list[Node] = []
    for node in graph.nodes:
        number = layer_number(node)
        if number is None:
            outside.append(node)
        elif number == first and node is layers[number][0]:
            yield "", outside
            outside = []
            for numbers in alike.values():
                yield _title(numbers), layers[numbers[0]]
    yield "", outside


def _likeness(graph: Graph, nodes: Sequence[Node], work: Workload, formats: Formats) -> object:
    """Equal for layers that differ in nothing but their number."""
    own = {node.name for node in nodes}
    return tuple(
        (
            local_name(node.name),
            node.op,
            tuple(local_name(name) if name in own else "" for name in node.inputs),
            tuple(graph.params[name].shape for name in node.params),
            tuple((key, value) for key, value in sorted(node.attrs.items()) if key != "layer"),
            node_cost(graph, node, work, formats),
        )
        for node in nodes
    )


def _title(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] + 1 == number:
            runs[-1].append(number)
        else:
            runs.append([number])
    spans = [f"layers.{run[0]}" + (f" … layers.{run[-1]}" if len(run) > 1 else "") for run in runs]
    return ", ".join(spans) + (f" ({len(numbers)} ×)" if len(numbers) > 1 else "")


def _row(graph: Graph, node: Node, cost: Cost, indent: str) -> tuple[str, ...]:
    layer = layer_number(node)

    def shown(name: str) -> str:
        if layer is None:
            return name
        return local_name(name) if layer_number(graph.node(name)) == layer else "(in)"

    return (
        indent + shown(node.name),
        node.op + _details(node),
        ", ".join(map(shown, node.inputs)),
        " ".join("×".join(map(str, graph.params[name].shape)) for name in node.params),
        str(node.features),
        quantity(cost.flops) if cost.flops else "",
        quantity(cost.memory_bytes) if cost.memory_bytes else "",
    )


def _details(node: Node) -> str:
    """The attributes that tell one node of an op from another."""
    match node.op:
        case "glu":
            return f" {node.text('activation')}"
        case "slice":
            return f" {node.integer('start')}+{node.integer('size')}"
        case "attention":
            heads = f" {node.integer('num_heads')}/{node.integer('num_kv_heads')} heads × {node.integer('head_dim')}"
            return heads + (f", window {node.integer('window')}" if node.integer("window") else "")
    return ""


def _elements(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns aligned, the last three to the right; a row of one cell spans them all."""
    full = [_HEADER, *(row for row in rows if len(row) > 1)]
    widths = [max(len(row[i]) for row in full) for i in range(len(_HEADER))]
    lines = []
    for row in (_HEADER, tuple("─" * width for width in widths), *rows):
        cells = [
            cell.rjust(width) if i >= 4 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append(row[0] if len(row) == 1 else "  ".join(cells).rstrip())
    return "\n".join(lines)

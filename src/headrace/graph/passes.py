"""Rewrites of a graph that do not change what it computes: graph in, graph out.

A fused linear keeps the matrices that it is made of as separate parameters, side by side, so a checkpoint is loaded
the same with or without fusion. What its members made are slices of it under their old names: taps, quantization
predicates and reports go on working.
"""

from collections.abc import Sequence

from headrace.graph.ir import Attr, Graph, Node
from headrace.graph.ops import validate


def fuse(graph: Graph) -> Graph:
    """Every fusion that is always worth having."""
    return fuse_gate_up(fuse_qkv(graph))


def fuse_qkv(graph: Graph) -> Graph:
    """One linear for the projections that feed attention."""
    return fuse_siblings(graph, ("q", "k", "v"), "qkv")


def fuse_gate_up(graph: Graph) -> Graph:
    """One linear for the two halves of a gated MLP."""
    return fuse_siblings(graph, ("gate", "up"), "gate_up")


def fuse_siblings(graph: Graph, members: Sequence[str], fused: str) -> Graph:
    """Merge linears ``<prefix>.<member>`` that read the same value into ``<prefix>.<fused>`` and slices of it.

    Where a prefix lacks a member, or its members read different values or differ in having a bias, nothing changes.
    Each output column is the same dot product as before, so the values are equal.
    """
    groups = {node.name: _siblings(graph, node, members) for node in graph.nodes}
    nodes: list[Node] = []
    done: set[str] = set()
    for node in graph.nodes:
        siblings = groups[node.name]
        if not siblings:
            nodes.append(node)
        elif node.name not in done:
            nodes += _merge(siblings, f"{node.name.rpartition('.')[0]}.{fused}")
            done.update(sibling.name for sibling in siblings)
    result = Graph(nodes=tuple(nodes), params=graph.params, output=graph.output)
    validate(result)
    return result


def dead_nodes(graph: Graph) -> tuple[str, ...]:
    """Names of nodes that the output does not depend on: work for nothing, and a sign of a mistake."""
    alive = {graph.output}
    for node in reversed(graph.nodes):
        if node.name in alive:
            alive.update(node.inputs)
    return tuple(node.name for node in graph.nodes if node.name not in alive)


def unused_params(graph: Graph) -> tuple[str, ...]:
    """Names of parameters that no node reads."""
    used = {param for node in graph.nodes for param in node.params}
    return tuple(name for name in graph.params if name not in used)


def _siblings(graph: Graph, node: Node, members: Sequence[str]) -> list[Node]:
    """The nodes to merge with this one, itself included, in the order of `members`; none if they cannot be."""
    prefix, _, last = node.name.rpartition(".")
    if last not in members or not prefix:
        return []
    try:
        siblings = [graph.node(f"{prefix}.{member}") for member in members]
    except KeyError:
        return []
    same = all(
        other.op == "linear" and other.inputs == node.inputs and other.attrs["bias"] == node.attrs["bias"]
        for other in siblings
    )
    return siblings if same and node.op == "linear" else []


def _merge(siblings: Sequence[Node], name: str) -> list[Node]:
    first = siblings[0]
    parts = [node.integer("parts") for node in siblings]
    weights = [param for node, count in zip(siblings, parts, strict=True) for param in node.params[:count]]
    biases = [param for node, count in zip(siblings, parts, strict=True) for param in node.params[count:]]
    attrs: dict[str, Attr] = {"parts": sum(parts), "bias": first.attrs["bias"]}
    features = sum(node.features for node in siblings)
    merged = [Node(name, "linear", first.inputs, (*weights, *biases), attrs, first.rows, features)]
    start = 0
    for node in siblings:
        cut: dict[str, Attr] = {"start": start, "size": node.features}
        merged.append(Node(node.name, "slice", (name,), (), cut, node.rows, node.features))
        start += node.features
    return merged

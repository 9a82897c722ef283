from dataclasses import replace

import numpy as np
import pytest

from headrace.graph.builder import GraphBuilder
from headrace.graph.ir import Graph, Node
from headrace.graph.ops import validate
from headrace.graph.passes import dead_nodes, fuse, fuse_qkv, fuse_siblings, unused_params

HIDDEN, VOCAB = 6, 10


def mlp(*, bias: bool = False, up_bias: bool | None = None, same_input: bool = True) -> Graph:
    g = GraphBuilder()
    x = g.embed("embed", VOCAB, HIDDEN)
    h = g.rms_norm("layers.0.mlp_norm", x, eps=1e-5)
    gate = g.linear("layers.0.mlp.gate", h, 8, bias=bias)
    up = g.linear("layers.0.mlp.up", h if same_input else x, 8, bias=bias if up_bias is None else up_bias)
    y = g.glu("layers.0.mlp.glu", gate, up, activation="silu")
    x = g.add("layers.0.mlp_add", x, g.linear("layers.0.mlp.down", y, HIDDEN))
    return g.build(g.linear("logits", g.select_rows("sampled", x), VOCAB))


def run(graph: Graph, params: dict[str, np.ndarray], ids: np.ndarray) -> dict[str, np.ndarray]:
    """The few ops used here, row by row as written in the table of ops."""
    values: dict[str, np.ndarray] = {}

    def compute(node: Node) -> np.ndarray:
        xs, ps = [values[name] for name in node.inputs], [params[name] for name in node.params]
        match node.op:
            case "embed":
                return ps[0][ids]
            case "rms_norm":
                return xs[0] / np.sqrt((xs[0] ** 2).mean(-1, keepdims=True) + node.number("eps")) * ps[0]
            case "linear":
                parts = node.integer("parts")
                bias = np.concatenate(ps[parts:]) if node.attrs["bias"] else 0.0
                return np.concatenate([xs[0] @ weight.T for weight in ps[:parts]], axis=1) + bias
            case "slice":
                return xs[0][:, node.integer("start") :][:, : node.integer("size")]
            case "glu":
                return xs[0] / (1 + np.exp(-xs[0])) * xs[1]
            case "add":
                return xs[0] + xs[1]
            case "select_rows":
                return xs[0][-1:]
        raise AssertionError(node.op)

    for node in graph.nodes:
        values[node.name] = compute(node)
    return values


@pytest.mark.parametrize("bias", [False, True])
def test_fusing_changes_no_value_and_no_name(bias):
    graph = mlp(bias=bias)
    fused = fuse(graph)
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(param.shape) for name, param in graph.params.items()}
    ids = rng.integers(0, VOCAB, 5)
    before, after = run(graph, params, ids), run(fused, params, ids)
    assert set(after) == {*before, "layers.0.mlp.gate_up"}
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


def test_one_linear_replaces_its_members():
    fused = fuse(mlp(bias=True))
    node = fused.node("layers.0.mlp.gate_up")
    assert node.features == 16
    assert node.params == tuple(f"layers.0.mlp.{part}.{kind}" for kind in ("weight", "bias") for part in ("gate", "up"))
    assert [n.name for n in fused.nodes if n.op == "linear"] == ["layers.0.mlp.gate_up", "layers.0.mlp.down", "logits"]
    assert fused.node("layers.0.mlp.up").op == "slice"
    assert fused.node("layers.0.mlp.up").attrs == {"start": 8, "size": 8}


def test_fusing_twice_changes_nothing_more():
    fused = fuse(mlp())
    assert fuse(fused) == fused


@pytest.mark.parametrize("graph", [mlp(same_input=False), mlp(bias=True, up_bias=False)])
def test_members_that_differ_are_left_alone(graph):
    assert fuse(graph) == graph


def test_a_prefix_without_all_members_is_left_alone():
    assert fuse_qkv(mlp()) == mlp()
    assert fuse_siblings(mlp(), ("gate", "up", "side"), "all") == mlp()


def test_dead_nodes_and_unused_params_are_found():
    graph = mlp()
    assert dead_nodes(fuse(graph)) == ()
    assert unused_params(graph) == ()
    shortened = replace(graph, output="layers.0.mlp.glu")
    validate(shortened)
    assert dead_nodes(shortened) == ("layers.0.mlp.down", "layers.0.mlp_add", "sampled", "logits")
    without = replace(graph, nodes=tuple(node for node in graph.nodes if node.name != "logits"), output="sampled")
    assert unused_params(without) == ("logits.weight",)

"""Costs against numbers worked out by hand."""

import pytest

from headrace.graph.builder import GraphBuilder
from headrace.graph.cost import Cost, Formats, SequenceWork, Workload, graph_cost, node_cost, total
from headrace.graph.ir import Graph, RopeTable


def small(*, window: int = 0, scale: float = 1.0, bias: bool = False) -> Graph:
    """Hidden 8, vocabulary 16, two query heads and one KV head of 4 features."""
    g = GraphBuilder()
    x = g.embed("embed", 16, 8, scale=scale)
    h = g.rms_norm("norm", x, eps=1e-5)
    qkv = g.linear("qkv", h, 16, bias=bias)
    q, k, v = (g.slice(n, qkv, start=s, size=w) for n, s, w in (("q", 0, 8), ("k", 8, 4), ("v", 12, 4)))
    q = g.rope("q_rope", q, head_dim=4, table=RopeTable((1.0, 0.5)))
    k = g.rope("k_rope", k, head_dim=4, table=RopeTable((1.0,)))
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
    y = g.attention("core", q, k, v, layer=0, **heads, scale=0.5, window=window)
    y = g.glu("glu", y, y, activation="silu")
    x = g.select_rows("sampled", g.add("sum", x, y))
    return g.build(g.linear("logits", x, 16, weight="embed.weight"))


# Two bytes an element, but one byte an element for the 16 x 8 table.
BYTES = {"embed.weight": 128, "norm.weight": 16, "qkv.weight": 256, "qkv.bias": 32}
FORMATS = Formats(param_bytes=BYTES, kv_element_bytes=2, activation_element_bytes=4)
# Three new tokens after two cached ones, and one new token after nine: four rows, two of them sampled.
WORK = Workload(
    sequences=(SequenceWork(new_tokens=3, context_len=5), SequenceWork(new_tokens=1, context_len=10)), sampled_rows=2
)


def cost_of(name: str, **options) -> Cost:
    graph = small(**options)
    return node_cost(graph, graph.node(name), WORK, FORMATS)


def cost(flops: float, weights: float, activations: float, kv: float = 0.0) -> Cost:
    return Cost(flops=flops, weight_bytes=weights, activation_bytes=activations, kv_bytes=kv)


def test_embed_reads_only_the_rows_looked_up():
    assert cost_of("embed") == cost(0, 128 * 4 / 16, 4 * 8 * 4)
    assert cost_of("embed", scale=2.0).flops == 4 * 8


def test_norm_add_glu_and_rope():
    assert cost_of("norm") == cost(4 * 4 * 8, 16, 4 * (8 + 8) * 4)
    assert cost_of("sum") == cost(4 * 8, 0, 4 * (8 + 8 + 8) * 4)
    assert cost_of("glu") == cost(4 * 8 * 4, 0, 4 * (8 + 8 + 8) * 4)
    assert cost_of("q_rope") == cost(3 * 4 * 8, 0, 4 * 16 * 4)
    assert cost_of("k_rope").flops == 3 * 4 * 2  # half of each head is rotated


def test_linear_reads_its_weights_once():
    assert cost_of("qkv") == cost(4 * 2 * 8 * 16, 256, 4 * (8 + 16) * 4)
    assert cost_of("qkv", bias=True) == cost(4 * (2 * 8 * 16 + 16), 256 + 32, 4 * (8 + 16) * 4)


def test_views_are_free():
    assert cost_of("k") == Cost()


def test_attention():
    pairs = (3 + 4 + 5) + 10
    kv = 2 * 4 * ((5 + 3) + (10 + 1)) * 2  # keys and values of 4 features, read and written, two bytes each
    assert cost_of("core") == cost(pairs * 2 * 4 * 2 * 2, 0, 4 * (8 + 4 + 4 + 8) * 4, kv)


def test_attention_in_a_window():
    pairs = (3 + 4 + 4) + 4
    kv = 2 * 4 * ((5 + 3) + (4 + 1)) * 2  # the first sequence's oldest query still sees position 0
    assert cost_of("core", window=4) == cost(pairs * 2 * 4 * 2 * 2, 0, 4 * (8 + 4 + 4 + 8) * 4, kv)


@pytest.mark.parametrize("window", [0, 1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize(("new", "context"), [(1, 1), (1, 9), (4, 4), (3, 9), (9, 9)])
def test_pairs_and_keys_count_what_causal_attention_sees(new, context, window):
    work = SequenceWork(new_tokens=new, context_len=context)
    seen = [(p, key) for p in range(context - new, context) for key in range(p + 1) if not window or key > p - window]
    assert work.pairs(window) == len(seen)
    assert work.keys(window) == len({key for _, key in seen})


def test_only_sampled_rows_are_projected():
    assert cost_of("logits") == cost(2 * 2 * 8 * 16, 128, 2 * (8 + 16) * 4)
    assert cost_of("sampled") == cost(0, 0, 2 * 16 * 4)


def test_the_graph_is_the_sum_of_its_nodes():
    graph = small()
    parts = [node_cost(graph, node, WORK, FORMATS) for node in graph.nodes]
    whole = graph_cost(graph, WORK, FORMATS)
    assert whole == total(parts)
    assert whole.weight_bytes == 32 + 16 + 256 + 128
    assert whole.memory_bytes == whole.weight_bytes + whole.kv_bytes


def test_workloads():
    assert Workload.decode(3, 7).sequences == (SequenceWork(new_tokens=1, context_len=7),) * 3
    assert Workload.decode(3, 7).sampled_rows == 3
    assert Workload.prefill(9) == Workload(sequences=(SequenceWork(new_tokens=9, context_len=9),), sampled_rows=1)

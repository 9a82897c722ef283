import pytest

from headrace.graph.builder import GraphBuilder
from headrace.graph.ir import Graph, KVLayer, RopeTable, Rows

ROPE = RopeTable((1.0, 0.5))


def one_layer(*, bias: bool = False, sampled: bool = True) -> Graph:
    """A layer of attention over 8 features, and logits that share the embedding."""
    g = GraphBuilder()
    x = g.embed("embed", 16, 8)
    h = g.rms_norm("layers.0.attn_norm", x, eps=1e-5)
    q = g.linear("layers.0.attn.q", h, 8, bias=bias)
    k = g.linear("layers.0.attn.k", h, 4, bias=bias)
    v = g.linear("layers.0.attn.v", h, 4, bias=bias)
    q = g.rope("layers.0.attn.q_rope", q, head_dim=4, table=ROPE)
    k = g.rope("layers.0.attn.k_rope", k, head_dim=4, table=ROPE)
    y = g.attention("layers.0.attn.core", q, k, v, layer=0, num_heads=2, num_kv_heads=1, head_dim=4, scale=0.5)
    x = g.add("layers.0.attn_add", x, g.linear("layers.0.attn.o", y, 8))
    if sampled:
        x = g.select_rows("sampled", x)
    return g.build(g.linear("logits", x, 16, weight="embed.weight"))


def test_nodes_carry_names_shapes_and_parameters():
    graph = one_layer(bias=True)
    q = graph.node("layers.0.attn.q")
    assert (q.op, q.inputs, q.features, q.rows) == ("linear", ("layers.0.attn_norm",), 8, Rows.TOKENS)
    assert q.params == ("layers.0.attn.q.weight", "layers.0.attn.q.bias")
    assert graph.params["layers.0.attn.k.weight"].shape == (4, 8)
    assert graph.node("logits").rows is Rows.SAMPLED
    assert graph.kv_layers == (KVLayer(num_kv_heads=1, head_dim=4),)


def test_tied_logits_share_the_table():
    graph = one_layer()
    assert graph.node("logits").params == ("embed.weight",)
    assert "logits.weight" not in graph.params


def test_sharing_a_parameter_of_another_shape_is_refused():
    g = GraphBuilder()
    x = g.embed("embed", 16, 8)
    with pytest.raises(ValueError, match=r"embed\.weight.*\[16, 8\].*\[12, 8\]"):
        g.linear("logits", x, 12, weight="embed.weight")


def test_a_call_that_breaks_its_rule_names_the_node():
    g = GraphBuilder()
    x = g.embed("embed", 16, 8)
    with pytest.raises(ValueError, match=r"node odd: group 3 does not divide 8"):
        g.rms_norm("odd", x, eps=1e-5, group=3)
    with pytest.raises(ValueError, match=r"node cut: slice 6\+4 leaves its input"):
        g.slice("cut", x, start=6, size=4)


def test_adding_sampled_rows_to_token_rows_is_refused():
    g = GraphBuilder()
    x = g.embed("embed", 16, 8)
    with pytest.raises(ValueError, match="operands differ"):
        g.add("sum", x, g.select_rows("sampled", x))


def test_a_name_is_taken_once():
    g = GraphBuilder()
    x = g.embed("embed", 16, 8)
    g.add("twice", x, x)
    with pytest.raises(ValueError, match="node twice: its name is taken"):
        g.add("twice", x, x)

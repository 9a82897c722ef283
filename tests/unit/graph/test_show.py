import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from headrace.base.errors import InvalidRequestError
from headrace.graph.cost import Formats
from headrace.graph.ir import Graph, RopeTable
from headrace.graph.passes import fuse
from headrace.graph.picture import layer_svg
from headrace.graph.show import describe, quantity, size
from headrace.models import LayerSpec, ModelSpec, build_graph

GLOBAL, LOCAL = LayerSpec(rope=RopeTable((1.0, 0.1))), LayerSpec(rope=RopeTable((1.0, 0.2)), window=4)
SPEC = ModelSpec(
    family="llama",
    vocab_size=64,
    hidden_size=8,
    intermediate_size=12,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    layers=(GLOBAL,) * 4,
    norm_eps=1e-5,
    max_position_embeddings=32,
    attention_scale=0.5,
)


def formats(graph: Graph) -> Formats:
    return Formats(param_bytes={name: 10 * len(param.shape) for name, param in graph.params.items()})


def titles(graph: Graph, given: Formats | None = None) -> list[str]:
    return re.findall(r"^layers.*$", describe(graph, given or formats(graph)), re.MULTILINE)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (100, "100"), (999.4, "999"), (999.6, "1 k"), (12_345, "12.3 k"), (1_234_567, "1.23 M")],
)
def test_quantities(value, text):
    assert quantity(value) == text


def test_sizes():
    assert size(12) == "12 B"
    assert size(96.6e6) == "96.6 MB"


def test_layers_that_are_alike_are_shown_once():
    graph = build_graph(SPEC)
    assert titles(graph) == ["layers.0 … layers.3 (4 ×)"]
    assert describe(graph, formats(graph)).count("attn.core") == 2  # its own line, and as an input of attn.o


def test_layers_that_differ_are_shown_apart():
    graph = build_graph(replace(SPEC, layers=(LOCAL, LOCAL, GLOBAL, LOCAL)))
    assert titles(graph) == ["layers.0 … layers.1, layers.3 (3 ×)", "layers.2"]
    assert "window 4" in describe(graph, formats(graph))


def test_a_layer_stored_in_another_format_is_shown_apart():
    graph = build_graph(SPEC)
    given = Formats(param_bytes={**formats(graph).param_bytes, "layers.3.mlp.down.weight": 99})
    assert titles(graph, given) == ["layers.0 … layers.2 (3 ×)", "layers.3"]


def test_the_table_has_a_line_for_every_node_outside_layers_and_of_one_layer():
    graph = fuse(build_graph(SPEC))
    text = describe(graph, formats(graph))
    inside = [node for node in graph.nodes if node.name.startswith("layers.0.")]
    outside = [node for node in graph.nodes if not node.name.startswith("layers.")]
    lines = [line for line in text.split("\n\n")[0].splitlines() if not line.startswith("layers")]
    assert len(lines) == 2 + len(inside) + len(outside)
    row = next(line for line in lines if line.split()[0] == "attn.qkv")
    assert row.split() == ["attn.qkv", "linear", "attn_norm", "8×8", "4×8", "4×8", "16", "256", "60"]
    assert f"{len(graph.nodes)} nodes" in text


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "post_norms": True}])
def test_the_picture_holds_every_node_and_edge_of_the_layer(fused, changes):
    graph = build_graph(replace(SPEC, **changes))
    graph = fuse(graph) if fused else graph
    svg = ElementTree.fromstring(layer_svg(graph, 2))
    texts = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    nodes = [node for node in graph.nodes if node.name.startswith("layers.2.")]
    for node in nodes:
        assert texts.count(node.name.removeprefix("layers.2.")) == 1
    assert "from layers.1.mlp_add" in texts
    paths = [element.get("class") for element in svg.iter("{http://www.w3.org/2000/svg}path")]
    assert paths.count("residual") == 2
    assert paths.count("edge") == sum(len(node.inputs) for node in nodes) - 2 + 1  # less residuals, and the way out


def test_boxes_of_the_picture_do_not_overlap():
    svg = ElementTree.fromstring(layer_svg(build_graph(SPEC), 0))
    boxes = [
        tuple(float(element.get(key, "")) for key in ("x", "y", "width", "height"))
        for element in svg.iter("{http://www.w3.org/2000/svg}rect")
        if "box" in (element.get("class") or "")
    ]
    width, height = float(svg.get("width", "")), float(svg.get("height", ""))
    for i, (x, y, w, h) in enumerate(boxes):
        assert x >= 0
        assert y >= 0
        assert x + w <= width
        assert y + h <= height
        for x2, y2, w2, h2 in boxes[i + 1 :]:
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(InvalidRequestError, match=r"no layer 4.*0 to 3"):
        layer_svg(build_graph(SPEC), 4)

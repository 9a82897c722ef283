"""One layer of a graph as an SVG: data flows down, branches stand side by side, residual edges pass on the right.

Boxes above or below several branches are as wide as the branches, so that every edge inside a layer is a straight line
down. Colors follow the reader's light or dark scheme.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from headrace.base.errors import InvalidRequestError
from headrace.graph.ir import Graph, Node
from headrace.graph.show import layer_number, local_name

_LANE, _BOX, _GAP, _MARGIN = 196, 48, 26, 28
"""Pixels: a lane's width, a box's height, the space between rows of boxes, the space around everything."""

_LANES = {"q": 0, "k": 1, "v": 2, "gate": 0, "up": 1}
"""Which branch a node stands in, by the first word of its last name: q, q_norm and q_rope share one."""

_STYLE = """
  .card { fill: #fcfcfb; } .box { stroke-width: 1.25; }
  .name { font: 600 13px ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace; fill: #1f2328; }
  .note { font: 12px system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif; fill: #59636e; }
  .title { font: 600 15px system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif; fill: #1f2328; }
  .edge, .residual { fill: none; stroke: #8b949e; stroke-width: 1.5; } .residual { stroke: #bf8700; }
  .tip { fill: #8b949e; } .residual-tip { fill: #bf8700; }
  .linear { fill: #ddf0ff; stroke: #4493f8; } .norm { fill: #dcf5e3; stroke: #3fa65a; }
  .attention { fill: #efe4ff; stroke: #9a6ee0; } .point { fill: #fff3d1; stroke: #c99a2e; }
  .view { fill: none; stroke: #8b949e; stroke-dasharray: 4 3; } .end { fill: none; stroke: #8b949e; }
  @media (prefers-color-scheme: dark) {
    .card { fill: #15191f; } .name, .title { fill: #e6edf3; } .note { fill: #9aa5b1; }
    .linear { fill: #12283f; } .norm { fill: #12301c; } .attention { fill: #281c40; } .point { fill: #33290e; }
  }
"""

_CLASSES = {
    "linear": "linear",
    "rms_norm": "norm",
    "attention": "attention",
    "rope": "point",
    "glu": "point",
    "add": "point",
    "slice": "view",
}


@dataclass(frozen=True, slots=True)
class _Box:
    """A node's place: center, width, top edge."""

    x: float
    width: float
    top: float

    @property
    def bottom(self) -> float:
        return self.top + _BOX


def layer_svg(graph: Graph, layer: int = 0) -> str:
    """The SVG document of one layer; InvalidRequestError if the graph has no such layer."""
    nodes = [node for node in graph.nodes if layer_number(node) == layer]
    if not nodes:
        count = len({layer_number(node) for node in graph.nodes} - {None})
        raise InvalidRequestError(f"The graph has no layer {layer}.", f"Layers are numbered 0 to {count - 1}.")
    own = {node.name for node in nodes}
    source = next(name for node in nodes for name in node.inputs if name not in own)
    boxes = _place(nodes, source)
    end = nodes[-1].name
    bottom = boxes[end].bottom + _GAP
    body = [_end(boxes[source], f"from {source}", f"{graph.node(source).features} features per token")]
    for node in nodes:
        straight = node.inputs[1:] if node.op == "add" else node.inputs  # an addition's first input goes around
        body += [_edge(boxes[name], boxes[node.name]) for name in straight]
    body += _residuals(nodes, boxes)
    body += [_draw(graph, node, boxes[node.name]) for node in nodes]
    x = boxes[end].x
    body.append(f'<path class="edge" d="M{x:g} {boxes[end].bottom:g}V{bottom:g}"/>{_tip(x, bottom, "tip")}')
    width, height = 2 * x + _MARGIN, bottom + _MARGIN
    title = f'<text class="title" x="{_MARGIN}" y="{_MARGIN + 8}">Layer {layer}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="Dataflow of layer {layer}">\n'
        f'<style>{_STYLE}</style>\n<rect class="card" width="100%" height="100%" rx="12"/>\n{title}\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _lane(node: Node) -> int | None:
    last = node.name.rpartition(".")[2]
    return _LANES.get(last.split("_")[0]) if last.partition("_")[2] in ("", "norm", "rope") else None


def _place(nodes: Sequence[Node], source: str) -> dict[str, _Box]:
    """Rows by longest path from the layer's input, columns by lane; a box beside lanes spans them."""
    ranks = {source: 0}
    for node in nodes:
        ranks[node.name] = 1 + max(ranks[name] for name in node.inputs)
    lanes = {node.name: lane for node in nodes if (lane := _lane(node)) is not None}
    span: dict[str, int] = {}
    for node in nodes:
        for name in node.inputs:
            if node.name in lanes and name not in lanes:
                span[name] = max(span.get(name, 1), lanes[node.name] + 1)
            if name in lanes and node.name not in lanes:
                span[node.name] = max(span.get(node.name, 1), lanes[name] + 1)
    middle = _MARGIN + 1.5 * _LANE
    boxes = {}
    for name, rank in ranks.items():
        top = _MARGIN + 26 + rank * (_BOX + _GAP)
        if name in lanes:
            count = 3 if name.rpartition(".")[0].endswith("attn") else 2
            boxes[name] = _Box(middle + (lanes[name] - (count - 1) / 2) * _LANE, _LANE - 20, top)
        else:
            lanes_wide = 1.25 if name == source else span.get(name, 1)
            boxes[name] = _Box(middle, lanes_wide * _LANE - 20, top)
    return boxes


def _residuals(nodes: Sequence[Node], boxes: dict[str, _Box]) -> list[str]:
    """The first input of each addition: past everything between, on the right."""
    right = max(box.x + box.width / 2 for box in boxes.values()) + 22
    drawn = []
    for node in nodes:
        if node.op == "add":
            start, end = boxes[node.inputs[0]], boxes[node.name]
            y0, y1, r = start.bottom - 16, end.top + 16, 14
            x0, x1 = start.x + start.width / 2, end.x + end.width / 2
            drawn.append(
                f'<path class="residual" d="M{x0:g} {y0:g}H{right - r:g}q{r} 0 {r} {r}V{y1 - r:g}q0 {r} -{r} {r}'
                f'H{x1 + 2:g}"/><path class="residual-tip" d="M{x1:g} {y1:g}l8 -4.5v9z"/>'
            )
    return drawn


def _edge(start: _Box, end: _Box) -> str:
    """Straight down, in the lane of the narrower box."""
    x = start.x if start.width <= end.width else end.x
    return f'<path class="edge" d="M{x:g} {start.bottom:g}V{end.top - 2:g}"/>{_tip(x, end.top, "tip")}'


def _tip(x: float, y: float, style: str) -> str:
    return f'<path class="{style}" d="M{x:g} {y:g}l-4.5 -8h9z"/>'


def _draw(graph: Graph, node: Node, box: _Box) -> str:
    style = _CLASSES.get(node.op, "end")
    return _rect(box, style, 8) + _text(box, local_name(node.name), _note(graph, node))


def _end(box: _Box, name: str, note: str) -> str:
    return _rect(box, "end", _BOX / 2) + _text(box, name, note)


def _rect(box: _Box, style: str, radius: float) -> str:
    left = box.x - box.width / 2
    return (
        f'<rect class="box {style}" x="{left:g}" y="{box.top:g}" width="{box.width:g}" height="{_BOX}" '
        f'rx="{radius:g}"/>'
    )


def _text(box: _Box, name: str, note: str) -> str:
    return (
        f'<text class="name" x="{box.x:g}" y="{box.top + 20:g}" text-anchor="middle">{escape(name)}</text>'
        f'<text class="note" x="{box.x:g}" y="{box.top + 37:g}" text-anchor="middle">{escape(note)}</text>'
    )


def _note(graph: Graph, node: Node) -> str:
    """The op and its shape, in the words of the field."""
    match node.op:
        case "linear":
            rows = " + ".join(str(graph.params[name].shape[0]) for name in node.params[: node.integer("parts")])
            bias = ", bias" if node.attrs["bias"] else ""
            return f"linear · {graph.node(node.inputs[0]).features} → {rows}{bias}"
        case "rms_norm":
            group = node.integer("group")
            return f"rms_norm · {group}" if group == node.features else f"rms_norm · {node.features // group} × {group}"
        case "slice":
            return f"slice · {node.integer('start')} … {node.integer('start') + node.integer('size') - 1}"
        case "rope":
            return f"rope · {node.features // node.integer('head_dim')} × {node.integer('head_dim')}"
        case "glu":
            return f"{node.text('activation')}(gate) * up · {node.features}"
        case "attention":
            heads, dim = node.integer("num_heads"), node.integer("head_dim")
            window = node.integer("window")
            reach = f"window {window}" if window else "all positions"
            return f"attention · {heads} × {dim} over a KV cache of {node.integer('num_kv_heads')} × {dim}, {reach}"
    return f"{node.op} · {node.features}"

"""Running a graph node by node over whole sequences, with a look at what each node is about to read.

The reference ops, but for attention: no cache, the sequences of a batch have one length, each attends to itself.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.executors.torch_ops import REFERENCE_OPS, Batch, Call
from headrace.graph.ir import Graph, Node, Rows

Visit = Callable[[Node, Sequence[Tensor]], Sequence[Tensor]]
"""(a node, its inputs ``[tokens, features]``) to the parameters that it shall run with."""


@torch.inference_mode()
def walk(graph: Graph, token_ids: np.ndarray, visit: Visit) -> Tensor:
    """Evaluate a graph on n sequences of l tokens, int ``[n, l]``.

    Every node is visited once, in the graph's order, with what it reads. Returns the output of the last node: rows are
    all n * l tokens, whatever the graph samples.
    """
    num_sequences, length = token_ids.shape
    ids = torch.from_numpy(token_ids.astype(np.int64)).reshape(-1)
    positions = torch.arange(length).repeat(num_sequences)
    rows = torch.arange(len(ids))
    batch = Batch(token_ids=ids, positions=positions, slots=rows, sample_rows=rows, sequences=(), kv=())
    last_reader = {name: node.name for node in graph.nodes for name in (node.name, *node.inputs)}
    live: dict[str, Tensor] = {}
    for node in graph.nodes:
        inputs = [live[name] for name in node.inputs]
        params = visit(node, inputs)
        if node.op == "attention":
            live[node.name] = _attend(node, inputs, num_sequences)
        else:
            live[node.name] = REFERENCE_OPS[node.op](Call(node, inputs, params, batch))
        if node.name == graph.output:
            break
        for name in {node.name, *node.inputs}:
            if last_reader[name] == node.name:
                del live[name]
    return live[graph.output]


def _attend(node: Node, inputs: Sequence[Tensor], num_sequences: int) -> Tensor:
    head_dim = node.integer("head_dim")

    def heads(x: Tensor) -> Tensor:  # [n, heads, l, head_dim]
        return x.reshape(num_sequences, -1, x.shape[1] // head_dim, head_dim).transpose(1, 2)

    q, k, v = map(heads, inputs)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask, window = None, node.integer("window")
    if window:
        at = torch.arange(q.shape[2])
        mask = (at[None] <= at[:, None]) & (at[None] > at[:, None] - window)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=node.number("scale"))
    return y.transpose(1, 2).reshape(len(inputs[0]), -1)


def tokens_only(graph: Graph) -> Graph:
    """The graph up to where rows are sampled: what calibration has to run if the logits' matrix is left alone."""
    nodes = tuple(node for node in graph.nodes if node.rows is Rows.TOKENS)
    names = {name for node in nodes for name in node.params}
    return Graph(nodes, {name: param for name, param in graph.params.items() if name in names}, nodes[-1].name)

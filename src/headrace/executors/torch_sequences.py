"""Running a graph node by node over whole sequences, differentiably, with a say in what each node runs with.

The reference ops, but for attention: no cache, the sequences of a batch have one length, each attends to itself.
Calibration looks at what nodes read; training runs with other parameters than those it keeps.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headrace.executors.torch_ops import REFERENCE_OPS, Batch, Call
from headrace.graph.ir import Graph, Node, Rows
from headrace.numerics.tensor import RawTensor

Visit = Callable[[Node, Sequence[Tensor]], Sequence[Tensor]]
"""(a node, its inputs ``[tokens, features]``) to the parameters that it shall run with."""


def run_sequences(
    graph: Graph,
    token_ids: Tensor,
    visit: Visit,
    *,
    checkpointed: bool = False,
    given: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Evaluate a graph on n sequences of l tokens.

    Args:
        graph: what to run; its rows are all n * l tokens, whatever it samples.
        token_ids: int64 ``[n, l]``, on any device.
        visit: called for every node once, in the graph's order, with what the node reads.
        checkpointed: keep values between layers only, and compute a layer again for its gradients (`visit` is called
            again, too): less memory, a forward pass more.
        given: values of nodes that are not in the graph, for a piece of one.

    Returns:
        The graph's output, ``[n * l, features]``.
    """
    num_sequences, length = token_ids.shape
    positions = torch.arange(length, device=token_ids.device).repeat(num_sequences)
    rows = torch.arange(num_sequences * length, device=token_ids.device)
    batch = Batch(
        token_ids=token_ids.reshape(-1), positions=positions, slots=rows, sample_rows=rows, sequences=(), kv=()
    )
    last_reader = {name: i for i, node in enumerate(graph.nodes) for name in (node.name, *node.inputs)}

    def run(begin: int, end: int, names: Sequence[str], values: Sequence[Tensor]) -> list[Tensor]:
        """Nodes [begin, end) on the values of those names; the values that nodes behind them read."""
        live = dict(zip(names, values, strict=True))
        for i in range(begin, end):
            node = graph.nodes[i]
            inputs = [live[name] for name in node.inputs]
            params = visit(node, inputs)
            if node.op == "attention":
                live[node.name] = _attend(node, inputs, num_sequences)
            else:
                live[node.name] = REFERENCE_OPS[node.op](Call(node, inputs, params, batch))
            for name in {node.name, *node.inputs}:
                if last_reader[name] == i and name != graph.output:
                    del live[name]
        return list(live.values())

    names, values = list(given or ()), list((given or {}).values())
    for begin, end in _layers(graph) if checkpointed else [(0, len(graph.nodes))]:
        outer = [
            name
            for name in dict.fromkeys((*names, *(node.name for node in graph.nodes[begin:end])))
            if last_reader.get(name, -1) >= end or name == graph.output
        ]
        if checkpointed:
            values = checkpoint(run, begin, end, names, values, use_reentrant=False, preserve_rng_state=False)
        else:
            values = run(begin, end, names, values)
        names = outer
    (output,) = values
    return output


def _layers(graph: Graph) -> Iterator[tuple[int, int]]:
    """Runs of nodes of one layer, and of none."""

    def layer(node: Node) -> str:
        return ".".join(node.name.split(".")[:2]) if node.name.startswith("layers.") else ""

    begin = 0
    for i in range(1, len(graph.nodes) + 1):
        if i == len(graph.nodes) or layer(graph.nodes[i]) != layer(graph.nodes[begin]):
            yield begin, i
            begin = i


def _attend(node: Node, inputs: Sequence[Tensor], num_sequences: int) -> Tensor:
    head_dim = node.integer("head_dim")

    def heads(x: Tensor) -> Tensor:  # [n, heads, l, head_dim]
        return x.reshape(num_sequences, -1, x.shape[1] // head_dim, head_dim).transpose(1, 2)

    q, k, v = map(heads, inputs)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask, window = None, node.integer("window")
    if window:
        at = torch.arange(q.shape[2], device=q.device)
        mask = (at[None] <= at[:, None]) & (at[None] > at[:, None] - window)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=node.number("scale"))
    return y.transpose(1, 2).reshape(len(inputs[0]), -1)


def tokens_only(graph: Graph) -> Graph:
    """The graph up to where rows are sampled: what calibration has to run if the logits' matrix is left alone."""
    nodes = tuple(node for node in graph.nodes if node.rows is Rows.TOKENS)
    names = {name for node in nodes for name in node.params}
    return Graph(nodes, {name: param for name, param in graph.params.items() if name in names}, nodes[-1].name)


def used_rows(token_ids: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """Which tokens occur, int64 ascending, and the same sequences by their places among these.

    A graph runs on places as on tokens, if its embedding table has only those rows (`decoded`): the whole of a large
    one, in f32, would take more than anything else.
    """
    used, places = np.unique(token_ids, return_inverse=True)
    return used.astype(np.int64), torch.from_numpy(places.reshape(token_ids.shape))


def decoded(weights: Mapping[str, RawTensor], node: Node, used: np.ndarray) -> list[Tensor]:
    """A node's parameters in f32, of an embedding table the rows of `used_rows`."""
    tensors = (weights[name] for name in node.params)
    return [as_tensor(tensor.rows(used) if node.op == "embed" else tensor) for tensor in tensors]


def as_tensor(tensor: RawTensor) -> Tensor:
    """A tensor's values in f32, copied only if they lie in a file that is not to be written to."""
    values = tensor.to_f32()
    return torch.from_numpy(values if values.flags.writeable else values.copy())

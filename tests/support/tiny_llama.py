"""A random llama too small to mean anything, its weights made by hand in chosen number formats."""

from collections.abc import Mapping, Sequence

import numpy as np

from headrace.graph.builder import GraphBuilder, Value
from headrace.graph.ir import Graph, RopeTable
from headrace.numerics.tensor import RawTensor
from tests.support.raw_tensors import quantized

VOCAB = 96
HIDDEN = 64
HEAD_DIM = 16
NUM_HEADS, NUM_KV_HEADS = 4, 2
ROPE = RopeTable(tuple(100.0 ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)))


def tiny_llama(num_layers: int = 2, window: int = 0) -> Graph:
    """Two layers, grouped-query attention; every second layer sees only `window` tokens, if one is given."""
    g = GraphBuilder()
    x = g.embed("embed", VOCAB, HIDDEN)
    for i in range(num_layers):
        x = _layer(g, x, f"layers.{i}", i, window if i % 2 else 0)
    x = g.select_rows("last", g.rms_norm("norm", x, eps=1e-5))
    return g.build(g.linear("logits", x, VOCAB))


def _layer(g: GraphBuilder, x: Value, name: str, layer: int, window: int) -> Value:
    h = g.rms_norm(f"{name}.attn_norm", x, eps=1e-5)
    q, k, v = (
        g.linear(f"{name}.{part}", h, heads * HEAD_DIM)
        for part, heads in (("q", NUM_HEADS), ("k", NUM_KV_HEADS), ("v", NUM_KV_HEADS))
    )
    core = g.attention(
        f"{name}.attn",
        g.rope(f"{name}.q_rope", q, head_dim=HEAD_DIM, table=ROPE),
        g.rope(f"{name}.k_rope", k, head_dim=HEAD_DIM, table=ROPE),
        v,
        layer=layer,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        scale=HEAD_DIM**-0.5,
        window=window,
    )
    x = g.add(f"{name}.attn_add", x, g.linear(f"{name}.o", core, HIDDEN))
    h = g.rms_norm(f"{name}.mlp_norm", x, eps=1e-5)
    gate, up = g.linear(f"{name}.gate", h, 2 * HIDDEN), g.linear(f"{name}.up", h, 2 * HIDDEN)
    down = g.linear(f"{name}.down", g.glu(f"{name}.glu", gate, up, activation="silu"), HIDDEN)
    return g.add(f"{name}.mlp_add", x, down)


def random_weights(graph: Graph, formats: Sequence[str] = ("f32",), seed: int = 0) -> Mapping[str, RawTensor]:
    """Matrices of unit gain, their formats taken in turn; vectors around one."""
    rng = np.random.default_rng(seed)
    weights: dict[str, RawTensor] = {}
    for i, param in enumerate(graph.params.values()):
        values = rng.standard_normal(param.shape).astype(np.float32)
        if len(param.shape) == 1:
            weights[param.name] = RawTensor.from_f32(1 + 0.1 * values)
        else:
            # Outer layers louder: random logits must differ, and differ by context.
            gain = 3.0 if "logits" in param.name or "embed" in param.name else 1.5
            weights[param.name] = quantized(gain * values / param.shape[1] ** 0.5, formats[i % len(formats)])
    return weights

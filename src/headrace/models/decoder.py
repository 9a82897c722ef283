"""The one decoder that every family shares: its graph, and where its parameters lie in a checkpoint."""

from collections.abc import Callable, Mapping

from headrace.graph.builder import GraphBuilder, Value
from headrace.graph.ir import Graph
from headrace.models.sources import Source
from headrace.models.spec import LayerSpec, ModelSpec


def build_graph(spec: ModelSpec) -> Graph:
    """Token ids to logits of the sampled rows.

    The sampled rows are selected before the final norm, so that no other row is normalized or projected.
    """
    g = GraphBuilder()
    x = g.embed("embed", spec.vocab_size, spec.hidden_size, scale=spec.embed_scale)
    for i, layer in enumerate(spec.layers):
        x = g.add(f"layers.{i}.attn_add", x, _attention(g, spec, layer, i, x))
        x = g.add(f"layers.{i}.mlp_add", x, _mlp(g, spec, i, x))
    x = g.select_rows("sampled", x)
    x = g.rms_norm("final_norm", x, eps=spec.norm_eps)
    tied = "embed.weight" if spec.tie_embeddings else None
    return g.build(g.linear("logits", x, spec.vocab_size, weight=tied))


def _attention(g: GraphBuilder, spec: ModelSpec, layer: LayerSpec, i: int, x: Value) -> Value:
    name, head_dim = f"layers.{i}.attn", spec.head_dim

    def project(part: str, num_heads: int) -> Value:
        return g.linear(f"{name}.{part}", h, num_heads * head_dim, bias=spec.qkv_bias)

    def rotate(part: str, y: Value) -> Value:
        if spec.qk_norm:
            y = g.rms_norm(f"{name}.{part}_norm", y, eps=spec.norm_eps, group=head_dim)
        return g.rope(f"{name}.{part}_rope", y, head_dim=head_dim, table=layer.rope)

    h = g.rms_norm(f"{name}_norm", x, eps=spec.norm_eps)
    q, k, v = project("q", spec.num_heads), project("k", spec.num_kv_heads), project("v", spec.num_kv_heads)
    y = g.attention(
        f"{name}.core",
        rotate("q", q),
        rotate("k", k),
        v,
        layer=i,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=head_dim,
        scale=spec.attention_scale,
        window=layer.window,
    )
    y = g.linear(f"{name}.o", y, spec.hidden_size, bias=spec.o_bias)
    return g.rms_norm(f"{name}_post_norm", y, eps=spec.norm_eps) if spec.post_norms else y


def _mlp(g: GraphBuilder, spec: ModelSpec, i: int, x: Value) -> Value:
    name = f"layers.{i}.mlp"
    h = g.rms_norm(f"{name}_norm", x, eps=spec.norm_eps)
    gate = g.linear(f"{name}.gate", h, spec.intermediate_size, bias=spec.mlp_bias)
    up = g.linear(f"{name}.up", h, spec.intermediate_size, bias=spec.mlp_bias)
    y = g.glu(f"{name}.glu", gate, up, activation=spec.activation)
    y = g.linear(f"{name}.down", y, spec.hidden_size, bias=spec.mlp_bias)
    return g.rms_norm(f"{name}_post_norm", y, eps=spec.norm_eps) if spec.post_norms else y


HF_NAMES: Mapping[str, str] = {
    "embed": "embed_tokens",
    "final_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
"""Canonical node (without its layer) to the module that holds its parameters in a llama-like Hugging Face model."""

GGUF_NAMES: Mapping[str, str] = {
    "embed": "token_embd",
    "final_norm": "output_norm",
    "logits": "output",
    "attn_norm": "attn_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "attn_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "mlp_post_norm": "post_ffw_norm",
}
"""Canonical node to tensor name in GGUF, which is the same for every family."""

Rule = Callable[[str, Source], Source]
"""A family's delta: (canonical node without its layer, source) to the source, transformed where that family stores
its tensor differently."""


def hf_sources(
    spec: ModelSpec, *, names: Mapping[str, str] = HF_NAMES, rule: Rule | None = None
) -> Mapping[str, Source]:
    """Every parameter of the spec's graph to its tensor in Hugging Face format."""

    def stored(layer: int | None, node: str) -> str:
        if node == "logits":
            return ("language_model." if spec.tensor_prefix.startswith("language_model.") else "") + "lm_head"
        return spec.tensor_prefix + ("" if layer is None else f"layers.{layer}.") + names[node]

    return _sources(spec, stored, rule)


def gguf_sources(spec: ModelSpec, *, rule: Rule | None = None) -> Mapping[str, Source]:
    """Every parameter of the spec's graph to its tensor in GGUF."""

    def stored(layer: int | None, node: str) -> str:
        return ("" if layer is None else f"blk.{layer}.") + GGUF_NAMES[node]

    return _sources(spec, stored, rule)


def _sources(spec: ModelSpec, stored: Callable[[int | None, str], str], rule: Rule | None) -> Mapping[str, Source]:
    sources = {}
    for name in build_graph(spec).params:
        node, _, kind = name.rpartition(".")
        layer = None
        if node.startswith("layers."):
            _, number, node = node.split(".", 2)
            layer = int(number)
        source = Source(f"{stored(layer, node)}.{kind}")
        sources[name] = rule(node, source) if rule else source
    return sources

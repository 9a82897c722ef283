"""What a decoder model is: the numbers and switches that its graph is built from."""

from dataclasses import dataclass

from headrace.graph.ir import RopeTable


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """What may differ from layer to layer.

    Attributes:
        rope: the rotary frequencies of its queries and keys.
        window: how many positions back a query sees, itself included; 0: all of them.
    """

    rope: RopeTable
    window: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A decoder-only transformer. A field that is off by default is some family's delta from llama.

    Attributes:
        family: the registered family that reads and names its checkpoints.
        layers: one entry per layer.
        intermediate_size: features between the two halves of the MLP.
        max_position_embeddings: positions the model was made for: the longest context.
        attention_scale: factor of q·k.
        activation: of the MLP's gate: ``silu`` or ``gelu_tanh``.
        tie_embeddings: the logits' matrix is the embedding table.
        embed_scale: factor of the embedding rows.
        qkv_bias: biases on the q, k and v projections.
        o_bias: a bias on the attention's output projection.
        mlp_bias: biases on the MLP's three projections.
        qk_norm: each head of q and k is normalized before rotation.
        post_norms: what attention and MLP produce is normalized before it joins the residual stream.
        tensor_prefix: what Hugging Face tensor names begin with where the decoder is part of a larger model.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    max_position_embeddings: int
    attention_scale: float
    activation: str = "silu"
    tie_embeddings: bool = False
    embed_scale: float = 1.0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    tensor_prefix: str = "model."

    @property
    def num_layers(self) -> int:
        return len(self.layers)

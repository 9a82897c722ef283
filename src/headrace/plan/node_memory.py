"""What of a model fits where: weights, KV and activations on each GPU of a node, and the memory of training."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from headrace.base.errors import InvalidRequestError
from headrace.executors.kv_layout import KV_FORMATS, kv_bytes_per_value
from headrace.graph.ir import KVLayer
from headrace.plan.parameters import ModelShape

GPUS: Mapping[str, int] = {
    "rtx4090": 24, "l40s": 48, "a100": 80, "h100": 80, "h200": 141, "b200": 180, "mi300x": 192, "mi325x": 256,
}  # fmt: skip
"""Memory by name, in units of 10^9 bytes, as their vendors state it."""

NODES = (1, 2, 4, 8, 16, 32)
"""GPUs that the smallest node is looked for among."""

WEIGHT_BITS: Mapping[str, float] = {
    "f32": 32,
    "bf16": 16,
    "fp8": 8 + 32 / 128**2,
    "int8": 8 + 16 / 128,
    "int4-g32": 4 + 16 / 32,
    "int4-g64": 4 + 16 / 64,
    "int4-g128": 4 + 16 / 128,
    "mxfp4": 4 + 8 / 32,
    "nvfp4": 4 + 8 / 16,
}
"""Bits of a quantized weight with its scales: f32 for each 128 × 128 of fp8, bf16 for each group of 128 of int8 and for
each group of int4, e8m0 for 32 of mxfp4, e4m3 for 16 of nvfp4."""

_HEAD = KVLayer(num_kv_heads=1, head_dim=64)
KV_BITS: Mapping[str, float] = {name: 8 * kv_bytes_per_value([_HEAD], name) for name in KV_FORMATS}
"""Bits of a cached value, scales included, as the executors keep it in heads of 64 features."""

QUANTIZED = {
    "linear": ("attention", "dense_mlp", "experts", "shared_experts"),
    "experts": ("experts",),
}
"""Classes that a format is for. What remains is bf16: embeddings, head, router, norms and biases always."""

_REPLICATED = ("router", "norms", "biases")
_CLASSES = ("embeddings", "head", "attention", "dense_mlp", "experts", "shared_experts", *_REPLICATED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """How a model lies on a node.

    Attributes:
        format, quantize: of `WEIGHT_BITS` and `QUANTIZED`.
        kv_format: of `KV_BITS`.
        gpu_bytes: of one GPU.
        usable: share of it that the plan may fill: the driver, the context and fragmentation take the rest.
        tensor: GPUs that share each layer: heads, experts and columns. KV heads that do not divide are repeated; the
            latent of MLA is on each.
        pipeline: groups of layers, one after the other.
        context, num_seqs: tokens of each sequence, sequences at a time.
        max_batched_tokens: of a step, for the activations.
    """

    format: str = "bf16"
    quantize: str = "linear"
    kv_format: str = "bf16"
    gpu_bytes: int
    usable: float = 0.92
    tensor: int = 1
    pipeline: int = 1
    context: int = 8192
    num_seqs: int = 1
    max_batched_tokens: int = 8192

    def __post_init__(self) -> None:
        for name, known in (("format", WEIGHT_BITS), ("quantize", QUANTIZED), ("kv_format", KV_BITS)):
            if getattr(self, name) not in known:
                raise InvalidRequestError(
                    f"{name} {getattr(self, name)!r} is not known.", f"Use one of {', '.join(known)}."
                )
        counts = (self.tensor, self.pipeline, self.context, self.num_seqs, self.max_batched_tokens, self.gpu_bytes)
        if min(counts) < 1 or not 0 < self.usable <= 1:
            raise InvalidRequestError("Counts must be at least 1, and the usable share above 0 and at most 1.")


@dataclass(frozen=True, kw_only=True, slots=True)
class NodePlan:
    """Bytes on the fullest GPU, of what a placement asks for.

    Attributes:
        weights, kv, activations: what each takes. KV is that of all sequences at their full context.
        budget: what may be filled.
        kv_tokens: tokens that fit into what weights and activations leave.
        sequences: full contexts that do.
    """

    weights: int
    kv: int
    activations: int
    budget: int
    kv_tokens: int
    sequences: int

    @property
    def free(self) -> int:
        """What is left; negative where it does not fit."""
        return self.budget - self.weights - self.kv - self.activations

    @property
    def fits(self) -> bool:
        return self.free >= 0


def weight_bytes(shape: ModelShape, format_name: str, quantize: str = "linear") -> dict[str, float]:
    """Bytes of each class of parameters on no particular number of GPUs."""
    quantized = QUANTIZED[quantize]
    return {
        name: getattr(shape, name) * (WEIGHT_BITS[format_name] if name in quantized else 16) / 8 for name in _CLASSES
    }


def kv_bytes(shape: ModelShape, kv_format: str, tokens: int) -> float:
    """Bytes that one sequence of so many tokens keeps, all layers and heads once."""
    keeps = shape.attention_kind
    held = (shape.num_layers - keeps.windowed_layers) * tokens
    held += keeps.windowed_layers * min(tokens, keeps.window) if keeps.windowed_layers else 0
    return held * keeps.values * KV_BITS[kv_format] / 8


def plan_node(shape: ModelShape, placement: Placement) -> NodePlan:
    """What lies on the fullest GPU."""
    stages = min(placement.pipeline, shape.num_layers)
    share = -(-shape.num_layers // stages) / shape.num_layers  # layers of the longest stage
    weights = 0.0
    for name, size in weight_bytes(shape, placement.format, placement.quantize).items():
        if name == "head" and placement.pipeline > 1:
            continue  # the two ends, of one size, lie on two stages
        whole = size if name in ("embeddings", "head") else size * share
        weights += whole if name in _REPLICATED else whole / placement.tensor
    per_sequence = kv_bytes(shape, placement.kv_format, placement.context) * share / _kv_split(shape, placement.tensor)
    activations = activation_bytes(shape, placement.max_batched_tokens, placement.tensor)
    budget = int(placement.gpu_bytes * placement.usable)
    left = max(0.0, budget - weights - activations)
    sequences = int(left // per_sequence)
    return NodePlan(
        weights=int(weights),
        kv=int(per_sequence * placement.num_seqs),
        activations=activations,
        budget=budget,
        kv_tokens=int(left / per_sequence * placement.context),
        sequences=sequences,
    )


def activation_bytes(shape: ModelShape, tokens: int, tensor: int) -> int:
    """An estimate of a step's working memory in bf16: for each token four hidden vectors (residual, its copy, what goes
    in and comes out), what attention projects, the two halves of the widest MLP, and f32 logits of 256 rows."""
    keeps = shape.attention_kind
    per_token = 4 * shape.hidden_size + (2 * shape.hidden_size + 2 * keeps.values) / tensor
    per_token += 2 * shape.intermediate_size / tensor
    return int(2 * tokens * per_token + 4 * 256 * shape.vocab_size)


def training_bytes(shape: ModelShape, *, masters: str, shards: int) -> dict[str, int]:
    """Bytes per GPU of full fine-tuning with AdamW, weights, gradients and optimizer in shards (ZeRO-3, FSDP): working
    weights and gradients in bf16, masters in `masters` (f32, or bf16: the weights themselves), two f32 moments."""
    if masters not in ("f32", "bf16") or shards < 1:
        raise InvalidRequestError(
            f"Masters in {masters!r} on {shards} shards cannot be.", "Use f32 or bf16, 1 or more."
        )
    parts = {"weights": 2, "gradients": 2, "masters": 4 if masters == "f32" else 0, "moments": 8}
    return {name: -(-size * shape.total // shards) for name, size in parts.items()}


def smallest_node(shape: ModelShape, placement: Placement) -> int | None:
    """The fewest GPUs among `NODES` on which the placement fits, all of them sharing each layer; None: not even 32."""
    for count in NODES:
        if plan_node(shape, replace(placement, tensor=count, pipeline=1)).fits:
            return count
    return None


def _kv_split(shape: ModelShape, tensor: int) -> int:
    """Into how many parts KV goes: as many as heads allow, and none of a latent."""
    keeps = shape.attention_kind
    return 1 if keeps.latent else min(tensor, keeps.num_kv_heads)

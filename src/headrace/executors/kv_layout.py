"""How many bytes the KV cache takes: shared by the executors, which allocate it, and by whoever plans memory."""

from collections.abc import Sequence

from headrace.graph.ir import KVLayer

BYTES_PER_VALUE = {"f32": 4, "bf16": 2, "int8": 1}
KV_FORMATS = tuple(BYTES_PER_VALUE)
SCALE_BYTES = {"f32": 0, "bf16": 0, "int8": 4}
"""Of each token and KV head, once for its key and once for its value."""


def kv_bytes_per_block(kv_layers: Sequence[KVLayer], block_size: int, kv_format: str) -> int:
    """Bytes of one KV block: the keys and the values of `block_size` tokens, and their scales, over all layers."""
    assert kv_format in BYTES_PER_VALUE, f"{kv_format!r} is not one of {KV_FORMATS}"
    head_bytes = (layer.head_dim * BYTES_PER_VALUE[kv_format] + SCALE_BYTES[kv_format] for layer in kv_layers)
    heads = (2 * block_size * layer.num_kv_heads for layer in kv_layers)
    # Each layer's part is a whole number of floats, so that scales are aligned.
    return sum(-(-count * size // 4) * 4 for count, size in zip(heads, head_bytes, strict=True))


def kv_bytes_per_value(kv_layers: Sequence[KVLayer], kv_format: str) -> float:
    """Bytes that one cached value takes, its part of the scales included; a mean over layers of different widths."""
    values = sum(2 * layer.num_kv_heads * layer.head_dim for layer in kv_layers)
    scales = sum(2 * layer.num_kv_heads for layer in kv_layers)
    return BYTES_PER_VALUE[kv_format] + SCALE_BYTES[kv_format] * scales / max(values, 1)

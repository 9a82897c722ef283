"""How many bytes the KV cache takes: shared by the executors, which allocate it, and by whoever plans memory."""

from collections.abc import Sequence

from headrace.graph.ir import KVLayer
from headrace.numerics.kv_formats import BITS_PER_VALUE, scales_per_head
from headrace.numerics.kv_formats import KV_FORMATS as KV_FORMATS  # for planners, who import no numerics

PAIRED = ("bf16", "int8", "int4")
"""Formats whose features and tokens lie in pairs: an odd number of either is rounded up."""
_SCALE_BYTES = 4


def kv_bytes_per_block(kv_layers: Sequence[KVLayer], block_size: int, kv_format: str) -> int:
    """Bytes of one KV block: the keys and the values of `block_size` tokens, and their scales, over all layers."""
    assert kv_format in BITS_PER_VALUE, f"{kv_format!r} is not one of {KV_FORMATS}"
    # Each layer's part is a whole number of floats, so that scales are aligned.
    return sum(-(-2 * _half_bytes(layer, block_size, kv_format) // 4) * 4 for layer in kv_layers)


def kv_bytes_per_value(kv_layers: Sequence[KVLayer], kv_format: str) -> float:
    """Bytes that one cached value takes, its part of the scales included; a mean over layers of different widths."""
    values = sum(layer.num_kv_heads * layer.head_dim for layer in kv_layers)
    scales = sum(layer.num_kv_heads * scales_per_head(kv_format, layer.head_dim) for layer in kv_layers)
    return BITS_PER_VALUE[kv_format] / 8 + _SCALE_BYTES * scales / max(values, 1)


def _half_bytes(layer: KVLayer, block_size: int, kv_format: str) -> int:
    """Of one layer's keys in a block, or of its values."""
    dim, tokens = layer.head_dim, block_size
    scales = tokens * scales_per_head(kv_format, dim)
    if kv_format in PAIRED:
        dim, tokens = -(-dim // 2) * 2, -(-tokens // 2) * 2
    return layer.num_kv_heads * (dim * tokens * BITS_PER_VALUE[kv_format] // 8 + _SCALE_BYTES * scales)

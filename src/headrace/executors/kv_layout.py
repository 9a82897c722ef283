"""How many bytes the KV cache takes: shared by the executors, which allocate it, and by whoever plans memory."""

from collections.abc import Sequence

from headrace.graph.ir import KVLayer

BYTES_PER_VALUE = {"f32": 4, "bf16": 2}
KV_FORMATS = tuple(BYTES_PER_VALUE)


def kv_bytes_per_block(kv_layers: Sequence[KVLayer], block_size: int, kv_format: str) -> int:
    """Bytes of one KV block: the keys and the values of `block_size` tokens, over all layers."""
    assert kv_format in BYTES_PER_VALUE, f"{kv_format!r} is not one of {KV_FORMATS}"
    values_per_token = sum(2 * layer.num_kv_heads * layer.head_dim for layer in kv_layers)
    return values_per_token * block_size * BYTES_PER_VALUE[kv_format]

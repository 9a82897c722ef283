"""The formats of cached keys and values, for whoever counts their bytes; how they are rounded: `kv_cache`."""

BITS_PER_VALUE = {"f32": 32, "bf16": 16, "fp8": 8, "int8": 8, "int4": 4}
KV_FORMATS = tuple(BITS_PER_VALUE)
SCALED_FORMATS = ("fp8", "int8", "int4")
INT4_GROUP = 32
"""Features of a head that share a scale and a lowest value in int4."""


def scales_per_head(kv_format: str, head_dim: int) -> int:
    """Scales, of four bytes each, that one head of one token takes; 0 in a format that has none."""
    return -(-head_dim // INT4_GROUP) if kv_format == "int4" else int(kv_format in SCALED_FORMATS)

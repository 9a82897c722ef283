"""Reads that the quantization configs of all formats share."""

from headrace.models.config import Config

AUTO_ROUND = (
    "autoround_version", "provider", "data_type", "packing_format", "block_name_to_quantize", "to_quant_block_names",
    "enable_quanted_input", "iters", "sym",
)  # fmt: skip
"""What AutoRound adds to others' configs: how it came to the weights, and how others shall run them."""


def group_size(config: Config) -> int | None:
    """Values under one scale; None for whole rows, which configs call -1 or do not mention."""
    if not config.has("group_size"):
        return None
    size = config.number("group_size")
    if size == -1:
        return None
    if size < 1 or size != int(size):
        raise config.wrong("group_size", "a whole number of 1 or more, or -1", size)
    return int(size)


def texts(config: Config, key: str) -> list[str]:
    """A list of strings; an empty one where the key is missing."""
    if not config.has(key):
        return []
    values = config.items(key)
    if not all(isinstance(value, str) for value in values):
        raise config.wrong(key, "a list of strings", values)
    return [str(value) for value in values]

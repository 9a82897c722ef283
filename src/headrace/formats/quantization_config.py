"""Reads that the quantization configs of all formats share."""

from headrace.models.config import Config


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

"""The part behind the question mark in a side's name."""

from collections.abc import Sequence
from urllib.parse import parse_qsl

from headrace.base.errors import InvalidRequestError

DTYPES = ("float32", "float64", "bfloat16", "float16")


def options_in(text: str, options: str, known: Sequence[str]) -> dict[str, str]:
    """``key=value&key=value`` as a mapping.

    Args:
        text: the whole name, for messages.
        options: the part to read; empty: nothing is given.
        known: the keys there are.

    Raises InvalidRequestError for what is not written so, for a key that is not known, and for one given twice.
    """
    try:
        pairs = parse_qsl(options, keep_blank_values=True, strict_parsing=bool(options))
    except ValueError as error:
        raise InvalidRequestError(f"{text!r}: {error}.", "Write MODEL?key=value&key=value.") from error
    given: dict[str, str] = {}
    for key, value in pairs:
        if key not in known or key in given:
            raise InvalidRequestError(
                f"{text!r}: {key!r} is {'given twice' if key in given else 'not known'}.",
                f"Use {', '.join(known)}, each once.",
            )
        given[key] = value
    return given

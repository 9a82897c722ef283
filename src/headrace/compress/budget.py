"""How large a quantized model may be, as it is asked for: bits of a weight, or bytes of the model."""

import re
from dataclasses import dataclass

from headrace.base.errors import InvalidRequestError

_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_TEXT = re.compile(r"(\d+(?:\.\d+)?)\s*(bits?|[kmg]i?b)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Budget:
    """Either of two limits.

    Attributes:
        text: as it was asked for.
        bits: mean bits of the weights of the matrices that formats are chosen for, scales and zero points counted,
            those that stay in bf16 at 16.
        num_bytes: of all the model's tensors, those that stay as they are included.
    """

    text: str
    bits: float | None = None
    num_bytes: int | None = None


def parse_budget(text: str) -> Budget:
    """``4.6bits``; or a size as ``110MB``, ``104MiB`` or ``0.1GB``. Raises InvalidRequestError."""
    found = _TEXT.fullmatch(text.strip())
    if found is None or float(found[1]) == 0:
        raise InvalidRequestError(
            f"{text!r} is no budget.", "Say how many bits a weight, as 4.6bits, or how large a model, as 110MB."
        )
    value, unit = float(found[1]), found[2].lower()
    if unit.startswith("bit"):
        return Budget(text, bits=value)
    return Budget(text, num_bytes=int(value * _UNITS[unit]))


def is_budget(text: str) -> bool:
    """Whether it reads as one; formats do not."""
    return _TEXT.fullmatch(text.strip()) is not None

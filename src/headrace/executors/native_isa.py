"""Which instruction set the native executor uses."""

from headrace import _native
from headrace.base.errors import InvalidRequestError
from headrace.base.settings import from_environment


def available_isa(asked: str | None) -> str:
    """The best that machine and build share, or the one asked for; InvalidRequestError if it is not one of them."""
    available = _native.available_isas()
    if asked is not None and asked not in available:
        raise InvalidRequestError(
            f"This machine, or this build of headrace, does not have the instruction set {asked!r}.",
            f"Use one of {', '.join(available)}, or unset HEADRACE_ISA to get the last of them.",
        )
    return asked or available[-1]


def isa_rounding_inputs(activation: str) -> str | None:
    """What to ask for where that precision of activations shall be one of inputs: for int8 with AMX, which rounds
    weights instead, the next best, unless HEADRACE_ISA names one; else None, the usual choice."""
    rounds_weights = activation == "int8" and from_environment().isa is None and available_isa(None) == "amx"
    return "avx512_vnni" if rounds_weights else None

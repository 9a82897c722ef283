"""How values inside a side are asked for."""

from collections.abc import Callable, Mapping, Sequence

from headrace.engine.step import Float32

Tap = Callable[[Sequence[str]], Mapping[str, Float32]]
"""Names of nodes to their values on one text, float32 ``[tokens, features]``; without those the side does not show."""

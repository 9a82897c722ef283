"""What is said about repeated measurements: medians, quantiles, spread."""

import math
from collections.abc import Sequence


def quantile(values: Sequence[float], q: float) -> float:
    """The value below which a share `q` of the values lies, with straight lines between them (as numpy's default)."""
    assert values, "a quantile of nothing"
    assert 0.0 <= q <= 1.0, "a quantile beyond the values"
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return quantile(values, 0.5)


def spread(values: Sequence[float]) -> float:
    """The middle half's width as a share of the median: how much repeats differ, whatever the odd one out does."""
    middle = median(values)
    width = quantile(values, 0.75) - quantile(values, 0.25)
    return width / middle if middle else 0.0

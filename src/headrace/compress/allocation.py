"""Which matrix gets which format: the least predicted KL for the bytes.

Costs of matrices are taken to add up. Then the options that minimize cost + price * bytes are the best choice for the
bytes that they take, for every price (Everett 1963, generalized Lagrange multipliers): options on the lower convex hull
of each matrix, taken in the order of what they save per byte.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from headrace.compress.sensitivity import Option


@dataclass(frozen=True, slots=True)
class _Step:
    """A matrix goes from one option to the next better one."""

    name: str
    option: Option
    more_bytes: int
    less_kl: float


class Ladder:
    """All best choices, from the smallest on; each step gives one matrix a better format.

    Args:
        options: of each matrix, at least one.
    """

    def __init__(self, options: Mapping[str, Sequence[Option]]) -> None:
        hulls = {name: _hull(choices) for name, choices in options.items()}
        self._lowest = {name: hull[0] for name, hull in hulls.items()}
        steps = [
            _Step(name, after, after.num_bytes - before.num_bytes, before.kl - after.kl)
            for name, hull in hulls.items()
            for before, after in pairwise(hull)
        ]
        self._steps = sorted(steps, key=lambda step: -step.less_kl / step.more_bytes)
        lowest = self._lowest.values()
        self.sizes = tuple(
            accumulate((step.more_bytes for step in self._steps), initial=sum(option.num_bytes for option in lowest))
        )
        """Bytes on each rung, rising."""
        self.costs = tuple(
            accumulate((-step.less_kl for step in self._steps), initial=sum(option.kl for option in lowest))
        )
        """Predicted KL on each rung, falling."""

    def rung(self, index: int) -> dict[str, Option]:
        """Every matrix's option there."""
        return self._lowest | {step.name: step.option for step in self._steps[:index]}

    def within(self, num_bytes: int) -> dict[str, Option]:
        """The last rung that fits, and of the steps above what still does. At least the smallest must fit."""
        assert num_bytes >= self.sizes[0], "less than the smallest"
        chosen, left, stuck = dict(self._lowest), num_bytes - self.sizes[0], set()
        for step in self._steps:
            if step.name in stuck:
                continue
            if step.more_bytes > left:
                stuck.add(step.name)
                continue
            chosen[step.name] = step.option
            left -= step.more_bytes
        return chosen


def _hull(options: Sequence[Option]) -> list[Option]:
    """Those that are best for some price, by size: each saves more per byte than what follows it."""
    found: list[Option] = []
    for option in sorted(options, key=lambda each: (each.num_bytes, each.kl)):
        if found and option.kl >= found[-1].kl:
            continue
        while len(found) > 1 and _saved(found[-1], option) >= _saved(found[-2], found[-1]):
            found.pop()
        found.append(option)
    return found


def _saved(before: Option, after: Option) -> float:
    """Nats per byte."""
    return (before.kl - after.kl) / (after.num_bytes - before.num_bytes)

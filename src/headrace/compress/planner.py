"""Formats for single matrices: the best within a budget, or the fewest bytes whose measured KL stays under a limit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from headrace.base.errors import HeadraceError, InvalidRequestError
from headrace.compress.allocation import Ladder
from headrace.compress.budget import Budget
from headrace.compress.export import folder_bytes
from headrace.compress.recipe import PLAIN, Recipe
from headrace.compress.sensitivity import Option, measure_options
from headrace.executors.native_quantize import quantize_tensor
from headrace.graph.ir import Graph
from headrace.models.spec import ModelSpec
from headrace.numerics.row_blocks import row_blocks
from headrace.numerics.schemes import IntegerScheme, Scheme, scheme_named
from headrace.numerics.tensor import RawTensor

FORMATS = ("int4-g128", "int4-g64", "int4-g32", "int4-g64-asym", "int4-g32-asym", "int8-channel", PLAIN)
"""What a matrix may become; groups that do not divide its rows are left out."""

_TRIALS = 6  # after which the smallest that passed is taken, if one has
_CLOSE = 0.93  # of the limit: what is as near to it is not made smaller
_NEARLY = 1.005  # bytes by bytes: two sizes that are not told apart


class LimitError(HeadraceError):
    """Not even the best formats keep a model as near to its source as was asked for."""

    code = "limit_unreachable"


@dataclass(frozen=True, slots=True)
class Planned:
    """Formats for all matrices.

    Attributes:
        recipe: with them in it.
        kl: predicted, costs of matrices added up.
        bits: mean of the weights of the matrices that formats were chosen for.
    """

    recipe: Recipe
    kl: float
    bits: float


class Planner:
    """Knows what each matrix of a model costs in each format.

    Args:
        spec, graph, weights: the model, its graph not fused.
        recipe: method, what to ignore, the logits' format; its own format is not used.
        token_ids: int ``[sequences, length]`` to measure costs on.
        fitted: other texts, as many as the method will be calibrated on.

    Raises InvalidRequestError for a recipe that does not fit.
    """

    def __init__(
        self,
        spec: ModelSpec,
        graph: Graph,
        weights: Mapping[str, RawTensor],
        recipe: Recipe,
        token_ids: np.ndarray,
        fitted: np.ndarray,
    ) -> None:
        names = [name for name in recipe.matrices(graph) if name not in graph.logits_params]
        if not names:
            raise InvalidRequestError("There are no matrices to choose formats for.", "Ignore less.")
        formats = {name: _candidates(weights[name]) for name in names}
        options = measure_options(graph, weights, formats, token_ids, fitted=fitted if recipe.fits else None)
        self._recipe = recipe
        self._num_weights = sum(graph.params[name].shape[0] * graph.params[name].shape[1] for name in names)
        self._other_bytes = _bytes_without(names, spec, graph, weights, recipe)
        self.ladder = Ladder(options)

    def within(self, budget: Budget) -> Planned:
        """The best for a budget. Raises InvalidRequestError for one that nothing fits, or that nothing fills."""
        limit = (
            budget.bits * self._num_weights / 8
            if budget.bits is not None
            else (budget.num_bytes or 0) - self._other_bytes
        )
        sizes = self.ladder.sizes
        if limit < sizes[0]:
            raise InvalidRequestError(
                f"{budget.text} is less than the smallest formats take, {self._size(sizes[0])}.",
                "Allow more; or give the logits' matrix a format (--logits int8-channel), if the size is the budget.",
            )
        if limit > sizes[-1]:
            raise InvalidRequestError(
                f"{budget.text} is more than the best formats take, {self._size(sizes[-1])}.", "Allow less."
            )
        return self._planned(self.ladder.within(int(limit)), budget.text)

    def at(self, rung: int, aim: str) -> Planned:
        """What stands on a rung of the ladder."""
        return self._planned(self.ladder.rung(rung), aim)

    def _planned(self, chosen: Mapping[str, Option], aim: str) -> Planned:
        mixed = tuple((name, option.format) for name, option in chosen.items())
        num_bytes = sum(option.num_bytes for option in chosen.values())
        return Planned(
            replace(self._recipe, mixed=mixed, aim=aim),
            sum(option.kl for option in chosen.values()),
            8 * num_bytes / self._num_weights,
        )

    def _size(self, num_bytes: int) -> str:
        return f"{8 * num_bytes / self._num_weights:.3f}bits ({(num_bytes + self._other_bytes) / 1e6:.1f}MB)"


def lowest_rung(ladder: Ladder, limit: float, measure: Callable[[int], float]) -> int:
    """The lowest rung whose measured KL is at most `limit`, or one a little above it.

    Each measurement corrects the prediction, which says where to look next. It ends between two rungs of nearly one
    size, at a KL close to the limit, or after some trials, one of which has passed.

    Args:
        measure: the KL of a rung, nats. Each is asked for once.

    Raises LimitError if the highest rung is above the limit.
    """
    failed, passed, correction = -1, len(ladder.sizes), 1.0
    trials = 0
    while passed - failed > 1:
        guess = next((i for i, kl in enumerate(ladder.costs) if kl * correction <= 0.97 * limit), len(ladder.costs) - 1)
        if not failed < guess < passed:
            guess = (failed + passed) // 2 if trials else 0
        measured = measure(guess)
        trials += 1
        if measured <= limit:
            passed = guess
            if measured >= _CLOSE * limit:
                break
        else:
            failed = guess
        if passed < len(ladder.sizes) and (
            trials >= _TRIALS or (failed >= 0 and ladder.sizes[passed] <= _NEARLY * ladder.sizes[failed])
        ):
            break
        correction = measured / ladder.costs[guess] if ladder.costs[guess] > 0 else 1.0
    if passed == len(ladder.sizes):
        raise LimitError(
            f"Even with the best formats the mean KL is {measured:.4g}, above {limit:g}.",
            "Allow more, or ignore matrices less (those of --logits count, too).",
        )
    return passed


def _candidates(tensor: RawTensor) -> list[str]:
    found = []
    for name in FORMATS:
        if name == PLAIN:
            if row_blocks(tensor.format.name) is None:  # what is quantized already has no plain form in a folder
                found.append(name)
            continue
        scheme = scheme_named(name)
        if isinstance(scheme, IntegerScheme) and tensor.shape[1] % (scheme.group_size or 1) == 0:
            found.append(name)
    return found


def _bytes_without(
    names: list[str], spec: ModelSpec, graph: Graph, weights: Mapping[str, RawTensor], recipe: Recipe
) -> int:
    """Of all tensors but these, as they will be stored."""
    stored, schemes = dict(weights), dict[str, Scheme]()
    if recipe.logits is not None:
        for name in graph.logits_params & set(recipe.matrices(graph)):
            schemes[name] = scheme_named(recipe.logits)
            stored[name] = quantize_tensor(weights[name], schemes[name])
    return folder_bytes(spec, stored, schemes, without=names)

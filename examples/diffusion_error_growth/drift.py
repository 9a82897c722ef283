"""How errors of a diffusion model grow over its steps: in all, as if they only added up, and from one push."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from examples.diffusion_error_growth.digits import Judge
from examples.diffusion_error_growth.dit import DiT
from examples.diffusion_error_growth.flow import trajectory
from examples.diffusion_error_growth.settings import KINDS, Setting, rounded

PUSHES = (0.001, 0.3)
"""Sizes of what is added to a state, by its own: one in the linear regime, one far outside."""


@dataclass(frozen=True, slots=True)
class Drift:
    """A rounded model beside the exact one, from the same noise, over n steps. All errors by the exact state's size.

    Attributes:
        error: of the state after 0, 1, …, n steps.
        added: what it would be if each step's error, of the rounded velocity at the *exact* state, were added up and
            nothing were made of it by later steps; ``error / added`` is what feeding errors back does.
        velocity: of those velocities, one per step, by the exact velocity's size.
        same_digit: share of samples in which the judge reads the digit that it reads in the exact ones.
        accuracy, frechet: `digits.Quality` of the samples.
    """

    error: list[float]
    added: list[float]
    velocity: list[float]
    same_digit: float
    accuracy: float
    frechet: float


@dataclass(frozen=True, slots=True)
class Push:
    """What a push at one step has become at the end: sizes by that of the push.

    Attributes:
        start: share of the steps done when it comes.
        random, bright, dim: of a push of random direction; of its part among the ten directions in which the digits
            vary most, by that part's own size; of the rest, likewise: each pushed by itself.
        quantized: of a push in the direction of the int4 model's error at that step.
        far: of a random push of 0.3 of the state.
    """

    start: float
    random: float
    bright: float
    dim: float
    quantized: float
    far: float


@dataclass(frozen=True, slots=True)
class Samples:
    """The noise and the labels that all trajectories share, and who judges what becomes of them."""

    noise: Tensor
    labels: Tensor
    judge: Judge


@torch.no_grad()
def drift(other: DiT, samples: Samples, states: Tensor) -> Drift:
    """`other` beside the exact model's trajectory `states`, ``[n + 1, b, 8, 8]``."""
    n = len(states) - 1
    found = trajectory([other] * n, samples.noise, samples.labels)
    errors, sizes = [], []
    for i in range(n):
        times = torch.full((len(samples.noise),), i / n, device=states.device)
        velocity = (states[i + 1] - states[i]) * n
        errors.append(other(states[i], times, samples.labels) - velocity)
        sizes.append(relative(errors[-1], velocity))
    added = torch.stack([torch.zeros_like(states[0]), *errors]).cumsum(0) / n
    quality = samples.judge.quality(found[-1], samples.labels)
    return Drift(
        error=[relative(y - x, x) for x, y in zip(states, found, strict=True)],
        added=[relative(error, x) for x, error in zip(states, added, strict=True)],
        velocity=sizes,
        same_digit=(samples.judge.read(found[-1]) == samples.judge.read(states[-1])).float().mean().item(),
        accuracy=quality.accuracy,
        frechet=quality.frechet,
    )


def final_error(model: DiT, samples: Samples, states: Tensor) -> float:
    """Of the samples alone, by the exact ones at the end of `states`."""
    end = trajectory([model] * (len(states) - 1), samples.noise, samples.labels)[-1]
    return relative(end - states[-1], states[-1])


def final_errors_by_window(exact: DiT, other: DiT, samples: Samples, states: Tensor, windows: int) -> list[float]:
    """The final error if `other` takes only the steps of one window of the trajectory, window by window."""
    n = len(states) - 1
    found = []
    for window in range(windows):
        models = [other if window * n <= i * windows < (window + 1) * n else exact for i in range(n)]
        found.append(relative(trajectory(models, samples.noise, samples.labels)[-1] - states[-1], states[-1]))
    return found


def final_errors_by_kind(exact: DiT, setting: Setting, samples: Samples, states: Tensor) -> Mapping[str, float]:
    """The final error if the layers of one kind alone are rounded."""
    return {kind: final_error(rounded(exact, setting, only), samples, states) for kind, only in KINDS.items()}


def pushes(
    exact: DiT, samples: Samples, states: Tensor, errors: Tensor, images: Tensor, starts: Sequence[int]
) -> list[Push]:
    """What becomes of a push at each of some steps of the exact trajectory.

    Args:
        errors: of a rounded model's states, ``[n + 1, b, 8, 8]``, for a direction; zero at the start.
        images: ``[m, 8, 8]``, whose principal directions a random push is divided by.
    """
    n = len(states) - 1
    generator = torch.Generator(states.device).manual_seed(2)
    bright = torch.linalg.svd(images.flatten(1) - images.flatten(1).mean(0), full_matrices=False).Vh[:10]
    found = []
    for start in starts:

        def grown(direction: Tensor, size: float = PUSHES[0], start: int = start) -> float:
            """Each sample pushed by `size` of its state along a direction of its own."""
            lengths = states[start].flatten(1).norm(dim=1) / direction.flatten(1).norm(dim=1)
            push = size * direction * lengths[:, None, None]
            moved = trajectory([exact] * n, states[start] + push, samples.labels, start=start)[-1]
            return relative(moved - states[-1], push)

        random = torch.randn(states[0].shape, generator=generator, device=states.device)
        among = (random.flatten(1) @ bright.T @ bright).view_as(random)
        error = errors[max(start, 1)]
        found.append(
            Push(start / n, grown(random), grown(among), grown(random - among), grown(error), grown(random, PUSHES[1]))
        )
    return found


def relative(error: Tensor, by: Tensor) -> float:
    """The root mean square of an error over that of what it is an error of."""
    return float(error.norm() / by.norm())

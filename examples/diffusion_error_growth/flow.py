"""Training a DiT by flow matching, and Euler's method along what it learned."""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from examples.diffusion_error_growth.digits import Digits
from examples.diffusion_error_growth.dit import DiT

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of images ``[b, 8, 8]`` at times ``[b]`` with labels ``[b]``: a DiT, or something that stands in for one."""

_EMA = 0.995


def trained(model: DiT, data: Digits, *, steps: int, batch: int, seed: int = 0) -> tuple[DiT, list[float]]:
    """The moving average of a model's weights over a run of training, and the loss at each step.

    AdamW, a warm-up of a twentieth and then a cosine; times are uniform. The model itself is trained in place.
    """
    generator = torch.Generator(data.images.device).manual_seed(seed)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=0.01)
    losses = []
    for step in range(steps):
        rate = min(1.0, 20 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = 1.5e-3 * rate
        rows = torch.randint(len(data.images), (batch,), generator=generator, device=data.images.device)
        loss = matching_loss(model, data.images[rows], data.labels[rows], generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        keep = min(_EMA, step / (step + 10))
        for kept, new in zip(average.parameters(), model.parameters(), strict=True):
            kept.lerp_(new.detach(), 1 - keep)
    return average, losses


def matching_loss(model: Velocity, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocities at a random time of each image."""
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    times = torch.rand(len(images), generator=generator, device=images.device)
    mixed = torch.lerp(noise, images, times[:, None, None])
    return (model(mixed, times, labels) - (images - noise)).square().mean()


@torch.no_grad()
def trajectory(models: Sequence[Velocity], noise: Tensor, labels: Tensor, *, start: int = 0) -> Tensor:
    """All states of Euler's method with step 1 / n from step `start` on: float32 ``[n - start + 1, b, 8, 8]``.

    Args:
        models: the model of each of the n steps: one and the same, or another in some of them.
        noise: the state at step `start`, ``[b, 8, 8]``.
    """
    n = len(models)
    states = [noise]
    for i in range(start, n):
        times = torch.full((len(noise),), i / n, device=noise.device)
        states.append(states[-1] + models[i](states[-1], times, labels) / n)
    return torch.stack(states)

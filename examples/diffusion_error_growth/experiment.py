"""Both halves of the experiment, in one size: everything that is measured, as plain figures."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from examples.diffusion_error_growth import drift, language
from examples.diffusion_error_growth.digits import Digits, Judge, Quality, digits
from examples.diffusion_error_growth.dit import CLASSES, DiT
from examples.diffusion_error_growth.flow import trained, trajectory
from examples.diffusion_error_growth.settings import SETTINGS, Setting, rounded

Say = Callable[[str], None]
WORST = next(setting for setting in SETTINGS if setting.weights == "int4-g32")
"""What steps, positions and layers are compared in: large enough to show in each by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much is trained and measured; `main_steps` is the number of steps that most is measured at."""

    width: int = 96
    depth: int = 6
    training_steps: int = 1800
    batch: int = 128
    samples: int = 100
    main_steps: int = 50
    other_steps: tuple[int, ...] = (10, 250)
    windows: int = 5
    starts: int = 5
    settings: tuple[Setting, ...] = SETTINGS
    texts: int = 16
    prompt: int = 32
    tokens: int = 64


SMALL = Size(
    width=64, depth=2, training_steps=150, batch=48, samples=48, main_steps=10, other_steps=(5,), windows=2, starts=2,
    settings=tuple(setting for setting in SETTINGS if setting.weights in ("bf16", "int8-channel", "int4-g32")),
    texts=6, prompt=16, tokens=16,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class DiffusionResult:
    """By the titles of settings where it says so.

    Attributes:
        loss_first, loss_last: means of the first 20 training steps' losses, and of the last 100's (small: 20's).
        exact: quality of the exact model's samples, at the main number of steps; `floor` is the Fréchet distance of the
            training images.
        finals: final errors by number of steps, then by setting.
        drifts: at the main number of steps, by setting.
        windows: final error with int4 weights in one window of the steps alone, from noise to image.
        kinds: with int4 weights in layers of one kind alone.
    """

    parameters: int
    loss_first: float
    loss_last: float
    exact: Quality
    floor: float
    finals: dict[int, dict[str, float]]
    drifts: dict[str, drift.Drift]
    windows: list[float]
    kinds: dict[str, float]
    pushes: list[drift.Push]


@dataclass(frozen=True, slots=True)
class LanguageResult:
    """By the titles of settings where it says so. `windows[i][j]`: KL in window j if window i alone is in int4."""

    growths: dict[str, language.Growth]
    one_token: language.OneToken
    windows: list[list[float]]
    kinds: dict[str, float]


def measure_diffusion(size: Size, device: str, weights: Path | None, say: Say) -> DiffusionResult:
    """Train, or take from `weights` if that is there, and measure."""
    data = digits(device)
    say("training")
    exact, losses = _trained(size, data, device, weights)
    judge = Judge(data)
    noise = torch.randn(size.samples, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)
    samples = drift.Samples(noise, torch.arange(size.samples, device=device) % CLASSES, judge)
    models = {each.title: rounded(exact, each) for each in size.settings}
    n, worst = size.main_steps, models[WORST.title]
    say(f"{n} steps")
    states = trajectory([exact] * n, noise, samples.labels)
    drifts = {title: drift.drift(model, samples, states) for title, model in models.items()}
    finals = {n: {title: each.error[-1] for title, each in drifts.items()}}
    for other in size.other_steps:
        say(f"{other} steps")
        ends = trajectory([exact] * other, noise, samples.labels)
        finals[other] = {title: drift.final_error(model, samples, ends) for title, model in models.items()}
    say("windows of the steps, layers, pushes")
    errors = trajectory([worst] * n, noise, samples.labels) - states
    tail = min(100, len(losses) // 4)
    return DiffusionResult(
        parameters=sum(each.numel() for each in exact.parameters()),
        loss_first=sum(losses[:20]) / 20,
        loss_last=sum(losses[-tail:]) / tail,
        exact=judge.quality(states[-1], samples.labels),
        floor=judge.quality(data.images, data.labels).frechet,
        finals=dict(sorted(finals.items())),
        drifts=drifts,
        windows=drift.final_errors_by_window(exact, worst, samples, states, size.windows),
        kinds=drift.final_errors_by_kind(exact, WORST, samples, states),
        pushes=drift.pushes(exact, samples, states, errors, data.images, range(0, n, -(-n // size.starts))),
    )


def measure_language(size: Size, say: Say) -> LanguageResult:
    """On the embedded model."""
    say("the exact model writes")
    text = language.written(size.texts, size.prompt, size.tokens)
    said = language.said_along(text)
    growths = {}
    for setting in size.settings:
        say(setting.title)
        growths[setting.title] = language.growth(setting, text, said)
    say("one token changed")
    one_token = language.after_one_token(text, said)
    say("positions, layers")
    return LanguageResult(
        growths,
        one_token,
        language.kl_by_window(WORST.weights, text, said, size.windows),
        language.kl_by_kind(WORST.weights, text, said),
    )


def _trained(size: Size, data: Digits, device: str, weights: Path | None) -> tuple[DiT, list[float]]:
    torch.manual_seed(0)
    model = DiT(width=size.width, depth=size.depth).to(device)
    if weights is not None and weights.exists():
        kept = torch.load(weights, map_location=device)
        model.load_state_dict(kept["model"])
        return model.requires_grad_(False), kept["losses"]
    model, losses = trained(model, data, steps=size.training_steps, batch=size.batch)
    if weights is not None:
        torch.save({"model": model.state_dict(), "losses": losses}, weights)
    return model, losses

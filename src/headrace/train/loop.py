"""The training loop: distillation or next tokens, one step after the other, stopped and gone on with at will."""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from headrace.base.errors import CheckpointError, HeadraceError, InvalidRequestError, StorageError
from headrace.executors.torch_device import repeatable
from headrace.train.gradients import LOSSES, Gradients
from headrace.train.model import GraphModel


class DivergedError(HeadraceError):
    """A loss or a gradient that is no number."""

    code = "diverged"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How to train.

    Attributes:
        steps: of the optimizer.
        batch_size: sequences of a step.
        learning_rate: at its highest; rises over `warmup` of the steps, then falls along a cosine to a tenth.
        warmup: share of the steps.
        weight_decay: AdamW's, on matrices.
        max_grad_norm: gradients are scaled down to it.
        loss: ``distill``, the mean KL of the teacher's next-token distribution to the student's; ``next_token``, the
            cross-entropy of the next token.
        compute: ``bf16``: matrix products in bf16 (torch.autocast); ``f32``. Rounding of weights is the same.
        checkpoint_every: steps.
    """

    steps: int = 200
    batch_size: int = 8
    learning_rate: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    loss: str = "distill"
    compute: str = "bf16"
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise InvalidRequestError(f"Loss {self.loss!r} is not known.", f"Use one of {', '.join(LOSSES)}.")
        if self.compute not in ("bf16", "f32"):
            raise InvalidRequestError(f"Computing in {self.compute!r} is not known.", "Use bf16 or f32.")
        if self.steps < 1 or self.batch_size < 1 or self.checkpoint_every < 1:
            raise InvalidRequestError("steps, batch_size and checkpoint_every must be at least 1.")
        if not (self.learning_rate > 0 and 0 <= self.warmup < 1 and self.max_grad_norm > 0 and self.weight_decay >= 0):
            raise InvalidRequestError("learning_rate, warmup, weight_decay or max_grad_norm is out of range.")

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0 on."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        along = (step - rising) / max(1, self.steps - rising)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * along)))


def train(
    model: GraphModel,
    teacher: GraphModel | None,
    batch_of: Callable[[int], np.ndarray],
    config: TrainingConfig,
    folder: Path,
    *,
    report: Callable[[int, dict[str, float]], None] = lambda step, figures: None,  # noqa: ARG005
) -> None:
    """Train a model in place.

    Args:
        model: whose masters change.
        teacher: for ``distill``; runs without rounding and without gradients.
        batch_of: token ids ``[n, l]`` of each step, always of one shape.
        folder: where checkpoints and ``curve.jsonl`` are kept. A run that finds a checkpoint there goes on from it, and
            ends with the same bits as one that was never stopped, on the same device.
        report: told each step's figures: loss, gradient norm, learning rate, seconds.

    Raises:
        DivergedError: the loss or the gradients are not numbers; the last checkpoint is kept.
        CheckpointError: the folder holds a run with another config, or a damaged one.
        StorageError: it cannot be written.
    """
    assert (teacher is not None) == (config.loss == "distill"), "distillation has a teacher"
    optimizer = _optimizer(model, config)
    start = _resume(folder, model, optimizer, config)
    gradients = Gradients(model, teacher, compute=config.compute)
    with repeatable(model.device):
        for step in range(start, config.steps):
            figures = _advance(model, gradients, optimizer, batch_of(step), config, step)
            report(step, figures)
            _keep(folder, model, optimizer, config, step, figures)


def _advance(
    model: GraphModel,
    gradients: Gradients,
    optimizer: torch.optim.AdamW,
    batch: np.ndarray,
    config: TrainingConfig,
    step: int,
) -> dict[str, float]:
    """One step of the optimizer, and its figures."""
    began = time.perf_counter()
    for group in optimizer.param_groups:
        group["lr"] = config.rate(step)
    loss = gradients(batch)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise DivergedError(
            f"Step {step} has the loss {float(loss)} and the gradient norm {float(norm)}.",
            "Lower the learning rate; the last checkpoint is from before.",
        )
    optimizer.step()
    return {
        "loss": float(loss),
        "grad_norm": float(norm),
        "learning_rate": config.rate(step),
        "seconds": time.perf_counter() - began,
    }


def _optimizer(model: GraphModel, config: TrainingConfig) -> torch.optim.AdamW:
    on_gpu = model.device.type == "cuda"  # one kernel, not thousands
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), foreach=False, fused=on_gpu)


def _keep(
    folder: Path,
    model: GraphModel,
    optimizer: torch.optim.AdamW,
    config: TrainingConfig,
    step: int,
    figures: dict[str, float],
) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "curve.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        if (step + 1) % config.checkpoint_every and step + 1 != config.steps:
            return
        partial, whole = folder / "checkpoint.partial", folder / "checkpoint.pt"
        state = {
            "config": asdict(config),
            "next_step": step + 1,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, whole)
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror or error}.", "Free some space.") from error


def _resume(folder: Path, model: GraphModel, optimizer: torch.optim.AdamW, config: TrainingConfig) -> int:
    """The step to go on with: 0 without a checkpoint."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        (folder / "curve.jsonl").unlink(missing_ok=True)
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        kept = {**state["config"], "checkpoint_every": config.checkpoint_every}
        if kept != asdict(config):
            raise CheckpointError(f"{path} is of a run with other settings.", "Use its settings, or another folder.")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        next_step = int(state["next_step"])
    except (RuntimeError, KeyError, ValueError, EOFError, OSError) as error:
        if isinstance(error, HeadraceError):
            raise
        raise CheckpointError(f"{path} cannot be read: {error}.", "Remove it to begin anew.") from error
    _cut_curve(folder / "curve.jsonl", next_step)
    return next_step


def _cut_curve(path: Path, next_step: int) -> None:
    """Forget what was noted after the checkpoint: it will come again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] < next_step]
        path.write_text("".join(f"{line}\n" for line in lines))

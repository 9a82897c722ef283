"""Quantization-aware training, whole: data, training, packing, and what it gained over rounding to nearest."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from headrace.align.divergence import Divergence
from headrace.align.samples import KINDS, check_kinds, said, shares
from headrace.base.errors import InvalidRequestError
from headrace.compress.export import hf_config
from headrace.compress.pipeline import Judging, Source, make_evaluator, open_source, windows, write_folder
from headrace.compress.quantizer import quantize_weights
from headrace.compress.recipe import Recipe
from headrace.executors.native_quantize import quantize_tensor
from headrace.executors.torch_device import torch_device
from headrace.formats.model_folder import refuse_existing
from headrace.numerics.schemes import IntegerScheme, Scheme
from headrace.numerics.tensor import RawTensor
from headrace.train.curve import curve_svg
from headrace.train.data import Sequences, corpus_sequences, file_sequences
from headrace.train.loop import TrainingConfig, train
from headrace.train.model import GraphModel

STARTS = ("weights", "gptq", "awq", "awq+gptq")


@dataclass(frozen=True, kw_only=True, slots=True)
class QatConfig:
    """What to train on, and to which format.

    Attributes:
        recipe: its format, what it ignores and the logits' format; the method is training.
        training: see `TrainingConfig`.
        start: ``weights``: masters begin as the model's weights; ``awq``: as these after scale was moved, not rounded;
            ``gptq``, ``awq+gptq``: as what these methods of `Recipe` round them to. Only symmetric integers are rounded
            to themselves again: for other formats ``awq+gptq`` is ``awq``, and ``gptq`` is refused.
        data: as much of each of these (`headrace.align.samples`); None: of all that the model can give.
        sequences: how many, of `length` tokens.
        seed: of data and order.
        checkpointed: compute layers again for gradients: less memory, more time.
    """

    recipe: Recipe
    training: TrainingConfig
    start: str = "awq+gptq"
    data: tuple[str, ...] | None = None
    sequences: int = 512
    length: int = 128
    seed: int = 0
    checkpointed: bool = False

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise InvalidRequestError(f"Start {self.start!r} is not known.", f"Use one of {', '.join(STARTS)}.")
        if self.data is not None:
            check_kinds(self.data)
            shares(self.data, self.sequences)


@dataclass(frozen=True, slots=True)
class QatResult:
    """What came of it.

    Attributes:
        model: the masters, in f32; what was written is their rounding.
        nearest, trained: against the source model, on held-out texts: rounding its weights to nearest, and training
            first.
    """

    model: GraphModel
    nearest: Divergence
    trained: Divergence

    @property
    def gap_closed(self) -> float:
        """Share of rounding's mean KL that training took away."""
        return 1 - self.trained.kl_mean / self.nearest.kl_mean


def train_qat(
    name: str | None,
    target: Path,
    config: QatConfig,
    judging: Judging,
    *,
    device: str = "cpu",
    report: Callable[[int, dict[str, float]], None],
    progress: Callable[[str], None] | None = None,
) -> QatResult:
    """Train a model to bear its quantization, and write it packed.

    `report` is told of each step, `progress` what is done before and after them. Checkpoints are kept beside `target`
    until it is whole: the same call goes on where a stopped one was.

    Raises as `train` and `write_folder` do.
    """
    refuse_existing(target)
    if config.recipe.is_gguf or config.recipe.format == "nvfp4":
        raise InvalidRequestError(
            f"Training for {config.recipe.format} is not there yet.", "Use int4-g32 or mxfp4, say."
        )
    torch_device(device)  # what is wrong with it shows before anything takes time
    source = open_source(name)
    described = hf_config(source.checkpoint, source.spec)
    schemes = config.recipe.schemes(source.graph)
    if config.start == "gptq" and not _symmetric(schemes):
        raise InvalidRequestError(
            f"What GPTQ rounds to {config.recipe.format} is not rounded to itself again.", "Start from awq or weights."
        )
    work = target.parent / f".{target.name}.qat"
    say = progress or (lambda _: None)
    say(f"{config.sequences} sequences of {config.length} tokens")
    sequences = _data(source, config, work)
    start = _start(source, config, schemes, judging, work, say)
    say("training")
    model = GraphModel(source.graph, start, schemes, device=device, checkpointed=config.checkpointed)
    teacher = None
    if config.training.loss == "distill":
        teacher = GraphModel(source.graph, source.weights, {}, device=device).requires_grad_(False)
    batches = sequences.batches(config.training.batch_size, config.seed)
    train(model, teacher, batches, config.training, work, report=report)
    say("what it does to held-out text")
    evaluator = make_evaluator(source, judging)
    trained = packed(model.weights(), schemes)
    result = QatResult(
        model=model,
        nearest=evaluator.compare(packed(source.weights, schemes)).divergence,
        trained=evaluator.compare(trained).divergence,
    )
    curve = (work / "curve.jsonl").read_text()
    notes = {"curve.jsonl": curve, "curve.svg": curve_svg(curve, f"{source.name}, {config.recipe.format}")}
    write_folder(source, described, trained, schemes, target, notes)
    shutil.rmtree(work, ignore_errors=True)
    return result


def packed(weights: Mapping[str, RawTensor], schemes: Mapping[str, Scheme]) -> dict[str, RawTensor]:
    """Weights with those that have schemes rounded to them, as they are served: the bits that training saw."""
    return {**weights, **{name: quantize_tensor(weights[name], scheme) for name, scheme in schemes.items()}}


def _symmetric(schemes: Mapping[str, Scheme]) -> bool:
    return all(isinstance(scheme, IntegerScheme) and scheme.symmetric for scheme in schemes.values())


def _start(
    source: Source,
    config: QatConfig,
    schemes: Mapping[str, Scheme],
    judging: Judging,
    work: Path,
    say: Callable[[str], None],
) -> Mapping[str, RawTensor]:
    """The masters' first values."""
    if config.start == "weights" or (work / "checkpoint.pt").exists():
        return source.weights
    say("text to calibrate on")
    ids = windows(source, judging, "calibration")
    symmetric = _symmetric(schemes)
    recipe = replace(config.recipe, method=config.start if symmetric else "awq")
    quantized = quantize_weights(source.graph, source.weights, recipe, ids, anchored=symmetric, progress=say)
    if recipe.fits:
        return quantized.weights
    weights = dict(source.weights)
    for moved in quantized.moved:
        weights |= moved.apply(source.weights)
    return weights


def _data(source: Source, config: QatConfig, work: Path) -> Sequences:
    """Made once, then read: what the model says may differ between machines, and a resumed run must go on with it."""
    path = work / "data.npy"
    if path.exists():
        return Sequences(np.load(path))
    kinds = config.data or source.default_kinds(config.sequences, config.length)
    counts = shares(kinds, config.sequences)
    found: dict[str, np.ndarray] = {}
    for kind, count in counts.items():
        if kind == "corpus":
            found[kind] = corpus_sequences(source.tokenizer, count, config.length, config.seed).ids
        elif kind not in KINDS:
            found[kind] = file_sequences(Path(kind), source.text, count, config.length, config.seed).ids
    found |= said(str(source.path), counts, config.length, config.seed)
    ids = np.concatenate([found[kind] for kind in kinds])
    work.mkdir(parents=True, exist_ok=True)
    partial = work / "data.partial.npy"
    np.save(partial, ids)
    partial.replace(path)
    return Sequences(ids)

"""From a model's name to a quantized folder, or GGUF file, with its card: quantize, judge, and only then write."""

import hashlib
import platform
import resource
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from headrace.align.corpus import Part, pieces, texts
from headrace.align.documents import read_tokens
from headrace.align.samples import KINDS, check_kinds, default_kinds, said, shares
from headrace.base.errors import HeadraceError, InvalidRequestError
from headrace.compress.budget import Budget
from headrace.compress.card import Blame, Card
from headrace.compress.export import folder_bytes, hf_config, hf_name, hf_tensors, text_files
from headrace.compress.gate import Evaluation, Evaluator, Thresholds, decode_speed
from headrace.compress.gguf_export import gguf_metadata, gguf_tensors, refuse_unheld
from headrace.compress.planner import Planned, Planner, lowest_rung
from headrace.compress.quantizer import Quantized, quantize_weights
from headrace.compress.recipe import Recipe
from headrace.compress.store import Store
from headrace.executors.native_weights import planned_bytes
from headrace.formats.checkpoint import Checkpoint
from headrace.formats.compressed_tensors_writer import stored_bytes, write_compressed_tensors
from headrace.formats.gguf_writer import write_gguf
from headrace.formats.model_folder import new_files, refuse_existing
from headrace.formats.safetensors import read_safetensors
from headrace.formats.weights import Weights
from headrace.graph.ir import Graph
from headrace.llm.loader import open_model
from headrace.llm.text_side import TextSide, load_text
from headrace.models.spec import ModelSpec
from headrace.numerics.schemes import GGUF_NAMES, GgufScheme, Scheme
from headrace.numerics.tensor import RawTensor
from headrace.text.tokenizer import Tokenizer

_BLAMED = 5  # matrices that are measured by themselves
_BLAME_TEXTS = 4
_CARDS = ("card.md", "card.json")
_PLANNING_TEXTS = 8  # that costs of formats are measured on


class GateError(HeadraceError):
    """A quantized model that is further from its source than was allowed; nothing was written."""

    code = "gate_failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Judging:
    """What text to calibrate on and to judge by, and how much of it.

    Attributes:
        length: tokens of each text.
        calibration_texts, held_out_texts: how many.
        calibration, held_out: as much of each of these (`headrace.align.samples`); None: of all that the model can
            give. No file is in both: a model is judged by what its calibration never saw.
        thresholds: what the gate lets pass.
    """

    length: int = 256
    calibration_texts: int = 32
    held_out_texts: int = 16
    calibration: tuple[str, ...] | None = None
    held_out: tuple[str, ...] | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)

    def __post_init__(self) -> None:
        given = [kinds for kinds in (self.calibration, self.held_out) if kinds is not None]
        for kinds in given:
            check_kinds(kinds)
        files = [{Path(kind).resolve() for kind in kinds if kind not in KINDS} for kinds in given]
        if len(files) == 2 and (both := set.intersection(*files)):
            raise InvalidRequestError(
                f"{both.pop()} cannot be both what is calibrated on and what is judged by.", "Cut it in two."
            )


@dataclass(frozen=True, slots=True)
class Source:
    """The model to quantize, opened, not read."""

    name: str
    path: Path
    checkpoint: Checkpoint
    spec: ModelSpec
    graph: Graph
    weights: Weights
    text: TextSide
    said_before: dict[tuple[object, ...], dict[str, np.ndarray]] = field(default_factory=dict, repr=False)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.text.tokenizer

    def default_kinds(self, count: int, length: int) -> tuple[str, ...]:
        """Of text, for `count` texts of `length` tokens; see `headrace.align.samples.default_kinds`."""
        return default_kinds(self.text, self.spec.max_position_embeddings, count, length)

    def says(self, counts: Mapping[str, int], length: int, part: Part) -> dict[str, np.ndarray]:
        """What `headrace.align.samples.said` finds, once for the same question."""
        key = (tuple(counts.items()), length, part)
        if key not in self.said_before:
            self.said_before[key] = said(str(self.path), counts, length, seed=0, part=part)
        return dict(self.said_before[key])


@dataclass(frozen=True, slots=True)
class Outcome:
    """One recipe's model, judged."""

    recipe: Recipe
    quantized: Quantized
    evaluation: Evaluation
    num_bytes: int


def open_source(name: str | None) -> Source:
    """Find a model. Raises as loading it does."""
    model = open_model(name)
    text = load_text(model.checkpoint)
    return Source(model.path.stem, model.path, model.checkpoint, model.spec, model.graph, model.weights, text)


def windows(source: Source, judging: Judging, part: Part, *, more: int = 0) -> np.ndarray:
    """Token ids ``[count, length]`` of the part, or of `more` texts than are asked for, kind after kind. What a model
    does not say itself is spread over all there is: beginnings of documents, then what follows in them; or a file from
    front to back.

    Raises InvalidRequestError if there is not so much text, and as `read_tokens` and `said` do.
    """
    counts = _shares(source, judging, part, more)
    found = source.says(counts, judging.length, part)
    for kind in counts.keys() - found.keys():
        documents = (
            [source.tokenizer.encode(text) for text in texts(part)]
            if kind == "corpus"
            else [read_tokens(Path(kind), source.text)]
        )
        cut = pieces(documents, judging.length)
        if len(cut) < counts[kind]:
            raise InvalidRequestError(
                f"{kind} has {len(cut)} pieces of {judging.length} tokens, not {counts[kind]}.",
                "Ask for fewer or shorter ones.",
            )
        spread = np.linspace(0, len(cut) - 1, counts[kind]).astype(int)
        found[kind] = np.array([cut[i] for i in spread], np.int64)
    return np.concatenate([found[kind] for kind in counts])


def _shares(source: Source, judging: Judging, part: Part, more: int = 0) -> dict[str, int]:
    """How many texts of each kind."""
    if part == "calibration":
        kinds, count = judging.calibration, judging.calibration_texts
    else:
        kinds, count = judging.held_out, judging.held_out_texts
    return shares(kinds or source.default_kinds(count, judging.length), count + more)


def judged(
    source: Source,
    recipe: Recipe,
    judging: Judging,
    evaluator: Evaluator,
    folder: Path,
    *,
    progress: Callable[[str], None] | None = None,
) -> Outcome:
    """Quantize by a recipe, and put the outcome, whose matrices lie in `folder`, beside the source."""
    ids = windows(source, judging, "calibration")
    store = Store(folder, _identity(source, recipe, ids))
    quantized = quantize_weights(source.graph, source.weights, recipe, ids, store=store, progress=progress)
    evaluation = evaluator.compare(quantized.weights, activation=recipe.activation)
    return Outcome(recipe, quantized, evaluation, _stored_bytes(source, quantized, recipe))


def make_planner(source: Source, recipe: Recipe, judging: Judging) -> Planner:
    """Measure what each matrix costs in each format, on some texts of the calibration; GPTQ is fitted to others."""
    count = min(_PLANNING_TEXTS, judging.calibration_texts)
    ids = windows(source, judging, "calibration", more=count)
    measured = np.linspace(0, len(ids) - 1, count).astype(int)
    return Planner(source.spec, source.graph, source.weights, recipe, ids[measured], np.delete(ids, measured, axis=0))


def make_evaluator(source: Source, judging: Judging, folder: Path | None = None) -> Evaluator:
    """Over the held-out texts; see `Evaluator` for the folder."""
    ids = windows(source, judging, "held_out")
    kinds = [kind for kind, count in _shares(source, judging, "held_out").items() for _ in range(count)]
    return Evaluator(source.graph, source.weights, ids.tolist(), folder, kinds=kinds)


def quantize_model(
    name: str | None,
    target: Path,
    recipe: Recipe,
    judging: Judging,
    *,
    command: Sequence[str],
    progress: Callable[[str], None],
    aim: Budget | float | None = None,
    max_shard_bytes: int | None = None,
) -> Card:
    """Quantize a model into a new folder, or a new GGUF file with its cards beside it, if it passes the gate.

    With an `aim`, each matrix gets a format of its own in place of the recipe's: the best for a budget, or those of the
    smallest model whose mean KL, measured as the gate does, is at most that number.

    Finished matrices are kept beside `target` until it is whole, so that a run that was stopped goes on where it was.

    Raises:
        GateError: it does not pass. Nothing is written; what is finished is kept, for other thresholds.
        InvalidRequestError: `target` exists, the recipe does not fit it or the model, or no formats fit the budget.
        LimitError: no formats are as near to the source as `aim` asks for.
        UnsupportedModelError: `target` cannot hold such a model.
        StorageError: something cannot be written.
    """
    start = time.perf_counter()
    _check_target(target, recipe)
    source = open_source(name)
    described = _described(source, recipe)
    if aim is None:
        schemes = recipe.schemes(source.graph)  # what is wrong with it shows before anything takes time
        if recipe.is_gguf:
            refuse_unheld({name: tensor for name, tensor in source.weights.items() if name not in schemes})
    work = target.parent / f".{target.name}.work"
    evaluator = make_evaluator(source, judging, target.parent)
    planned, outcome = _made(source, recipe, judging, evaluator, aim, work, progress)
    blame = _blame(source, outcome, evaluator)
    if exceeded := judging.thresholds.exceeded(outcome.evaluation.divergence):
        worst = [each.name for each in sorted(blame, key=lambda each: -(each.kl_mean or 0))[:3]]
        raise GateError(
            f"The quantized model is too far from its source: {'; '.join(exceeded)}. Nothing was written.",
            f"Spare what costs most (--ignore {' --ignore '.join(worst)}), use another method or more bits, or raise"
            " the thresholds.",
        )
    card = _card(source, judging, planned, outcome, blame, start, command)
    cards = dict(zip(_CARDS, (card.to_markdown(), card.to_json()), strict=True))
    if recipe.is_gguf:
        tensors = gguf_tensors(source.checkpoint, source.spec, outcome.quantized.weights)
        _write_gguf_and_cards(described, tensors, target, cards)
    else:
        weights, schemes = outcome.quantized.weights, outcome.quantized.schemes
        write_folder(source, described, weights, schemes, target, cards, max_shard_bytes=max_shard_bytes)
    shutil.rmtree(work, ignore_errors=True)
    return card


def _card(
    source: Source,
    judging: Judging,
    planned: Planned | None,
    outcome: Outcome,
    blame: Sequence[Blame],
    start: float,
    command: Sequence[str],
) -> Card:
    """What is known of a model that passed, its speed measured now."""
    activation = outcome.recipe.executor_activation
    return Card(
        source=source.name,
        recipe=outcome.recipe,
        planned=planned,
        calibration_tokens=judging.calibration_texts * judging.length,
        calibration=tuple(_shares(source, judging, "calibration")),
        evaluation=outcome.evaluation,
        source_bytes=_source_bytes(source.checkpoint),
        quantized_bytes=outcome.num_bytes,
        source_memory=_memory(source, source.weights, None),
        quantized_memory=_memory(source, outcome.quantized.weights, outcome.recipe),
        bits_per_weight=_bits_per_weight(outcome.quantized),
        source_speed=decode_speed(source.graph, source.weights),
        quantized_speed=decode_speed(source.graph, outcome.quantized.weights, activation=activation),
        blame=blame,
        seconds=time.perf_counter() - start,
        peak_memory=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        machine=f"{_cpu()}, {platform.machine()}",
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        command=shlex.join(command),
    )


def _made(
    source: Source,
    recipe: Recipe,
    judging: Judging,
    evaluator: Evaluator,
    aim: Budget | float | None,
    work: Path,
    progress: Callable[[str], None],
) -> tuple[Planned | None, Outcome]:
    """The model that is asked for, judged, and how its formats were chosen. Each trial of a search keeps its matrices
    apart, so that a run that was stopped repeats none."""

    def make(recipe: Recipe, folder: Path) -> Outcome:
        return judged(source, recipe, judging, evaluator, folder, progress=progress)

    if aim is None:
        return None, make(recipe, work)
    progress("what each matrix costs in each format")
    planner = make_planner(source, recipe, judging)
    if isinstance(aim, Budget):
        planned = planner.within(aim)
        return planned, make(planned.recipe, work)
    found: dict[int, tuple[Planned, Outcome]] = {}

    def measure(rung: int) -> float:
        planned = planner.at(rung, f"KL {aim:g}")
        outcome = make(planned.recipe, work / f"rung-{rung}")
        kl = outcome.evaluation.divergence.kl_mean
        progress(f"{planned.bits:.3f} bits: KL {kl:.4g}")
        if kl <= aim:
            found.clear()  # what passes later is smaller; one model is held at a time
            found[rung] = planned, outcome
        return kl

    return found[lowest_rung(planner.ladder, aim, measure)]


def _check_target(target: Path, recipe: Recipe) -> None:
    refuse_existing(target)
    if (target.suffix == ".gguf") != recipe.is_gguf:
        kind = "GGUF file" if target.suffix == ".gguf" else "folder"
        raise InvalidRequestError(
            f"A {kind} ({target}) does not hold {recipe.format}.",
            f"A GGUF file (a name that ends with .gguf) holds {', '.join(GGUF_NAMES)}; a folder holds the others.",
        )
    if recipe.is_gguf:
        for name in _CARDS:
            refuse_existing(target.with_suffix(f".{name}"))


def _described(source: Source, recipe: Recipe) -> dict[str, object]:
    """What config.json, or a GGUF file's metadata, shall say."""
    if recipe.is_gguf:
        return gguf_metadata(source.checkpoint, source.spec, source.weights, recipe.format)
    return hf_config(source.checkpoint, source.spec)


def _stored_bytes(source: Source, quantized: Quantized, recipe: Recipe) -> int:
    """Of all tensors in the file or the folder's files."""
    if not recipe.is_gguf:
        return folder_bytes(source.spec, quantized.weights, quantized.schemes)
    return sum(each.num_bytes for each in gguf_tensors(source.checkpoint, source.spec, quantized.weights).values())


def _source_bytes(checkpoint: Checkpoint) -> int:
    """The same of the source's."""
    if checkpoint.kind == "gguf":
        return sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
    files = (read_safetensors(path).values() for path in checkpoint.weight_files)
    return sum(tensor.num_bytes for tensors in files for tensor in tensors)


def _write_gguf_and_cards(
    metadata: Mapping[str, object], tensors: Mapping[str, RawTensor], target: Path, cards: Mapping[str, str]
) -> None:
    """``NAME.gguf``, ``NAME.card.md`` and ``NAME.card.json``: all or none of them."""
    with new_files(*(target.with_suffix(f".{name}") for name in cards), target) as (*card_paths, path):
        for card_path, content in zip(card_paths, cards.values(), strict=True):
            card_path.write_text(content)
        write_gguf(path, metadata, tensors)


def write_folder(
    source: Source,
    config: Mapping[str, object],
    weights: Mapping[str, RawTensor],
    schemes: Mapping[str, Scheme],
    target: Path,
    notes: Mapping[str, str],
    *,
    max_shard_bytes: int | None = None,
) -> None:
    """A model's folder: weights (in shards if there is a limit), config, tokenizer, and text files by name.

    Whole or not at all.
    """
    stored = {hf_name(source.spec, name): scheme for name, scheme in schemes.items()}
    with tempfile.TemporaryDirectory() as made:
        files = text_files(source.checkpoint, Path(made))
        files = [path for path in files if path.name not in notes]
        for name, content in notes.items():
            files.append(Path(made) / name)
            files[-1].write_text(content)
        tensors = hf_tensors(source.spec, weights)
        write_compressed_tensors(target, config, tensors, stored, files, max_shard_bytes=max_shard_bytes)


def _blame(source: Source, outcome: Outcome, evaluator: Evaluator) -> list[Blame]:
    """All matrices, those whose outputs err most first; of the first few, what each costs by itself (inputs in f32)."""
    order = sorted(outcome.quantized.rounded, key=lambda rounded: -rounded.error)
    moves = {name: moved for moved in outcome.quantized.moved for name in moved.matrices}
    blame = []
    for i, rounded in enumerate(order):
        kl = None
        if i < _BLAMED:
            around = moves[rounded.name].apply(source.weights) if rounded.name in moves else {}
            alone = {**source.weights, **around, rounded.name: rounded.tensor}
            kl = evaluator.compare(alone, num_texts=_BLAME_TEXTS).divergence.kl_mean
        blame.append(Blame(name=rounded.name, error=rounded.error, kl_mean=kl))
    return blame


def _bits_per_weight(quantized: Quantized) -> float:
    """Of the quantized matrices, as they are stored."""
    num_bytes = num_weights = 0
    for rounded in quantized.rounded:
        scheme = quantized.schemes[rounded.name]
        is_gguf = isinstance(scheme, GgufScheme)
        num_bytes += rounded.tensor.num_bytes if is_gguf else stored_bytes(rounded.tensor, scheme)
        num_weights += rounded.tensor.shape[0] * rounded.tensor.shape[1]
    return 8 * num_bytes / num_weights


def _memory(source: Source, weights: Mapping[str, RawTensor], recipe: Recipe | None) -> int:
    """Bytes of weights in the executor that serves them on this machine; `recipe`'s, or the source's as they are."""
    if recipe is None:
        return planned_bytes(source.graph, weights, None, "auto")
    if not recipe.is_gguf:  # what is not quantized is stored otherwise than in the source
        stored = hf_tensors(source.spec, weights)
        weights = {name: stored[hf_name(source.spec, name)] for name in weights}
    return planned_bytes(source.graph, weights, None, recipe.executor_activation)


def _identity(source: Source, recipe: Recipe, calibration: np.ndarray) -> dict[str, object]:
    """What finished matrices depend on."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.checkpoint.weight_files]
    return {
        "files": [list(file) for file in files],
        "recipe": {**asdict(recipe), "ignore": list(recipe.ignore)},
        "calibration": [*calibration.shape, hashlib.sha256(calibration.tobytes()).hexdigest()],
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"

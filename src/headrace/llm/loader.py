"""From a model's name to everything that an engine needs: spec, graph, weights, tokenizer, template, executor."""

import logging
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from headrace.base.errors import CapacityError
from headrace.base.settings import Settings, cache_folder, from_environment
from headrace.base.system import available_memory
from headrace.engine.executor import Executor
from headrace.executors.kv_layout import kv_bytes_per_block, kv_bytes_per_value
from headrace.formats.checkpoint import Checkpoint, open_checkpoint
from headrace.formats.resolve import resolve_model
from headrace.formats.weights import Weights, load_weights, matrices_in
from headrace.graph.cost import Formats
from headrace.graph.ir import Graph
from headrace.graph.passes import fuse
from headrace.llm.config import LLMConfig
from headrace.llm.memory import MemoryPlan, plan_memory
from headrace.llm.text_side import TextSide, load_text
from headrace.models import build_graph, ignorable, load_spec, sources
from headrace.models.spec import ModelSpec
from headrace.numerics.formats import format_named
from headrace.numerics.row_blocks import row_blocks

log = logging.getLogger(__name__)


class Stopwatch:
    """Seconds spent in each named part of a start, in order."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        name: as the user would say it: what was asked for, or the file's or folder's name.
        path: what was loaded.
        spec, graph, weights: the model as it runs: fused, and in another number format if that was asked for.
        text: its tokenizer and chat template.
        executor: runs its steps.
        memory: how large its KV cache is, and why.
        seconds: how long each part of the start took.
    """

    name: str
    path: Path
    spec: ModelSpec
    graph: Graph
    weights: Weights
    text: TextSide
    executor: Executor
    memory: MemoryPlan
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model found and described, not packed: weights are views of its mapped files, the graph is not fused."""

    path: Path
    checkpoint: Checkpoint
    spec: ModelSpec
    graph: Graph
    weights: Weights


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A model that is not loaded: its name, graph (fused), stored weights, and how its memory would be used, or why it
    does not fit."""

    name: str
    graph: Graph
    weights: Weights
    memory: MemoryPlan | CapacityError


def open_model(name: str | None, *, max_model_len: int | None = None) -> OpenedModel:
    """Find a model and map its files. Raises HeadraceError subclasses that say what is wrong and what to do.

    Args:
        name: as the user says it; None: the embedded model.
        max_model_len: as in `LLMConfig`; some RoPE scalings depend on it.
    """
    path = resolve_model(name)
    checkpoint = open_checkpoint(path)
    spec = load_spec(checkpoint.config, checkpoint.kind, tensors=checkpoint.tensors, context_length=max_model_len)
    graph = build_graph(spec)
    weights = load_weights(checkpoint, graph.params, sources(spec, checkpoint.kind), ignorable(checkpoint.kind))
    return OpenedModel(path, checkpoint, spec, graph, weights)


def load_model(name: str | None, config: LLMConfig) -> LoadedModel:
    """Find, read and pack a model. Raises HeadraceError subclasses that say what is wrong and what to do."""
    watch = Stopwatch()
    settings = from_environment()  # first: a misspelled variable is an error, whatever is loaded
    if config.executor == "native":
        from headrace.executors.native_isa import available_isa

        available_isa(config.isa or settings.isa)
    with watch.part("open"):
        model = open_model(name, max_model_len=config.max_model_len)
        path, spec, weights = model.path, model.spec, model.weights
        graph = fuse(model.graph) if config.fuse else model.graph
        if config.weight_format is not None:
            weights = matrices_in(config.weight_format, weights)
    if weights.unused:
        log.warning("%s: tensors that this model does not use: %s", path.name, ", ".join(weights.unused))
    memory = _plan_memory(spec, graph, weights, config, settings)
    # Packing leaves the interpreter free, so a tokenizer that loads beside it costs no time of its own.
    with ThreadPoolExecutor(1) as helper:
        text = helper.submit(_load_text, model.checkpoint, watch)
        with watch.part("pack weights"):
            executor = _make_executor(graph, weights, memory, config, settings, model.checkpoint.weight_files)
        try:
            with watch.part("wait for tokenizer"):
                text_side = text.result()
        except BaseException:
            executor.close()
            raise
    return LoadedModel(
        _display_name(name, path), path, spec, graph, weights, text_side, executor, memory, dict(watch.parts)
    )


def stored_formats(graph: Graph, weights: Weights, kv_format: str = "bf16") -> Formats:
    """Bytes that the model's numbers take as they are stored, for the cost model."""
    return Formats(
        param_bytes={param: weights[param].num_bytes for param in graph.params},
        kv_element_bytes=kv_bytes_per_value(graph.kv_layers, kv_format),
    )


def kernel_kind(format_name: str, in_features: int) -> str:
    """Which kernels multiply a matrix of that format, where there are several: those of "blocks" (GGUF's), of
    "row_blocks", of "byte_rows", signed bytes of one scale a row, or of "plain" numbers, which also take what integer
    kernels do not."""
    layout = row_blocks(format_name)
    if layout is not None:
        if layout.element == "int8" and layout.group_size == in_features and in_features % 32 == 0:
            return "byte_rows"
        return "row_blocks" if layout.element != "fp8" and layout.group_size % 32 == 0 else "plain"
    return "blocks" if format_named(format_name).block_size > 1 else "plain"


def main_kernel_kind(graph: Graph, weights: Weights) -> str:
    """`kernel_kind` of most bytes of the matrices that linears read."""
    num_bytes: Counter[str] = Counter()
    for name in graph.linear_matrices:
        tensor = weights[name]
        num_bytes[kernel_kind(tensor.format.name, tensor.shape[1])] += tensor.num_bytes
    return num_bytes.most_common(1)[0][0]


def load_graph(name: str | None, *, fused: bool) -> tuple[Graph, Weights]:
    """A model's graph and its stored tensors, with nothing packed: for showing and pricing."""
    model = open_model(name)
    return (fuse(model.graph) if fused else model.graph), model.weights


def plan_model(name: str | None, config: LLMConfig) -> ModelPlan:
    """What `load_model` would find and plan for, with nothing packed. Raises as it does, but for memory."""
    settings = from_environment()
    model = open_model(name, max_model_len=config.max_model_len)
    graph = fuse(model.graph)
    memory: MemoryPlan | CapacityError
    try:
        memory = _plan_memory(model.spec, graph, model.weights, config, settings)
    except CapacityError as error:
        memory = error
    return ModelPlan(_display_name(name, model.path), graph, model.weights, memory)


def _plan_memory(spec: ModelSpec, graph: Graph, weights: Weights, config: LLMConfig, settings: Settings) -> MemoryPlan:
    return plan_memory(
        block_bytes=kv_bytes_per_block(graph.kv_layers, config.block_size, config.kv_format),
        block_size=config.block_size,
        weight_bytes=_weight_bytes(graph, weights, config, settings),
        context_length=spec.max_position_embeddings,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        kv_cache_memory=config.kv_cache_memory,
        available=available_memory(),
    )


def _weight_bytes(graph: Graph, weights: Weights, config: LLMConfig, settings: Settings) -> int:
    """What the weights will take in memory, before any of it is taken."""
    if config.executor == "torch":  # decodes every parameter to f32
        return sum(4 * prod(param.shape) for param in graph.params.values())
    from headrace.executors.native_weights import planned_bytes

    return planned_bytes(graph, weights, config.isa or settings.isa, config.activation)


def _load_text(checkpoint: Checkpoint, watch: Stopwatch) -> TextSide:
    with watch.part("tokenizer (beside packing)"):
        return load_text(checkpoint)


def _make_executor(
    graph: Graph,
    weights: Weights,
    memory: MemoryPlan,
    config: LLMConfig,
    settings: Settings,
    files: list[Path],
) -> Executor:
    if config.executor == "torch":
        from headrace.executors.torch_executor import TorchExecutor

        return TorchExecutor(
            graph, weights, num_blocks=memory.num_blocks, block_size=config.block_size, kv_format=config.kv_format
        )
    from headrace.executors.native import NativeExecutor
    from headrace.executors.weight_cache import WeightCache, source_of

    folder = cache_folder() if config.weight_cache == "auto" else None
    cache = WeightCache(folder / "packed", source_of(files)) if folder else None
    return NativeExecutor(
        graph,
        weights,
        num_blocks=memory.num_blocks,
        block_size=config.block_size,
        kv_format=config.kv_format,
        activation=config.activation,
        num_threads=config.num_threads or settings.num_threads,
        fuse=config.fuse,
        isa=config.isa or settings.isa,
        max_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=memory.max_model_len,
        weight_cache=cache,
    )


def _display_name(name: str | None, path: Path) -> str:
    if name is None:
        return "smollm2-135m"
    return path.stem if path.suffix == ".gguf" and name.endswith(".gguf") else name.rstrip("/").rsplit("/", 1)[-1]

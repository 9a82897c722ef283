"""Executors over a checkpoint, all made alike, for tests that hold for each of them."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from headrace.engine.executor import Executor
from headrace.formats.checkpoint import open_checkpoint
from headrace.formats.weights import load_weights
from headrace.graph.passes import fuse
from headrace.models.decoder import build_graph
from headrace.models.registry import ignorable, load_spec, sources

EXECUTORS = ("torch", "native")


@contextmanager
def executor_of(
    kind: str,
    path: Path,
    *,
    num_blocks: int = 64,
    block_size: int = 16,
    kv_format: str = "f32",
    activation: str = "f32",
    fused: bool = True,
    context_length: int | None = None,
    max_rows: int = 128,
) -> Iterator[Executor]:
    """The executor of that kind over a GGUF file or a Hugging Face folder; every stored tensor must be used.

    `max_rows` bounds a step's tokens, and so what it samples. Only the native executor allocates by it.
    """
    checkpoint = open_checkpoint(path)
    spec = load_spec(checkpoint.config, checkpoint.kind, tensors=checkpoint.tensors, context_length=context_length)
    graph = build_graph(spec)
    weights = load_weights(
        checkpoint, graph.params, sources(spec, checkpoint.kind), ignorable=ignorable(checkpoint.kind)
    )
    assert not weights.unused, f"unused tensors: {weights.unused}"
    graph = fuse(graph) if fused else graph
    made: Executor
    if kind == "torch":
        from headrace.executors.torch_executor import TorchExecutor

        made = TorchExecutor(graph, weights, num_blocks=num_blocks, block_size=block_size, kv_format=kv_format)
    else:
        from headrace.executors.native import NativeExecutor

        made = NativeExecutor(
            graph,
            weights,
            num_blocks=num_blocks,
            block_size=block_size,
            kv_format=kv_format,
            activation=activation,
            num_threads=2,
            max_batched_tokens=max_rows,
            max_num_seqs=max_rows,
        )
    with closing(made):
        yield made

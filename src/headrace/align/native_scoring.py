"""The native executor as scoring needs it: a KV pool for a few sequences of known length, and every row sampled."""

from collections.abc import Mapping

from headrace.align.forced import ROWS_PER_STEP
from headrace.base.settings import from_environment
from headrace.executors.native import NativeExecutor
from headrace.executors.native_isa import available_isa
from headrace.graph.ir import Graph
from headrace.numerics.tensor import RawTensor

_BLOCK_SIZE = 16


def scoring_executor(
    graph: Graph,
    weights: Mapping[str, RawTensor],
    length: int,
    *,
    at_once: int = 1,
    rows_per_step: int = ROWS_PER_STEP,
    kv_format: str = "f32",
    activation: str = "f32",
    num_threads: int | None = None,
    isa: str | None = None,
    fuse: bool = True,
) -> NativeExecutor:
    """An executor for `at_once` sequences of up to `length` tokens.

    Its memory is that of the packed weights, of the sequences' KV blocks, and of `rows_per_step` rows of activations
    and logits.

    Args:
        rows_per_step: tokens that a step may have, all of them sampled.
        num_threads, isa: None: what the environment says, as an engine does.

    See `NativeExecutor` for the rest, and for what it raises; InvalidRequestError if the environment cannot be read, or
    names what this machine lacks.
    """
    settings = from_environment()
    return NativeExecutor(
        graph,
        weights,
        num_blocks=at_once * -(-length // _BLOCK_SIZE),
        block_size=_BLOCK_SIZE,
        kv_format=kv_format,
        activation=activation,
        num_threads=num_threads or settings.num_threads,
        isa=available_isa(isa or settings.isa),
        fuse=fuse,
        max_batched_tokens=rows_per_step,
        max_num_seqs=rows_per_step,
        max_model_len=length,
    )

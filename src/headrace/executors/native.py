"""The CPU executor: a graph compiled once into a native plan over packed weights and a paged KV cache."""

import mmap
from collections.abc import Mapping
from typing import Any

import numpy as np

from headrace import _native
from headrace.base.errors import CapacityError, ExecutorError
from headrace.engine.step import Int32, Step, StepResult
from headrace.executors.kv_layout import kv_bytes_per_block
from headrace.executors.native_plan import CompiledPlan, compile_plan
from headrace.executors.native_sampling import EncodedRows, SamplingEncoder
from headrace.executors.native_weights import PackedWeights, StagedUpdate
from headrace.executors.weight_cache import WeightCache
from headrace.graph.ir import Graph, Rows
from headrace.numerics.kv_formats import KV_FORMATS
from headrace.numerics.tensor import RawTensor

ACTIVATIONS = ("auto", "f32", "int16", "bf16", "int8")
_RAW_NOT_FINITE = 1


class NativeExecutor:
    """Runs steps on this machine's cores. See `headrace.engine.executor.Executor`.

    Args:
        graph: a model; fuse it first for speed.
        weights: one stored tensor per parameter of the graph, vectors in any format.
        num_blocks, block_size: the KV pool. Blocks take memory once they are written.
        kv_format: one of `kv_formats.KV_FORMATS`.
        activation: how linears read their input: ``f32`` (exactly, or to 2^-17); ``bf16``; ``int16`` or ``int8``, fixed
            point of the largest magnitude in each group of a quantized weight (plain weights read f32; int16 with AMX:
            in each row, weights in 16 bits too); or ``auto``, the fastest of f32 and int16 on that instruction set.
        num_threads: threads, the caller's included; None: the cores this process may use.
        fuse: keep values that one op alone reads out of memory. Off, the results are the same, slower: for comparison.
        isa: a name from ``headrace._native.available_isas()``; None: the best of them.
        max_batched_tokens, max_num_seqs: rows, and sequences and sampled rows, that a step may have.
        max_model_len: positions that a sequence may have.
        weight_cache: where packed weights are kept between starts; None: pack every time.

    Raises ExecutorError for an instruction set or a number format that there is no kernel for, and CapacityError where
    memory does not suffice.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, RawTensor],
        *,
        num_blocks: int,
        block_size: int = 16,
        kv_format: str = "bf16",
        activation: str = "f32",
        num_threads: int | None = None,
        fuse: bool = True,
        isa: str | None = None,
        max_batched_tokens: int = 512,
        max_num_seqs: int = 64,
        max_model_len: int = 4096,
        weight_cache: WeightCache | None = None,
    ) -> None:
        assert kv_format in KV_FORMATS, f"kv_format is one of {KV_FORMATS}"
        assert activation in ACTIVATIONS, f"activation is one of {ACTIVATIONS}"
        self._graph, self._fuse = graph, fuse
        self._block_size, self._num_blocks = block_size, num_blocks
        self._vocab_size = graph.node(graph.output).features
        self._max_rows = {Rows.TOKENS: max_batched_tokens, Rows.SAMPLED: max_num_seqs}
        try:
            self._runtime: _native.Runtime | None = _native.Runtime(
                num_threads=num_threads or 0,
                isa=isa or "",
                activation=activation,
                max_tokens=max_batched_tokens,
                max_sampled=max_num_seqs,
                max_positions=max_model_len,
                vocab_size=self._vocab_size,
                num_blocks=num_blocks,
                block_size=block_size,
                kv_format=kv_format,
            )
            self._reserve_kv(kv_format)
            self._weights = PackedWeights(graph, weights, self._runtime, weight_cache)
            self._plans: dict[tuple[str, ...], CompiledPlan] = {}
            self._timed = False
            self._sampling = SamplingEncoder()
            self._plan(())
        except ValueError as error:
            raise ExecutorError(f"The native executor cannot run this: {error}.") from error
        except MemoryError as error:
            raise CapacityError(
                "The system refused the memory for the weights or the activations.",
                "Use fewer KV blocks, fewer batched tokens, or a smaller model.",
            ) from error

    @property
    def block_size(self) -> int:
        return self._block_size

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def num_threads(self) -> int:
        return self._open().num_threads

    @property
    def isa(self) -> str:
        return self._open().isa

    def execute(self, step: Step) -> StepResult:
        """Run one step. Raises ExecutorError, before anything is computed, for a step that does not fit the pool or the
        limits, and after it for a sampled row that has no token to choose."""
        self._open()
        try:
            compiled = self._plan(step.taps)
            rows = self._sampling.encode(step.sampling)
            result, status = _empty_result(rows), np.zeros(rows.num_rows, dtype=np.int32)
            compiled.plan.replay(
                *_arrays(step),
                *rows.arrays(),
                result.token_ids,
                result.logprobs,
                result.top_ids,
                result.top_logprobs,
                status,
                self._timed,
            )
        except (ValueError, TypeError, OverflowError, MemoryError) as error:
            raise ExecutorError(f"The step cannot be run: {error}.") from error
        if status.any():
            raise _sampling_error(status)
        if not step.taps:
            return result
        counts = {Rows.TOKENS: len(step.token_ids), Rows.SAMPLED: len(step.sample_rows)}
        taps = {name: compiled.plan.read(view, counts[compiled.tap_rows[name]]) for name, view in compiled.taps.items()}
        return StepResult(result.token_ids, result.logprobs, result.top_ids, result.top_logprobs, taps)

    def stage_weights(self, weights: Mapping[str, RawTensor]) -> StagedUpdate:
        """Pack other values of all parameters, in the formats that they have now, on the calling thread.

        Takes as much memory again as the packed weights. Raises ExecutorError for tensors of other formats or shapes,
        and CapacityError where memory does not suffice.
        """
        self._open()
        try:
            return self._weights.stage(weights)
        except MemoryError as error:
            raise CapacityError(
                "The system refused the memory for a second set of weights.", "Free as much as the weights take."
            ) from error

    def swap_weights(self, staged: StagedUpdate) -> None:
        """Exchange the weights between two steps; `staged` then holds those that ran until now."""
        self._open()
        self._weights.swap(staged)

    def describe(self) -> dict[str, Any]:
        """What was chosen and what it takes: threads, instruction set, kernels per shape, bytes, ops, last barriers."""
        runtime = self._open()
        return {
            "isa": runtime.isa,
            "activation": runtime.activation,
            "num_threads": runtime.num_threads,
            "kernels": self._weights.kernels(),
            "packed_bytes": runtime.packed_bytes,
            "weights_from_cache": self._weights.from_cache,
            "arena_bytes": runtime.arena_bytes,
            "kv_bytes": runtime.kv_bytes,
            "num_ops": self._plan(()).plan.num_ops,
            "num_barriers": self._plan(()).plan.num_barriers,
        }

    def profile(self, *, start: bool = False) -> dict[str, tuple[float, int]]:
        """Seconds spent in each kind of op and how many ran, since timing was started with ``start=True``."""
        self._timed = self._timed or start
        return self._plan(()).plan.profile()

    def close(self) -> None:
        """Free threads and memory. Idempotent."""
        if self._runtime is not None:
            self._plans.clear()
            del self._weights
            self._runtime = None

    def _reserve_kv(self, kv_format: str) -> None:
        layers = self._graph.kv_layers
        try:
            self._open().reserve_kv([(layer.num_kv_heads, layer.head_dim) for layer in layers])
        except MemoryError as error:
            block_bytes = kv_bytes_per_block(layers, self._block_size, kv_format)
            raise CapacityError(
                f"The system refused the memory for {self._num_blocks} KV blocks of {self._block_size} tokens.",
                f"At most {_num_granted(block_bytes, self._num_blocks)} fit.",
            ) from error

    def _open(self) -> _native.Runtime:
        assert self._runtime is not None, "the executor is closed"
        return self._runtime

    def _plan(self, taps: tuple[str, ...]) -> CompiledPlan:
        """The plan that keeps `taps`, made when first asked for."""
        if taps not in self._plans:
            names = {node.name for node in self._graph.nodes}
            if unknown := sorted(set(taps) - names):
                raise ExecutorError(f"The graph has no node {unknown[0]!r} to tap.")
            self._plans[taps] = compile_plan(
                self._graph, self._weights, self._open(), self._max_rows, taps, fuse=self._fuse
            )
        return self._plans[taps]


def _num_granted(block_bytes: int, num_blocks: int) -> int:
    """How many of `num_blocks` blocks the system would grant."""
    fit, refused = 0, num_blocks
    while refused - fit > 1:
        middle = (fit + refused) // 2
        try:
            mmap.mmap(-1, middle * block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
            fit = middle
        except (OSError, OverflowError):
            refused = middle
    return fit


def _arrays(step: Step) -> tuple[Int32, Int32, Int32, Int32, Int32, Int32]:
    return (
        _int32("token_ids", step.token_ids),
        _int32("positions", step.positions),
        _int32("seq_starts", step.seq_starts),
        _int32("context_lens", step.context_lens),
        _int32("block_tables", step.block_tables, ndim=2),
        _int32("sample_rows", step.sample_rows),
    )


def _int32(name: str, array: Int32, ndim: int = 1) -> Int32:
    # A silent cast would make other numbers of numbers that do not fit.
    if array.dtype != np.int32 or array.ndim != ndim:
        raise TypeError(f"{name} is {array.dtype} of {array.ndim} dimensions, not int32 of {ndim}")
    return np.ascontiguousarray(array)


def _empty_result(rows: EncodedRows) -> StepResult:
    shape = (rows.num_rows, rows.num_top)
    return StepResult(
        token_ids=np.empty(rows.num_rows, dtype=np.int32),
        logprobs=np.full(rows.num_rows, np.nan, dtype=np.float32),
        top_ids=np.full(shape, -1, dtype=np.int32),
        top_logprobs=np.full(shape, np.nan, dtype=np.float32),
    )


def _sampling_error(status: Int32) -> ExecutorError:
    row = int(status.nonzero()[0][0])
    if status[row] == _RAW_NOT_FINITE:
        return ExecutorError(
            f"Sampled row {row} has no token to choose: its logits are not finite.", "Check the weights."
        )
    return ExecutorError(f"Sampled row {row} has no token to choose: every token is banned.", "Ban fewer tokens.")

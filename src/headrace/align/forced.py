"""Teacher forcing: what a model says at every position of given tokens, through any executor."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from headrace.base.errors import ContextLengthError, InvalidRequestError
from headrace.engine.executor import Executor
from headrace.engine.sampling import SamplingParams
from headrace.engine.step import Float32, Int32, SampleRow, Step

ROWS_PER_STEP = 64
"""Tokens of a step, all of them sampled, unless another number is asked for: what executors sample by default."""

_GREEDY = SampleRow(SamplingParams(temperature=0.0), seed=0, index=0)
_SCORED = SamplingParams(temperature=0.0, logprobs=0)


def forced_values(
    executor: Executor, token_ids: Sequence[int], taps: Sequence[str], *, rows_per_step: int = ROWS_PER_STEP
) -> Iterator[Mapping[str, Float32]]:
    """Feed one sequence's tokens to an executor and yield the tapped values of each step.

    The executor must be idle: the sequence takes its KV blocks from 0 on. Nothing is kept between calls.

    Args:
        executor: runs the steps; its pool must hold the sequence.
        token_ids: n tokens, at least one.
        taps: names of graph nodes.
        rows_per_step: tokens of a step, and rows that it samples; an executor has its own limit for both.

    Yields:
        For each step, float32 ``[rows, features]`` by node. Rows are the step's tokens, in order.

    Raises InvalidRequestError for tokens outside the vocabulary or none, and ContextLengthError if the pool is too
    small.
    """
    ids = _checked(executor, token_ids)
    for step in _steps(executor, ids, (_GREEDY,) * len(ids), tuple(taps), rows_per_step):
        yield executor.execute(step).taps


def forced_logits(
    executor: Executor, output: str, token_ids: Sequence[int], *, rows_per_step: int = ROWS_PER_STEP
) -> Float32:
    """The logits after each token: float32 ``[n, vocab]``, row i being what follows ``token_ids[: i + 1]``.

    Args:
        output: the name of the node that makes them, ``graph.output``.

    See `forced_values` for the rest. n rows of a large vocabulary are large: 200 kB each at 49,152 tokens.
    """
    steps = forced_values(executor, token_ids, (output,), rows_per_step=rows_per_step)
    return np.concatenate([values[output] for values in steps])


def forced_logprobs(executor: Executor, token_ids: Sequence[int], *, rows_per_step: int = ROWS_PER_STEP) -> Float32:
    """The log-probability of each token after the first, float32 ``[n - 1]``, by the executor's own sampler.

    Where the executor is deterministic, they are the bits that it gave when it chose these tokens.
    See `forced_values` for the rest; at least two tokens.
    """
    ids = _checked(executor, token_ids)
    if len(ids) < 2:
        raise InvalidRequestError("One token has nothing to predict.", "Give at least two.")
    rows = tuple(scored_row(token) for token in ids[1:].tolist())
    results = [executor.execute(step) for step in _steps(executor, ids[:-1], rows, (), rows_per_step)]
    chosen = np.concatenate([result.token_ids for result in results])
    assert np.array_equal(chosen, ids[1:]), "a biased token was not chosen"
    return np.concatenate([result.logprobs for result in results])


def scored_row(token_id: int) -> SampleRow:
    """What samples this very token, and reports its log-probability."""
    return SampleRow(_SCORED.forcing(token_id), seed=0, index=0)


def _steps(
    executor: Executor, ids: Int32, rows: tuple[SampleRow, ...], taps: tuple[str, ...], rows_per_step: int
) -> Iterator[Step]:
    """One sequence, some tokens at a time, a row sampled at each."""
    block_table = np.arange(-(-len(ids) // executor.block_size), dtype=np.int32)[None]
    for start in range(0, len(ids), rows_per_step):
        chunk = ids[start : start + rows_per_step]
        end = start + len(chunk)
        yield Step(
            token_ids=chunk,
            positions=np.arange(start, end, dtype=np.int32),
            seq_starts=np.array([0, len(chunk)], np.int32),
            context_lens=np.array([end], np.int32),
            block_tables=block_table[:, : -(-end // executor.block_size)],
            sample_rows=np.arange(len(chunk), dtype=np.int32),
            sampling=rows[start:end],
            taps=taps,
        )


def _checked(executor: Executor, token_ids: Sequence[int]) -> Int32:
    ids = np.asarray(token_ids, np.int64)
    if ids.ndim != 1 or not len(ids):
        raise InvalidRequestError("There are no tokens to score.", "Give at least one.")
    if not 0 <= ids.min() <= ids.max() < executor.vocab_size:
        outside = ids.min() if ids.min() < 0 else ids.max()
        raise InvalidRequestError(
            f"Token {outside} is outside the vocabulary of {executor.vocab_size}.",
            "Encode with this model's tokenizer.",
        )
    room = executor.num_blocks * executor.block_size
    if len(ids) > room:
        raise ContextLengthError(
            f"{len(ids)} tokens do not fit the {room} that the KV pool holds.", "Score shorter texts, or give it more."
        )
    return ids.astype(np.int32)

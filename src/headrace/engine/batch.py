"""What the scheduler chose, and how it becomes a `Step`."""

from typing import NamedTuple

import numpy as np

from headrace.base.errors import ExecutorError
from headrace.engine.kv_manager import KVManager, SequenceBlocks
from headrace.engine.request import Sequence
from headrace.engine.step import SampleRow, Step, StepResult


class Advance(NamedTuple):
    """One sequence's part of a step: compute its next `num_tokens` wanted tokens."""

    sequence: Sequence
    num_tokens: int


def build_step(batch: list[Advance], kv: KVManager) -> Step:
    """The step's flat arrays. Lists first and one array each at the end: numpy is slow on single elements."""
    token_ids: list[int] = []
    positions: list[int] = []
    seq_starts: list[int] = [0]
    context_lens: list[int] = []
    sample_rows: list[int] = []
    sampling: list[SampleRow] = []
    blocks: list[SequenceBlocks] = []
    for sequence, num_tokens in batch:
        tokens = sequence.tokens
        start = sequence.num_computed
        stop = start + num_tokens
        if num_tokens == 1:
            token_ids.append(tokens[start])
            positions.append(start)
        else:
            token_ids += tokens[start:stop]
            positions += range(start, stop)
        seq_starts.append(len(token_ids))
        context_lens.append(stop)
        if stop == len(tokens):
            sample_rows.append(len(token_ids) - 1)
            sampling.append(sequence.steady_row or sequence.sample_row())
        assert sequence.blocks is not None
        blocks.append(sequence.blocks)
    return Step(
        token_ids=np.array(token_ids, np.int32),
        positions=np.array(positions, np.int32),
        seq_starts=np.array(seq_starts, np.int32),
        context_lens=np.array(context_lens, np.int32),
        block_tables=kv.block_tables(blocks),
        sample_rows=np.array(sample_rows, np.int32),
        sampling=tuple(sampling),
    )


def check_result(step: Step, result: StepResult, vocab_size: int) -> None:
    """Raise ExecutorError unless `result` holds one token of the vocabulary per sampled row, and logprobs if asked."""
    num_rows = len(step.sampling)
    shapes = (result.token_ids.shape, result.logprobs.shape, result.top_ids.shape[:1], result.top_logprobs.shape[:1])
    if any(shape != (num_rows,) for shape in shapes):
        raise ExecutorError(f"The executor answered {num_rows} sampled rows with arrays of shapes {shapes}.")
    if num_rows and not (result.token_ids.min() >= 0 and result.token_ids.max() < vocab_size):
        raise ExecutorError(f"The executor chose a token outside the vocabulary of {vocab_size}.")

"""The only things that engine and executor exchange: a step's work as flat arrays, and what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from headrace.engine.sampling import SamplingParams

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(slots=True)  # not frozen: one is made per token, and that would take three times as long
class SampleRow:
    """How to choose the next token at one sampled row.

    Attributes:
        params: what the user asked of sampling.
        seed: the sequence's own random seed, 0 … 2^63 - 1 (already derived from the request's seed and the sample's
            number).
        index: how many tokens the sequence has produced so far. The random number is a pure function of
            ``(seed, index)``, so a preempted or rescheduled sequence draws the same one again. Where the temperature
            is 0 no number is drawn, and seed and index may both be 0 (one row object then serves every step).
        prompt_ids: the prompt, for the repetition penalty. Empty where no penalty is asked.
        output_ids: the tokens produced so far, for the penalties. Empty where no penalty is asked.
        banned_ids: tokens that may not be chosen here (end-of-sequence tokens before ``min_tokens`` are reached).
    """

    params: SamplingParams
    seed: int
    index: int
    prompt_ids: tuple[int, ...] = ()
    output_ids: tuple[int, ...] = ()
    banned_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One step's work over S sequences, T token rows in all and R sampled rows.

    Sequence s owns token rows ``seq_starts[s] : seq_starts[s + 1]``; its rows have consecutive positions that end at
    ``context_lens[s] - 1``. Everything before those rows is already in the KV cache, in its block table.

    Attributes:
        token_ids: int32 [T].
        positions: int32 [T].
        seq_starts: int32 [S + 1].
        context_lens: int32 [S], KV length of each sequence once this step's tokens are in.
        block_tables: int32 [S, B], block numbers in order of position, padded with -1. Block i of a sequence holds
            positions ``i * block_size … (i + 1) * block_size - 1``.
        sample_rows: int32 [R], token rows whose logits are wanted, ascending.
        sampling: R entries, one for each of `sample_rows`.
        taps: names of graph nodes whose output rows are wanted in the result.
    """

    token_ids: Int32
    positions: Int32
    seq_starts: Int32
    context_lens: Int32
    block_tables: Int32
    sample_rows: Int32
    sampling: tuple[SampleRow, ...]
    taps: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step made, for R sampled rows.

    Attributes:
        token_ids: int32 [R], the chosen tokens.
        logprobs: float32 [R], log-probability of the chosen token under the raw logits: before temperature,
            penalties, bias or any truncation. NaN for rows that asked for no logprobs.
        top_ids: int32 [R, K], the K most likely tokens of the raw distribution, best first (ties: lower id first);
            K is the largest ``logprobs`` that any row asked for. A row that asked for fewer is padded with -1.
        top_logprobs: float32 [R, K], their raw log-probabilities.
        taps: the asked-for node outputs, float32 [rows, features].
    """

    token_ids: Int32
    logprobs: Float32
    top_ids: Int32
    top_logprobs: Float32
    taps: Mapping[str, Float32] = field(default_factory=dict)

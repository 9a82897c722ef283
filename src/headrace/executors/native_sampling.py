"""The sampling parameters of a step as the flat arrays that the native sampler reads."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from headrace.engine.sampling import SamplingParams
from headrace.engine.step import SampleRow


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """R rows.

    Attributes:
        numbers: float64 [R, 6]: temperature, top_p, min_p, repetition, presence and frequency penalty.
        integers: int64 [R, 4]: seed, index, top_k, logprobs (-1: none).
        ids: int32: of each row in turn its bias ids, banned ids, prompt and output.
        ends: int64 [4 R + 1]: where each of those lists ends.
        bias: float64: the bias values, in the order of the bias ids.
    """

    numbers: npt.NDArray[np.float64]
    integers: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int64]
    bias: npt.NDArray[np.float64]

    @property
    def num_rows(self) -> int:
        return len(self.numbers)

    @property
    def num_top(self) -> int:
        """The most alternatives that any row asks for."""
        return max(0, int(self.integers[:, 3].max(initial=0)))

    def arrays(
        self,
    ) -> tuple[
        npt.NDArray[np.float64],
        npt.NDArray[np.int64],
        npt.NDArray[np.int32],
        npt.NDArray[np.int64],
        npt.NDArray[np.float64],
    ]:
        """In the order in which the native plan takes them."""
        return self.numbers, self.integers, self.ids, self.ends, self.bias


class SamplingEncoder:
    """Encodes the rows of one step after another.

    A decoding batch asks the same from step to step, but for its rows' numbers: only what changed is made again. So
    what `encode` returns holds until the next call.
    """

    def __init__(self) -> None:
        self._rows: tuple[SampleRow, ...] | None = None
        self._params: list[SamplingParams] = []
        self._seeds: list[int] = []
        self._plain = _encode_params([])  # of rows that name no tokens but those in their parameters
        self._encoded = self._plain

    def encode(self, rows: tuple[SampleRow, ...]) -> EncodedRows:
        """The arrays of some rows. Seeds are taken as 64-bit two's complement."""
        if rows == self._rows:
            return self._encoded
        self._rows = None  # until all of it is done
        params = [row.params for row in rows]
        seeds = [row.seed for row in rows]
        if params != self._params:
            self._params, self._plain = params, _encode_params(params)
            self._seeds = []
        if seeds != self._seeds:
            self._plain.integers[:, 0] = [_signed(seed) for seed in seeds]
            self._seeds = seeds
        self._plain.integers[:, 1] = [row.index for row in rows]
        with_ids = [row for row in rows if row.banned_ids or row.prompt_ids or row.output_ids]
        self._encoded = _with_ids(self._plain, rows) if with_ids else self._plain
        self._rows = rows
        return self._encoded


def _encode_params(params: list[SamplingParams]) -> EncodedRows:
    """Rows of seed and index 0 without banned, prompt and output ids."""
    numbers = [
        (p.temperature, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params
    ]
    integers = [(0, 0, p.top_k, -1 if p.logprobs is None else p.logprobs) for p in params]
    num_biases = [(len(p.logit_bias), 0, 0, 0) for p in params]
    return EncodedRows(
        np.array(numbers, dtype=np.float64).reshape(-1, 6),
        np.array(integers, dtype=np.int64).reshape(-1, 4),
        np.array([token for p in params for token in p.logit_bias], dtype=np.int32),
        np.cumsum([0, *itertools.chain(*num_biases)], dtype=np.int64),
        np.array([value for p in params for value in p.logit_bias.values()], dtype=np.float64),
    )


def _with_ids(plain: EncodedRows, rows: Sequence[SampleRow]) -> EncodedRows:
    """The rows with all of their ids."""
    ids: list[int] = []
    ends = [0]
    for row in rows:
        for part in (row.params.logit_bias, row.banned_ids, row.prompt_ids, row.output_ids):
            ids.extend(part)
            ends.append(len(ids))
    return replace(plain, ids=np.array(ids, dtype=np.int32), ends=np.array(ends, dtype=np.int64))


def _signed(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63

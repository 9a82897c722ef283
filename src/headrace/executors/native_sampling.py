"""The sampling parameters of a step as the flat arrays that the native sampler reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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


def encode(rows: Sequence[SampleRow]) -> EncodedRows:
    """The arrays of some rows. Seeds are taken as 64-bit two's complement."""
    numbers, integers = [], []
    ids: list[int] = []
    ends = [0]
    bias: list[float] = []
    for row in rows:
        p = row.params
        numbers.append((p.temperature, p.top_p, p.min_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty))
        integers.append((_signed(row.seed), row.index, p.top_k, -1 if p.logprobs is None else p.logprobs))
        for part in (p.logit_bias, row.banned_ids, row.prompt_ids, row.output_ids):
            ids.extend(part)
            ends.append(len(ids))
        bias.extend(p.logit_bias.values())
    return EncodedRows(
        np.array(numbers, dtype=np.float64).reshape(-1, 6),
        np.array(integers, dtype=np.int64).reshape(-1, 4),
        np.array(ids, dtype=np.int32),
        np.array(ends, dtype=np.int64),
        np.array(bias, dtype=np.float64),
    )


def _signed(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63

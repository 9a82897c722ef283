"""Teacher forcing of several continuations of one beginning, which is computed once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from headrace.align.forced import scored_row
from headrace.base.errors import ContextLengthError
from headrace.engine.executor import Executor
from headrace.engine.step import Float32, SampleRow, Step


@dataclass(frozen=True, slots=True)
class Branches:
    """A beginning and what may follow it: token ids, at least one in `shared`, at least one in each of `ends`."""

    shared: tuple[int, ...]
    ends: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        assert self.shared, "a beginning without tokens"
        assert self.ends, "nothing that follows"
        assert all(self.ends), "a continuation without tokens"

    @property
    def length(self) -> int:
        """Tokens of the beginning with its longest continuation."""
        return len(self.shared) + max(map(len, self.ends))


def branch_logprobs(
    executor: Executor, asked: Sequence[Branches], *, rows_per_step: int
) -> Iterator[tuple[Float32, ...]]:
    """The log-probabilities of each continuation's tokens, by the executor's own sampler.

    Several beginnings share a step, each with its next continuation. Where the executor is deterministic, the outcome
    is to the bit that of each text alone.

    Args:
        executor: idle; sequences take its KV blocks from 0 on. Nothing is kept between calls.
        asked: in any number.
        rows_per_step: tokens that a step may have, and rows that it may sample.

    Yields:
        For each of `asked`, in order: float32 ``[len(end)]`` for each of its ends.

    Raises ContextLengthError for one that by itself exceeds the KV pool or a step.
    """
    for group in _groups(executor, asked, rows_per_step):
        found: list[list[Float32]] = [[] for _ in group]
        for number in range(max(len(each.ends) for each in group)):
            going = [i for i, each in enumerate(group) if number < len(each.ends)]
            result = executor.execute(_step(executor, group, going, number))
            ends = [group[i].ends[number] for i in going]
            forced = [token for end in ends for token in end]
            assert result.token_ids.tolist() == forced, "a biased token was not chosen"
            parts = np.split(result.logprobs, np.cumsum([len(end) for end in ends])[:-1])
            for i, part in zip(going, parts, strict=True):
                found[i].append(part)
        yield from map(tuple, found)


def _groups(executor: Executor, asked: Sequence[Branches], rows_per_step: int) -> Iterator[list[Branches]]:
    """As many neighbours at a time as pool and step hold."""
    group: list[Branches] = []
    for each in asked:
        if not _fits(executor, [each], rows_per_step):
            room = min(rows_per_step, executor.num_blocks * executor.block_size)
            raise ContextLengthError(f"{each.length} tokens do not fit the {room} of a step.", "Score shorter texts.")
        if not _fits(executor, [*group, each], rows_per_step):
            yield group
            group = []
        group.append(each)
    if group:
        yield group


def _fits(executor: Executor, group: Sequence[Branches], rows_per_step: int) -> bool:
    blocks = sum(_num_blocks(executor, each) for each in group)
    return blocks <= executor.num_blocks and sum(each.length for each in group) <= rows_per_step


def _num_blocks(executor: Executor, each: Branches) -> int:
    return -(-each.length // executor.block_size)


def _step(executor: Executor, group: Sequence[Branches], going: Sequence[int], number: int) -> Step:
    """The `number`-th end of those of the group that have one: the first along with its beginning, each further one in
    the place of the one before it, from the beginning's last token on, whose logits it begins with::

        0 ........... len(shared) - 1 | len(shared) ...... len(shared) + len(end) - 2
        |--- in the first step alone -|- in every step; all these rows are sampled --|
    """
    firsts = np.cumsum([0, *(_num_blocks(executor, each) for each in group)])
    tables = np.full((len(going), max(_num_blocks(executor, group[i]) for i in going)), -1, np.int32)
    ids: list[int] = []
    positions: list[int] = []
    starts, lengths = [0], []
    rows: list[int] = []
    sampling: list[SampleRow] = []
    for row, i in enumerate(going):
        shared, end = group[i].shared, group[i].ends[number]
        tables[row, : firsts[i + 1] - firsts[i]] = np.arange(firsts[i], firsts[i + 1])
        begin = 0 if number == 0 else len(shared) - 1
        ids += [*shared, *end[:-1]][begin:]
        positions += range(begin, len(shared) + len(end) - 1)
        starts.append(len(ids))
        lengths.append(len(shared) + len(end) - 1)
        rows += range(len(ids) - len(end), len(ids))
        sampling += map(scored_row, end)
    return Step(
        token_ids=np.array(ids, np.int32),
        positions=np.array(positions, np.int32),
        seq_starts=np.array(starts, np.int32),
        context_lens=np.array(lengths, np.int32),
        block_tables=tables,
        sample_rows=np.array(rows, np.int32),
        sampling=tuple(sampling),
    )

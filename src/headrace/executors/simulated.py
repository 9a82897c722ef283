"""An executor without a model: its tokens are a hash of the context, read back through the block tables.

For engine tests, where a wrong block table, a block reused too early or a prefix shared wrongly must show, and for
simulation on a virtual clock, where only the price of a step matters.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.base.clock import VirtualClock
from headrace.base.errors import InvalidRequestError
from headrace.engine.step import Float32, SampleRow, Step, StepResult

UInt64 = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]

_MASK64 = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_POSITION = 0xD1B54A32D192ED03


@dataclass(slots=True)
class StagedSalt:
    """The one parameter of a `SimulatedExecutor`, ready to be exchanged."""

    salt: int


class SimulatedExecutor:
    """Keeps a KV pool of (token, position, hash of the context up to here) and believes nothing that it can check.

    The hash of a context is ``sum(mix(token + position * P + salt))`` modulo 2^64 over its tokens, so a slot extends
    the one before it, and a whole batch is a cumulative sum. The salt, 0 at first, stands for a model's weights. The
    token distribution at a context with hash h ranks tokens ``h mod V, h mod V + 1, …`` (modulo the vocabulary V) from
    most to least likely; sampling at a temperature above 0 picks any of them by ``mix(h, seed, index)``. Penalties,
    bias and truncation have no effect.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        clock: VirtualClock | None = None,
        cost: Callable[[Step], float] | None = None,
        verify: bool = True,
    ) -> None:
        """Args:
        clock: advanced by ``cost(step)`` seconds in every step.
        cost: seconds that a step takes; None: no time.
        verify: read every context back in full (O(context) a step) instead of its last slot only.
        """
        if cost is not None and clock is None:
            raise InvalidRequestError("A cost without a clock has no effect.", "Pass the VirtualClock to advance.")
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._clock = clock
        self._cost = cost
        self._verify = verify
        self._salt = 0
        self._tokens: Int64 = np.full(num_blocks * block_size, -1, np.int64)
        self._positions: Int64 = np.full(num_blocks * block_size, -1, np.int64)
        self._hashes: UInt64 = np.zeros(num_blocks * block_size, np.uint64)

    @property
    def block_size(self) -> int:
        return self._block_size

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def execute(self, step: Step) -> StepResult:
        hashes = self._write(step)
        if self._verify:
            self._read_back(step)
        if self._clock is not None and self._cost is not None:
            self._clock.advance(self._cost(step))
        return self._sample(hashes[step.sample_rows], step.sampling)

    def stage_weights(self, weights: Mapping[str, int]) -> StagedSalt:
        """The salt is the only parameter."""
        if weights.keys() != {"salt"}:
            raise InvalidRequestError(f"The weights are {sorted(weights)}, not salt alone.", "Give the salt.")
        return StagedSalt(weights["salt"])

    def swap_weights(self, staged: StagedSalt) -> None:
        self._salt, staged.salt = staged.salt, self._salt

    def close(self) -> None:
        """Holds nothing."""

    # -- The pool ---------------------------------------------------------------------------------------------------

    def _write(self, step: Step) -> UInt64:
        """Put the step's tokens into their slots; the context hash at every row, uint64 [T]."""
        starts, stops = step.seq_starts[:-1], step.seq_starts[1:]
        counts = stops - starts
        assert (counts > 0).all(), "a sequence without rows"
        assert (step.positions[stops - 1] == step.context_lens - 1).all(), "rows do not end the context"
        sequences = np.repeat(np.arange(len(counts)), counts)
        first = step.positions[starts]
        offsets = np.arange(len(step.token_ids)) - starts[sequences]
        assert (step.positions == first[sequences] + offsets).all(), "a sequence's positions are not consecutive"
        slots = self._slots(step, sequences, step.positions)
        assert len(np.unique(slots)) == len(slots), "two rows write one slot"
        running = np.cumsum(_contribution(step.token_ids, step.positions, self._salt), dtype=np.uint64)
        before_batch = np.concatenate([np.zeros(1, np.uint64), running])[starts]
        hashes: UInt64 = running + (self._hash_before(step, first) - before_batch)[sequences]
        self._tokens[slots], self._positions[slots], self._hashes[slots] = step.token_ids, step.positions, hashes
        return hashes

    def _hash_before(self, step: Step, first: npt.NDArray[np.int32]) -> UInt64:
        """The context hash before each sequence's first row, uint64 [S]; 0 at the start of a context."""
        previous = np.maximum(first - 1, 0)
        slots = self._slots(step, np.arange(len(first)), previous)
        continued = first > 0
        assert (self._positions[slots] == previous)[continued].all(), "the KV before a sequence's rows is not its own"
        before: UInt64 = np.where(continued, self._hashes[slots], np.uint64(0))
        return before

    def _read_back(self, step: Step) -> None:
        """Assert that every slot of every context holds what its successors were computed from."""
        for sequence, length in enumerate(step.context_lens.tolist()):
            positions = np.arange(length)
            slots = self._slots(step, np.full(length, sequence), positions)
            tokens = self._tokens[slots]
            assert (self._positions[slots] == positions).all(), "a context's blocks are out of order or overwritten"
            expected = np.cumsum(_contribution(tokens, positions, self._salt), dtype=np.uint64)
            assert (self._hashes[slots] == expected).all(), "a block holds the KV of another context"
            row = np.searchsorted(step.sample_rows, step.seq_starts[sequence + 1] - 1)
            if row < len(step.sample_rows) and step.sample_rows[row] == step.seq_starts[sequence + 1] - 1:
                sampling = step.sampling[row]
                history = sampling.prompt_ids + sampling.output_ids
                assert not history or history == tuple(tokens.tolist()), "penalties would see another context"
                assert not history or sampling.index == len(sampling.output_ids), "the random index is off"

    def _slots(self, step: Step, sequences: npt.NDArray[np.integer], positions: npt.NDArray[np.integer]) -> Int64:
        columns = positions // self._block_size
        assert (columns < step.block_tables.shape[1]).all(), "a block table is too short or out of range"
        blocks = step.block_tables[sequences, columns].astype(np.int64)
        assert ((blocks >= 0) & (blocks < self._num_blocks)).all(), "a block table is too short or out of range"
        slots: Int64 = blocks * self._block_size + positions % self._block_size
        return slots

    # -- The distribution -------------------------------------------------------------------------------------------

    def _sample(self, hashes: UInt64, sampling: tuple[SampleRow, ...]) -> StepResult:
        """Choose a token for each of R sampled rows, given their context hashes, uint64 [R]."""
        ranks = np.array(
            [_rank(h, row, self._vocab_size) for h, row in zip(hashes.tolist(), sampling, strict=True)], np.int64
        )
        best = (hashes % np.uint64(self._vocab_size)).astype(np.int64)
        token_ids = (best + ranks) % self._vocab_size
        for i, row in enumerate(sampling):
            while row.banned_ids and token_ids[i] in row.banned_ids:
                token_ids[i] = (token_ids[i] + 1) % self._vocab_size
        asked = np.array([-1 if row.params.logprobs is None else row.params.logprobs for row in sampling], np.int64)
        width = min(max(asked.max(initial=0), 0), self._vocab_size)
        places = np.arange(width)
        is_asked = places < asked[:, None]
        return StepResult(
            token_ids=token_ids.astype(np.int32),
            logprobs=np.where(asked >= 0, _logprobs(hashes, (token_ids - best) % self._vocab_size), np.float32("nan")),
            top_ids=np.where(is_asked, (best[:, None] + places) % self._vocab_size, -1).astype(np.int32),
            top_logprobs=np.where(is_asked, _logprobs(hashes[:, None], places), np.float32("nan")),
        )


def next_token(context_ids: Sequence[int], row: SampleRow, vocab_size: int, salt: int = 0) -> int:
    """What `SimulatedExecutor` must choose after `context_ids`, in plain integers: the truth for tests."""
    contributions = (
        _mix((token + position * _POSITION + salt) & _MASK64) for position, token in enumerate(context_ids)
    )
    context_hash = sum(contributions) & _MASK64
    token_id = (context_hash % vocab_size + _rank(context_hash, row, vocab_size)) % vocab_size
    while token_id in row.banned_ids:
        token_id = (token_id + 1) % vocab_size
    return token_id


def _rank(context_hash: int, row: SampleRow, vocab_size: int) -> int:
    """How far down the distribution to go: the most likely token for greedy rows, anywhere for others."""
    if row.params.temperature == 0.0:
        return 0
    return _mix((_mix((context_hash + row.seed) & _MASK64) + row.index) & _MASK64) % vocab_size


def _logprobs(hashes: UInt64, ranks: Int64) -> Float32:
    """Falling with the rank, and different between contexts."""
    return (-0.5 - 0.25 * ranks - (hashes >> np.uint64(40)) * 2.0**-24).astype(np.float32)


def _contribution(token_ids: npt.NDArray[np.integer], positions: npt.NDArray[np.integer], salt: int) -> UInt64:
    """A token's part of its context's hash: `_mix` over arrays, wrapping modulo 2^64."""
    z = token_ids.astype(np.uint64) + positions.astype(np.uint64) * np.uint64(_POSITION) + np.uint64(salt)
    z = z + np.uint64(_GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX[0])
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX[1])
    return z ^ (z >> np.uint64(31))


def _mix(value: int) -> int:
    """One round of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014)."""
    z = (value + _GAMMA) & _MASK64
    z = ((z ^ (z >> 30)) * _MIX[0]) & _MASK64
    z = ((z ^ (z >> 27)) * _MIX[1]) & _MASK64
    return z ^ (z >> 31)

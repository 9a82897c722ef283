"""Which sequences advance in a step, and by how much."""

from bisect import insort

from headrace.engine.batch import Advance
from headrace.engine.config import EngineConfig
from headrace.engine.kv_manager import KVManager
from headrace.engine.policy import Policy
from headrace.engine.request import Sequence, SequenceState


class Scheduler:
    """Lets computed tokens catch up with wanted tokens, within a token budget.

    There are no phases. Decode wants one token, a new prompt all of its own, a preempted sequence its prompt and output
    again; each is given some of what it wants:

    1. Running sequences, in the policy's order. Each leaves a token of the budget for every one behind it, so all of
       them advance in every step. One that needs a block when none can be had preempts the last in order.
    2. Waiting sequences, in the policy's order, while there are budget, places and blocks. A sequence is let in only
       with blocks for all its tokens, so a prefill never stops for want of them; the first that does not fit
       holds back those behind it.

    Every sequence ends: the first of all running ones in order is never preempted, for while others run they are
    the victims, and alone it fits the pool (admission saw to that), so it advances in every step. While the first of
    all waiting ones does not fit nobody else gets in, and the running ones end one after another.
    """

    def __init__(self, config: EngineConfig, kv: KVManager, policy: Policy) -> None:
        self._config = config
        self._kv = kv
        self._policy = policy
        self._max_chunk = config.max_prefill_chunk or config.max_num_batched_tokens
        self._running: list[Sequence] = []  # in order
        self._waiting: list[Sequence] = []  # in reverse order: the next one is at the end
        self._held: dict[int, list[Sequence]] = {}  # by request serial: for the first sample to compute the prompt
        self._too_few_blocks = -1  # blocks that could be had when the next waiting sequence last failed to fit
        self.num_preemptions = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + sum(map(len, self._held.values()))

    def add(self, samples: list[Sequence]) -> None:
        """Take the samples of one request.

        With prefix caching, all but the first are held until it has computed the prompt; they find it in the cache.
        """
        for sequence in samples:
            sequence.order = self._policy.order(sequence)
        first, *others = samples
        self._wait(first)
        if not self._config.enable_prefix_caching:
            for sequence in others:
                self._wait(sequence)
        elif others:
            for sequence in others:
                sequence.state = SequenceState.HELD
            self._held[first.serial] = others

    def schedule(self) -> list[Advance]:
        """The next step's advances; empty only if no sequence is left. Commit or remove all of them before the next."""
        batch: list[Advance] = []
        budget = self._schedule_running(batch, self._config.max_num_batched_tokens)
        self._schedule_waiting(batch, budget)
        assert batch or not self.num_waiting, "the scheduler is stuck"
        return batch

    def commit(self, advance: Advance) -> None:
        """The advance's tokens are computed: their full blocks can be shared."""
        sequence, num_tokens = advance
        sequence.num_computed += num_tokens
        assert sequence.blocks is not None
        self._kv.commit(sequence.blocks, sequence.tokens, sequence.num_computed)
        if sequence.index == 0 and self._held and sequence.num_computed >= sequence.num_prompt_tokens:
            self._release_held(sequence.serial)

    def preempt_all(self) -> None:
        """Take the blocks of every running sequence; all wait to be computed again."""
        while self._running:
            self._preempt_last()

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, whatever its state, and free its blocks."""
        if sequence.blocks is not None:
            self._running.remove(sequence)
            self._close(sequence)
        elif sequence.state is SequenceState.HELD:
            self._held[sequence.serial].remove(sequence)
        elif sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
            self._too_few_blocks = -1
        sequence.state = SequenceState.FINISHED
        if sequence.index == 0:
            self._release_held(sequence.serial)

    def check_integrity(self) -> None:
        """Assert that every sequence is where its state says, in order, with blocks just while it runs."""
        assert self._running == sorted(self._running, key=_order), "running sequences are out of order"
        assert self._waiting == sorted(self._waiting, key=_order, reverse=True), "waiting sequences are out of order"
        assert len(self._running) <= self._config.max_num_seqs, "too many sequences run"
        for sequence in self._running:
            assert sequence.state is SequenceState.RUNNING
            assert sequence.blocks is not None, "a running sequence has no blocks"
            assert sequence.num_computed < len(sequence.tokens), "a running sequence wants nothing"
        for sequence in self._waiting:
            assert sequence.state is SequenceState.WAITING
            assert sequence.blocks is None, "a waiting sequence has blocks"
            assert sequence.num_computed == 0, "a waiting sequence has computed tokens"
        for held in self._held.values():
            assert all(sequence.state is SequenceState.HELD for sequence in held)
            assert all(sequence.blocks is None for sequence in held), "a held sequence has blocks"

    # -- Scheduling -------------------------------------------------------------------------------------------------

    def _schedule_running(self, batch: list[Advance], budget: int) -> int:
        """Advance running sequences; returns the budget left. Victims lie behind whoever needs their blocks."""
        max_chunk = self._max_chunk
        index = 0
        while index < len(self._running):
            sequence = self._running[index]
            num_behind = len(self._running) - index - 1
            num_tokens = min(len(sequence.tokens) - sequence.num_computed, max_chunk, budget - num_behind)
            assert sequence.blocks is not None
            while not self._kv.grow(sequence.blocks, sequence.num_computed + num_tokens):
                self._preempt_last()
                if sequence.state is not SequenceState.RUNNING:
                    return budget  # it was the last itself
            batch.append(Advance(sequence, num_tokens))
            budget -= num_tokens
            index += 1
        return budget

    def _schedule_waiting(self, batch: list[Advance], budget: int) -> None:
        while self._waiting and budget > 0 and len(self._running) < self._config.max_num_seqs:
            sequence = self._waiting[-1]
            if self._running and self._kv.num_available <= self._too_few_blocks:
                return  # as little room as when it last did not fit
            blocks = self._kv.open(sequence.tokens)
            if blocks is None:
                self._too_few_blocks = self._kv.num_available
                return
            self._too_few_blocks = -1
            self._waiting.pop()
            sequence.blocks = blocks
            sequence.num_computed = blocks.num_cached_tokens
            sequence.state = SequenceState.RUNNING
            insort(self._running, sequence, key=_order)
            num_tokens = min(len(sequence.tokens) - sequence.num_computed, self._max_chunk, budget)
            batch.append(Advance(sequence, num_tokens))
            budget -= num_tokens

    def _preempt_last(self) -> None:
        """Take the blocks of the last running sequence; it waits to be computed again. Its full blocks stay cached."""
        victim = self._running.pop()
        self._close(victim)
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self._wait(victim)

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        insort(self._waiting, sequence, key=_reverse_order)
        if self._waiting[-1] is sequence:
            self._too_few_blocks = -1

    def _release_held(self, serial: int) -> None:
        for sequence in self._held.pop(serial, ()):
            self._wait(sequence)

    def _close(self, sequence: Sequence) -> None:
        assert sequence.blocks is not None
        self._kv.close(sequence.blocks)
        sequence.blocks = None
        sequence.num_computed = 0


def _order(sequence: Sequence) -> tuple[float, ...]:
    return sequence.order


def _reverse_order(sequence: Sequence) -> tuple[float, ...]:
    return tuple(-part for part in sequence.order)

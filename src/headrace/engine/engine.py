"""The step loop: schedule, execute, commit."""

from dataclasses import dataclass

from headrace.base.clock import Clock, SystemClock
from headrace.base.errors import ExecutorError, HeadraceError, InvalidRequestError
from headrace.engine.admission import max_length
from headrace.engine.batch import Advance, build_step, check_result
from headrace.engine.config import EngineConfig
from headrace.engine.events import Event, FailedEvent, FinishedEvent, TokenEvent
from headrace.engine.executor import Executor
from headrace.engine.kv_manager import KVManager
from headrace.engine.metrics import EngineMetrics, EngineSnapshot, RequestMetrics
from headrace.engine.policy import FirstCome, Policy
from headrace.engine.request import FinishReason, Request, Sequence, SequenceState, make_sequences
from headrace.engine.scheduler import Scheduler
from headrace.engine.step import StepResult


@dataclass(slots=True)
class _Live:
    """A request of which at least one sample goes on."""

    samples: list[Sequence]
    arrival_time: float
    num_unfinished: int


class Engine:
    """Serves requests on an executor, a step at a time.

    Single-threaded: its owner serializes all calls. Every request that `add` takes ends in exactly one of: a
    `FinishedEvent` for each of its samples, one `FailedEvent`, or `cancel`.
    """

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig | None = None,
        *,
        clock: Clock | None = None,
        policy: Policy | None = None,
    ) -> None:
        """Borrows the executor: closing it is the caller's."""
        self.config = config or EngineConfig()
        self.clock = clock or SystemClock()
        self._executor = executor
        self._kv = KVManager(
            executor.num_blocks,
            executor.block_size,
            max_num_seqs=self.config.max_num_seqs,
            max_len=self.config.max_model_len,
            enable_prefix_caching=self.config.enable_prefix_caching,
        )
        self._scheduler = Scheduler(self.config, self._kv, policy or FirstCome())
        self._live: dict[str, _Live] = {}
        self._num_added = 0
        self._metrics = EngineMetrics()
        self.weight_version = 0
        """Of the weights that the next step runs with: 0 for those it was made with."""

    @property
    def vocab_size(self) -> int:
        return self._executor.vocab_size

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def num_running(self) -> int:
        """Sequences that hold KV blocks."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Sequences that do not: new, preempted, or held for a sibling's prompt."""
        return self._scheduler.num_waiting

    # -- The story --------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Advance some sequences; what came of it, in no promised order between requests. Empty if there is no work.

        An executor that raises fails the requests in this step, and no other; what the step may have written is
        freed and never shared.
        """
        started = self.clock.now()
        batch = self._scheduler.schedule()
        if not batch:
            return []
        self._note_first_schedules(batch, started)
        step = build_step(batch, self._kv)
        execute_started = self.clock.now()
        try:
            result = self._executor.execute(step)
            check_result(step, result, self._executor.vocab_size)
        except Exception as error:
            return self._fail(batch, error)
        executed = self.clock.now()
        events = self._commit(batch, result, executed)
        self._metrics.execute_seconds.observe(executed - execute_started)
        self._metrics.step_seconds.observe(self.clock.now() - started)
        self._metrics.batch_sequences.observe(len(batch))
        self._metrics.batch_tokens.observe(len(step.token_ids))
        self._metrics.computed_tokens += len(step.token_ids)
        return events

    def _commit(self, batch: list[Advance], result: StepResult, now: float) -> list[Event]:
        """Take the step's tokens. The rows of the result are the sequences that caught up, in the batch's order."""
        events: list[Event] = []
        token_ids = result.token_ids.tolist()
        row = 0
        for advance in batch:
            sequence = advance.sequence
            self._scheduler.commit(advance)
            if sequence.num_computed < len(sequence.tokens):
                continue
            token_id = token_ids[row]
            if sequence.first_token_time is None:
                sequence.first_token_time = now
            sequence.last_token_time = now
            reason = sequence.append(token_id)
            events.append(self._token_event(sequence, token_id, result, row))
            if reason is not None:
                events.append(self._finish(sequence, reason))
            row += 1
        self._metrics.output_tokens += row
        return events

    # -- Requests ---------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Take a request. It first runs in a later step.

        Raises:
            InvalidRequestError, ContextLengthError, CapacityError: it can never be served as it is; nothing changed.
        """
        try:
            if request.request_id in self._live:
                raise InvalidRequestError(
                    f"A request with id {request.request_id!r} is being served.", "Use an id of its own."
                )
            max_len = max_length(
                request,
                vocab_size=self._executor.vocab_size,
                max_model_len=self.config.max_model_len,
                pool_tokens=self._kv.num_blocks * self._kv.block_size,
            )
        except HeadraceError:
            self._metrics.requests["rejected"] += 1
            raise
        samples = make_sequences(request, serial=self._num_added, max_len=max_len)
        arrival_time = self.clock.now() if request.arrival_time is None else request.arrival_time
        self._num_added += 1
        self._live[request.request_id] = _Live(samples, arrival_time, len(samples))
        self._scheduler.add(samples)

    def cancel(self, request_id: str) -> bool:
        """Drop a request in any state and free what it holds, now. No event follows. False if it is not served."""
        if request_id not in self._live:
            return False
        self._drop(request_id, "cancelled")
        return True

    def finish_sequence(self, request_id: str, index: int, stop_reason: str) -> FinishedEvent:
        """End one unfinished sample where its caller found the stop string `stop_reason`, and free what it holds, now.

        The event is returned, not repeated by a step.
        """
        sequence = self._live[request_id].samples[index]
        assert sequence.state is not SequenceState.FINISHED, f"sample {index} of {request_id!r} has ended"
        sequence.stop_reason = stop_reason
        return self._finish(sequence, "stop")

    # -- State ------------------------------------------------------------------------------------------------------

    def clear_prefix_cache(self) -> int:
        """Forget cached prefixes that no running sequence uses; how many blocks."""
        return self._kv.clear_cache()

    def install_weights(self, staged: object, version: int, *, recompute: bool) -> None:
        """Run the next step, and those after it, with other weights. What was cached is never found again.

        Args:
            staged: from the executor's `stage_weights`; holds the old weights afterwards.
            version: what the tokens to come are to carry.
            recompute: compute what running sequences have so far again, with the new weights (they count as preempted);
                else they go on from the keys and values that the old weights gave.
        """
        self._executor.swap_weights(staged)
        self.weight_version = version
        if recompute:
            self._scheduler.preempt_all()
        self._kv.retire_cache()

    def snapshot(self) -> EngineSnapshot:
        """Counters, histograms and gauges of this moment."""
        self._metrics.preemptions = self._scheduler.num_preemptions
        return EngineSnapshot(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            kv_blocks_total=self._kv.num_blocks,
            kv_blocks_in_use=self._kv.num_blocks - self._kv.num_available,
            kv_blocks_cached=self._kv.num_cached,
            weight_version=self.weight_version,
            metrics=self._metrics.snapshot(),
        )

    def check_integrity(self) -> None:
        """Assert that every block and every sequence is accounted for. For tests: it looks at everything."""
        self._kv.check_integrity()
        self._scheduler.check_integrity()
        unfinished = 0
        for live in self._live.values():
            going_on = sum(sequence.state is not SequenceState.FINISHED for sequence in live.samples)
            assert going_on == live.num_unfinished > 0, "a request's unfinished samples are miscounted"
            unfinished += going_on
        assert unfinished == self.num_running + self.num_waiting, "the scheduler and the requests disagree"
        assert self._kv.num_open == self.num_running, "blocks are held by a sequence that does not run"

    # -- Endings ----------------------------------------------------------------------------------------------------

    def _note_first_schedules(self, batch: list[Advance], now: float) -> None:
        for sequence, _ in batch:
            if sequence.scheduled_time is None:
                assert sequence.blocks is not None
                sequence.scheduled_time = now
                sequence.num_cached_tokens = sequence.blocks.num_cached_tokens
                self._metrics.prompt_tokens += sequence.num_prompt_tokens
                self._metrics.cached_tokens += sequence.num_cached_tokens
                self._metrics.prefix_misses[sequence.blocks.miss.reason.value] += 1

    def _token_event(self, sequence: Sequence, token_id: int, result: StepResult, row: int) -> TokenEvent:
        request = sequence.request
        num_top = request.params.logprobs
        if num_top is None:
            return TokenEvent(request.request_id, sequence.index, token_id, None, (), self.weight_version)
        ids, logprobs = result.top_ids[row, :num_top].tolist(), result.top_logprobs[row, :num_top].tolist()
        top = tuple((top_id, logprob) for top_id, logprob in zip(ids, logprobs, strict=True) if top_id >= 0)
        logprob = float(result.logprobs[row])
        return TokenEvent(request.request_id, sequence.index, token_id, logprob, top, self.weight_version)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> FinishedEvent:
        """End a sample, and its request if it is the last."""
        request_id = sequence.request.request_id
        live = self._live[request_id]
        self._scheduler.remove(sequence)
        sequence.finish_reason = reason
        live.num_unfinished -= 1
        metrics = None
        if live.num_unfinished == 0:
            del self._live[request_id]
            metrics = self._measure(live)
            ran_out = any(sample.finish_reason == "length" for sample in live.samples)
            self._metrics.observe_request(metrics, "length" if ran_out else "stop")
        return FinishedEvent(request_id, sequence.index, reason, sequence.stop_reason, metrics)

    def _fail(self, batch: list[Advance], error: Exception) -> list[Event]:
        """End every request that has a part in the batch. Uncommitted blocks are private, so they just become free."""
        self._metrics.failed_steps += 1
        if not isinstance(error, HeadraceError):
            cause = f"The step that computed this request failed: {type(error).__name__}: {error}."
            wrapped = ExecutorError(cause, "Try again; if it fails again, report it with the server's log.")
            wrapped.__cause__ = error
            error = wrapped
        request_ids = dict.fromkeys(sequence.request.request_id for sequence, _ in batch)
        for request_id in request_ids:
            self._drop(request_id, "failed")
        return [FailedEvent(request_id, error) for request_id in request_ids]

    def _drop(self, request_id: str, outcome: str) -> None:
        for sequence in self._live.pop(request_id).samples:
            if sequence.state is not SequenceState.FINISHED:
                self._scheduler.remove(sequence)
        self._metrics.requests[outcome] += 1

    def _measure(self, live: _Live) -> RequestMetrics:
        now = self.clock.now()
        samples = live.samples
        arrival = live.arrival_time
        return RequestMetrics(
            ttft=min((s.first_token_time for s in samples if s.first_token_time is not None), default=now) - arrival,
            tpot=max(s.tpot for s in samples),
            queue_time=min((s.scheduled_time for s in samples if s.scheduled_time is not None), default=now) - arrival,
            total_time=max((s.last_token_time for s in samples if s.last_token_time is not None), default=now)
            - arrival,
            num_prompt_tokens=samples[0].num_prompt_tokens,
            num_cached_tokens=samples[0].num_cached_tokens,
            num_output_tokens=sum(s.num_output_tokens for s in samples),
            num_preemptions=sum(s.num_preemptions for s in samples),
        )

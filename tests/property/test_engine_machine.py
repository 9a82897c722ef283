"""A random owner drives a whole engine; after every step everything is accounted for, and every output is its solo run.

The executor has no model, but its tokens are a hash of the context read back through the block tables, so a wrong
table, a block reused too early or a prefix shared wrongly shows as a wrong token or a failed assertion.
"""

from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from headrace.base.clock import VirtualClock
from headrace.base.errors import CapacityError, ContextLengthError, ExecutorError
from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.events import FailedEvent, FinishedEvent, TokenEvent
from headrace.engine.request import Request, derive_seed
from headrace.engine.sampling import SamplingParams
from headrace.engine.step import SampleRow, Step, StepResult
from headrace.executors.simulated import SimulatedExecutor, next_token

MIN_STEPS = 10_000
MAX_ROUNDS = 20
EXAMPLES_PER_ROUND = 25
RULES_PER_EXAMPLE = 80
VOCAB_SIZE = 11
EOS = (3,)

# Two letters, so that prefixes are shared often; the length is drawn first, because lists alone are mostly short.
PROMPTS = st.integers(1, 24).flatmap(lambda length: st.lists(st.integers(0, 1), min_size=length, max_size=length))
PARAMS = st.builds(
    SamplingParams,
    n=st.sampled_from([1, 1, 1, 2, 4]),
    max_tokens=st.one_of(st.none(), st.integers(2, 12)),
    min_tokens=st.integers(0, 2),
    temperature=st.sampled_from([0.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 3),
    stop_token_ids=st.sampled_from([(), (5,)]),
    ignore_eos=st.booleans(),
    logprobs=st.sampled_from([None, 0, 2]),
)


class FailingExecutor(SimulatedExecutor):
    """Fails when told to, after it has written half a step of garbage."""

    def __init__(self, **arguments) -> None:
        super().__init__(**arguments)
        self.fails_next = False
        self.num_rows = 0

    def execute(self, step: Step) -> StepResult:
        self.num_rows += len(step.token_ids)
        result = super().execute(step)
        if not self.fails_next:
            return result
        self.fails_next = False
        sequences = range(len(step.context_lens))
        for position, sequence in zip(step.positions[step.seq_starts[:-1]], sequences, strict=True):
            block = step.block_tables[sequence, position // self.block_size]
            self._tokens[block * self.block_size + position % self.block_size] = -7
        raise RuntimeError("injected")


def solo_run(prompt, params, index, max_len, salts):
    """The tokens and end of one sample, from the hash function alone; its i-th token from the weights `salts[i]`, and
    tokens beyond them from the last."""
    tokens = list(prompt)
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(EOS))
    while True:
        outputs = tokens[len(prompt) :]
        banned = tuple(ends) if len(outputs) < params.min_tokens else ()
        row = SampleRow(params, derive_seed(params.seed, index), len(outputs), banned_ids=banned)
        token = next_token(tokens, row, VOCAB_SIZE, salts[min(len(outputs), len(salts) - 1)])
        tokens.append(token)
        if token in ends and len(outputs) + 1 >= params.min_tokens:
            return tokens[len(prompt) :], "stop"
        if len(tokens) == max_len:
            return tokens[len(prompt) :], "length"


class EngineMachine(RuleBasedStateMachine):
    """Counts, over all runs, what it has seen, so that the test can say that it has seen enough."""

    seen: ClassVar[Counter[str]] = Counter()

    @initialize(
        num_blocks=st.integers(4, 24),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 6),
        spare_budget=st.integers(0, 24),
        max_prefill_chunk=st.sampled_from([None, 1, 3, 8]),
        caching=st.booleans(),
        asked=st.lists(st.tuples(PROMPTS, PARAMS), min_size=1, max_size=6),
    )
    def make_engine(self, num_blocks, block_size, max_num_seqs, spare_budget, max_prefill_chunk, caching, asked):
        self.clock = VirtualClock()
        self.executor = FailingExecutor(
            num_blocks=num_blocks,
            block_size=block_size,
            vocab_size=VOCAB_SIZE,
            clock=self.clock,
            cost=lambda step: 0.001 * len(step.token_ids),
        )
        config = EngineConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + spare_budget,
            max_model_len=30,
            enable_prefix_caching=caching,
            max_prefill_chunk=max_prefill_chunk,
        )
        self.engine = Engine(self.executor, config, clock=self.clock)
        self.pool_tokens = num_blocks * block_size
        self.requests: dict[str, Request] = {}
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.unfinished: dict[str, set[int]] = {}
        self.salts: dict[tuple[str, int], list[int]] = {}
        self.num_added = 0
        for prompt, params in asked:
            self.add(prompt, params)

    @rule(asked=st.lists(st.tuples(PROMPTS, PARAMS), min_size=1, max_size=3))
    def add_some(self, asked):
        for prompt, params in asked:
            self.add(prompt, params)
        self.step_once()

    def add(self, prompt, params):
        self.num_added += 1
        request = Request(request_id=f"r{self.num_added}", prompt_ids=tuple(prompt), params=params, eos_ids=EOS)
        try:
            self.engine.add(request)
        except (CapacityError, ContextLengthError):
            assert len(prompt) + (params.max_tokens or 1) - 1 > min(self.pool_tokens, 29)
            self.seen["rejected"] += 1
            return
        self.requests[request.request_id] = request
        self.unfinished[request.request_id] = set(range(params.n))
        for index in range(params.n):
            self.outputs[request.request_id, index], self.salts[request.request_id, index] = [], []

    @rule(count=st.integers(1, 8))
    def step(self, count):
        for _ in range(count):
            self.step_once()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        assert self.engine.cancel(request_id)
        assert not self.engine.cancel(request_id), "cancelled once, gone"
        self.forget(request_id)
        self.seen["cancelled"] += 1
        self.step_once()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def find_stop_string(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        index = data.draw(st.sampled_from(sorted(self.unfinished[request_id])))
        event = self.engine.finish_sequence(request_id, index, "END")
        assert (event.reason, event.stop_reason) == ("stop", "END")
        expected, _ = self.solo(request_id, index)
        produced = self.outputs[request_id, index]
        assert produced == expected[: len(produced)]
        self.end_sample(event)
        self.seen["stop strings"] += 1
        self.step_once()

    @precondition(lambda self: self.requests)
    @rule()
    def fail_a_step(self):
        self.executor.fails_next = True
        self.step_once()

    @rule()
    def clear_cache(self):
        self.engine.clear_prefix_cache()
        self.step_once()

    @rule(salt=st.integers(1, 3))
    def install_weights(self, salt):
        """A weight's version is its salt here. All KV is computed again, so each token is that of its version alone."""
        staged = self.executor.stage_weights({"salt": salt})
        self.engine.install_weights(staged, salt, recompute=True)
        self.engine.check_integrity()
        assert self.engine.snapshot().kv_blocks_cached == 0
        self.seen["weights"] += 1
        self.step_once()

    @invariant()
    def everything_is_accounted_for(self):
        if hasattr(self, "engine"):
            self.engine.check_integrity()
            assert self.engine.has_work == bool(self.requests)

    def step_once(self):
        had_work = self.engine.has_work
        before = self.executor.num_rows
        events = self.engine.step()
        self.engine.check_integrity()
        self.seen["steps"] += had_work
        assert self.executor.num_rows > before or not had_work, "nothing advanced"
        for event in events:
            match event:
                case TokenEvent():
                    self.outputs[event.request_id, event.index].append(event.token_id)
                    self.salts[event.request_id, event.index].append(event.weight_version)
                    asked = self.requests[event.request_id].params.logprobs
                    assert (event.logprob is None) == (asked is None)
                    assert len(event.top) == (asked or 0)
                case FinishedEvent():
                    expected = self.solo(event.request_id, event.index)
                    assert (self.outputs[event.request_id, event.index], event.reason) == expected
                    self.end_sample(event)
                    self.seen["finished"] += 1
                case FailedEvent():
                    assert isinstance(event.error, ExecutorError)
                    self.forget(event.request_id)
                    self.seen["failed"] += 1

    def solo(self, request_id, index):
        request = self.requests[request_id]
        num_prompt = len(request.prompt_ids)
        max_tokens = request.params.max_tokens
        longest = self.pool_tokens + 1 if max_tokens is None else num_prompt + max_tokens
        salts = [*self.salts[request_id, index], self.engine.weight_version]
        return solo_run(request.prompt_ids, request.params, index, min(30, longest), salts)

    def end_sample(self, event):
        unfinished = self.unfinished[event.request_id]
        unfinished.remove(event.index)
        assert (event.metrics is not None) == (not unfinished), "the last sample brings the metrics"
        if not unfinished:
            assert 0 <= event.metrics.queue_time <= event.metrics.ttft <= event.metrics.total_time
            self.forget(event.request_id)

    def forget(self, request_id):
        del self.requests[request_id], self.unfinished[request_id]

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.executor.fails_next = False
        for _ in range(5000):
            if not self.engine.has_work:
                break
            self.step_once()
        assert not self.engine.has_work, "requests that never end"
        assert not self.engine.step()
        snapshot = self.engine.snapshot()
        assert snapshot.kv_blocks_in_use == 0
        assert self.engine.clear_prefix_cache() == snapshot.kv_blocks_cached
        assert self.engine.snapshot().kv_blocks_cached == 0
        self.engine.check_integrity()
        self.seen["preempted"] += snapshot.metrics.preemptions
        self.seen["cached tokens"] += snapshot.metrics.cached_tokens


@pytest.mark.timeout(180)
def test_engine_machine(report_figure):
    """Rounds of fixed seeds until there are steps enough: how long an example gets is hypothesis's own choice."""
    EngineMachine.seen.clear()
    limits = settings(
        max_examples=EXAMPLES_PER_ROUND,
        stateful_step_count=RULES_PER_EXAMPLE,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    for round_seed in range(MAX_ROUNDS):
        run_state_machine_as_test(seed(round_seed)(EngineMachine), settings=limits)
        if EngineMachine.seen["steps"] >= MIN_STEPS:
            break
    report_figure(f"engine state machine, {round_seed + 1} rounds: {dict(EngineMachine.seen)}")
    assert EngineMachine.seen["steps"] >= MIN_STEPS
    rare = ("finished", "failed", "cancelled", "stop strings", "preempted", "cached tokens", "rejected", "weights")
    assert all(EngineMachine.seen[what] >= 20 for what in rare), EngineMachine.seen

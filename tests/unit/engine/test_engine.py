"""The engine on the simulated executor, which asserts that every context is what its block table says."""

import dataclasses

import numpy as np
import pytest

from headrace.base.clock import VirtualClock
from headrace.base.errors import CapacityError, ContextLengthError, ExecutorError, InvalidRequestError
from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.events import FailedEvent, FinishedEvent, TokenEvent
from headrace.engine.metrics import Histogram
from headrace.engine.request import Request, derive_seed
from headrace.engine.sampling import SamplingParams
from headrace.engine.step import SampleRow
from headrace.executors.simulated import SimulatedExecutor, next_token

VOCAB_SIZE = 1000


class Faulty(SimulatedExecutor):
    """Raises, or answers with something else, once told to."""

    fault = None

    def execute(self, step):
        result = super().execute(step)
        if self.fault is None:
            return result
        fault, self.fault = self.fault, None
        return fault(result)


def made(*, num_blocks=64, verify=True, **config):
    clock = VirtualClock()
    executor = Faulty(
        num_blocks=num_blocks, block_size=4, vocab_size=VOCAB_SIZE, clock=clock, cost=lambda step: 1.0, verify=verify
    )
    return Engine(executor, EngineConfig(max_model_len=100, **config), clock=clock), executor


def request(name, prompt, eos_ids=(), **params):
    params = SamplingParams(**{"max_tokens": 5, "temperature": 0.0, "seed": 1, **params})
    return Request(request_id=name, prompt_ids=tuple(prompt), params=params, eos_ids=eos_ids)


def drain(engine):
    events = []
    while engine.has_work:
        events += engine.step()
        engine.check_integrity()
    return events


def tokens_of(events, name, index=0):
    return [e.token_id for e in events if isinstance(e, TokenEvent) and (e.request_id, e.index) == (name, index)]


def solo(prompt, count, temperature=0.0, seed=None, salt=0):
    tokens = list(prompt)
    for index in range(count):
        row = SampleRow(SamplingParams(temperature=temperature), seed or 0, index)
        tokens.append(next_token(tokens, row, VOCAB_SIZE, salt))
    return tokens[len(prompt) :]


def test_a_request_from_arrival_to_end():
    engine, _ = made()
    engine.add(request("a", range(10)))
    assert (engine.has_work, engine.num_running, engine.num_waiting) == (True, 0, 1)
    events = drain(engine)
    expected = solo(range(10), 5)
    assert events[:5] == [TokenEvent("a", 0, token) for token in expected]
    assert events[5] == FinishedEvent("a", 0, "length", None, events[5].metrics)
    assert (engine.has_work, engine.step()) == (False, [])


def test_tokens_reach_their_owners_past_prompts_still_being_computed():
    engine, _ = made(max_prefill_chunk=4)
    engine.add(request("long", range(20)))
    engine.add(request("short", range(50, 53)))
    events = drain(engine)
    assert events[0].request_id == "short"
    assert tokens_of(events, "long") == solo(range(20), 5)
    assert tokens_of(events, "short") == solo(range(50, 53), 5)


def test_eos_and_stop_tokens_end_with_their_reasons():
    expected = solo(range(10), 5)
    engine, _ = made()
    engine.add(request("eos", range(10), eos_ids=(expected[2],)))
    engine.add(request("stop", range(10), stop_token_ids=(expected[1],)))
    engine.add(request("ignore", range(10), eos_ids=(expected[2],), ignore_eos=True))
    events = drain(engine)
    ends = {e.request_id: (e.reason, e.stop_reason) for e in events if isinstance(e, FinishedEvent)}
    assert ends == {"eos": ("stop", None), "stop": ("stop", expected[1]), "ignore": ("length", None)}
    assert tokens_of(events, "eos") == expected[:3]
    assert tokens_of(events, "stop") == expected[:2]
    assert tokens_of(events, "ignore") == expected


def test_min_tokens_keeps_ends_away():
    first = solo(range(10), 1)[0]
    engine, _ = made()
    engine.add(request("a", range(10), eos_ids=(first,), min_tokens=3))
    tokens = tokens_of(drain(engine), "a")
    assert first not in tokens[:3]
    assert len(tokens) >= 3


def test_the_context_window_ends_a_request():
    engine, _ = made()
    engine.add(request("a", range(90), max_tokens=None))
    events = drain(engine)
    assert (len(tokens_of(events, "a")), events[-1].reason) == (10, "length")


def test_samples_differ_by_their_seeds_and_share_the_prompt():
    engine, _ = made()
    engine.add(request("a", range(10), n=3, temperature=1.0, seed=7))
    events = drain(engine)
    for index in range(3):
        assert tokens_of(events, "a", index) == solo(range(10), 5, 1.0, derive_seed(7, index))
    finished = [event for event in events if isinstance(event, FinishedEvent)]
    assert [event.metrics is not None for event in finished] == [False, False, True], "with the last of them"
    assert finished[-1].metrics.num_output_tokens == 15
    assert engine.snapshot().metrics.cached_tokens == 2 * 8


def test_logprobs_come_as_asked():
    engine, _ = made()
    engine.add(request("none", range(10), max_tokens=1))
    engine.add(request("chosen", range(10), max_tokens=1, logprobs=0))
    engine.add(request("top", range(10), max_tokens=1, logprobs=3))
    events = {event.request_id: event for event in drain(engine) if isinstance(event, TokenEvent)}
    assert (events["none"].logprob, events["none"].top) == (None, ())
    assert (events["chosen"].logprob < 0, events["chosen"].top) == (True, ())
    top = events["top"].top
    assert (len(top), top[0]) == (3, (events["top"].token_id, events["top"].logprob)), "greedy: the best is the chosen"
    assert top[0][1] > top[1][1] > top[2][1]


def test_preempted_requests_get_the_same_tokens():
    engine, _ = made(num_blocks=9)
    prompts = {name: range(20 * i, 20 * i + 6) for i, name in enumerate("abcd")}
    for name, prompt in prompts.items():
        engine.add(request(name, prompt, max_tokens=20))
    events = drain(engine)
    assert engine.snapshot().metrics.preemptions > 0
    for name, prompt in prompts.items():
        assert tokens_of(events, name) == solo(prompt, 20)


def test_a_failed_step_hurts_the_requests_in_it_and_no_other():
    engine, executor = made(max_num_seqs=2, max_num_batched_tokens=8)
    engine.add(request("a", range(12)))
    engine.step()
    engine.add(request("b", range(20, 40), n=2))
    engine.add(request("c", range(12)))

    def fault(result):
        raise RuntimeError("a kernel fell over")

    executor.fault = fault
    events = engine.step()
    assert [event.request_id for event in events] == ["a", "b"]
    assert all(isinstance(event, FailedEvent) and isinstance(event.error, ExecutorError) for event in events)
    assert "RuntimeError: a kernel fell over" in events[0].error.cause
    assert isinstance(events[0].error.__cause__, RuntimeError)
    engine.check_integrity()
    assert engine.snapshot().kv_blocks_in_use == 0
    assert engine.snapshot().kv_blocks_cached == 2, "of a's first step, which succeeded"
    assert tokens_of(drain(engine), "c") == solo(range(12), 5)
    metrics = engine.snapshot().metrics
    assert (metrics.failed_steps, metrics.requests["failed"], metrics.requests["length"]) == (1, 2, 1)


def test_a_result_that_cannot_be_is_a_failed_step():
    engine, executor = made()
    for name, change in (("a", {"token_ids": [VOCAB_SIZE]}), ("b", {"token_ids": [1, 2]}), ("c", {"logprobs": []})):
        engine.add(request(name, range(4)))
        arrays = {field: np.array(values, np.int32) for field, values in change.items()}
        executor.fault = lambda result, arrays=arrays: dataclasses.replace(result, **arrays)
        (event,) = engine.step()
        assert isinstance(event, FailedEvent)
        engine.check_integrity()
        assert not engine.has_work


def test_an_interrupted_step_is_done_again():
    engine, executor = made()
    engine.add(request("a", range(10)))

    def fault(result):
        raise KeyboardInterrupt

    executor.fault = fault
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.check_integrity()
    assert tokens_of(drain(engine), "a") == solo(range(10), 5)


def test_cancelling_frees_at_once_in_every_state():
    engine, _ = made(max_num_seqs=1)
    engine.add(request("running", range(10), n=2))
    engine.add(request("waiting", range(20, 30)))
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (1, 2)
    assert engine.cancel("waiting")
    assert engine.cancel("running"), "one sample runs, the other is held or waits"
    engine.check_integrity()
    assert (engine.has_work, engine.num_waiting, engine.snapshot().kv_blocks_in_use) == (False, 0, 0)
    assert not engine.cancel("running")
    assert engine.snapshot().metrics.requests["cancelled"] == 2


def test_a_caller_ends_a_sample_at_a_stop_string():
    engine, _ = made()
    engine.add(request("a", range(10), n=2, max_tokens=50))
    engine.step()
    event = engine.finish_sequence("a", 0, "END")
    assert event == FinishedEvent("a", 0, "stop", "END")
    engine.check_integrity()
    engine.step()
    event = engine.finish_sequence("a", 1, "END")
    assert event.metrics.num_output_tokens == 2
    assert (engine.has_work, engine.snapshot().kv_blocks_in_use) == (False, 0)
    assert engine.snapshot().metrics.requests["stop"] == 1


def test_what_can_never_be_served_is_refused_and_changes_nothing():
    engine, _ = made(num_blocks=10)
    engine.add(request("a", range(4)))
    with pytest.raises(InvalidRequestError, match="id 'a' is being served"):
        engine.add(request("a", range(4)))
    with pytest.raises(ContextLengthError):
        engine.add(request("b", range(100)))
    with pytest.raises(CapacityError):
        engine.add(request("c", range(40), max_tokens=2))
    assert engine.num_waiting == 1
    assert engine.snapshot().metrics.requests["rejected"] == 3


def test_timings_are_the_clocks():
    engine, _ = made(max_num_batched_tokens=64, max_prefill_chunk=4)
    engine.clock.advance(10)
    engine.add(request("first", range(4), max_tokens=2))
    engine.step()
    engine.add(request("second", range(20, 32), max_tokens=3))
    engine.clock.advance(5)
    timings = {event.request_id: event.metrics for event in drain(engine) if isinstance(event, FinishedEvent)}
    assert (timings["first"].ttft, timings["first"].queue_time, timings["first"].tpot) == (1.0, 0.0, 6.0)
    second = timings["second"]
    assert (second.queue_time, second.ttft, second.tpot, second.total_time) == (5.0, 8.0, 1.0, 10.0)
    assert (second.num_prompt_tokens, second.num_output_tokens) == (12, 3)
    engine.add(request("third", range(20, 32), max_tokens=1))
    assert drain(engine)[-1].metrics.num_cached_tokens == 8


def test_the_arrival_may_lie_before_the_call():
    engine, _ = made()
    engine.clock.advance(10)
    engine.add(Request(request_id="a", prompt_ids=(1,), params=SamplingParams(max_tokens=1), arrival_time=3.0))
    assert drain(engine)[-1].metrics.ttft == 8.0


def test_a_snapshot_counts_and_is_not_changed_by_later_steps():
    engine, _ = made()
    engine.add(request("a", range(10)))
    engine.step()
    snapshot = engine.snapshot()
    assert (snapshot.num_running, snapshot.num_waiting, snapshot.kv_blocks_in_use) == (1, 0, 3)
    assert (snapshot.kv_blocks_total, snapshot.kv_blocks_cached, snapshot.kv_usage) == (64, 2, 3 / 64)
    drain(engine)
    assert (snapshot.metrics.output_tokens, snapshot.metrics.step_seconds.count) == (1, 1)
    metrics = engine.snapshot().metrics
    assert (metrics.prompt_tokens, metrics.computed_tokens, metrics.output_tokens) == (10, 14, 5)
    assert (metrics.step_seconds.count, metrics.execute_seconds.total, metrics.batch_tokens.total) == (5, 5.0, 14)
    assert (metrics.ttft.count, metrics.tpot.count, metrics.requests["length"]) == (1, 1, 1)
    assert metrics.prefix_misses["unseen"] == 1


def test_clearing_the_cache_makes_prompts_be_computed_again():
    engine, _ = made()
    for _ in range(2):
        engine.add(request("a", range(10)))
        assert drain(engine)[-1].metrics.num_cached_tokens == 0
        assert engine.clear_prefix_cache() == 3
    assert engine.snapshot().metrics.prefix_misses["evicted"] == 1


def test_histograms_hold_a_value_on_its_bound():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert (histogram.counts, histogram.count, histogram.total) == ([2, 1, 1], 4, 12.0)


def test_new_weights_between_two_steps_with_and_without_computing_again():
    for recompute in (False, True):
        engine, executor = made(verify=False)
        engine.add(request("a", range(10), max_tokens=4))
        events = engine.step() + engine.step()
        engine.install_weights(executor.stage_weights({"salt": 7}), 3, recompute=recompute)
        engine.check_integrity()
        events += drain(engine)
        tokens = [event for event in events if isinstance(event, TokenEvent)]
        assert [event.weight_version for event in tokens] == [0, 0, 3, 3]
        fresh = solo([*range(10), *solo(range(10), 2)], 1, salt=7)
        assert ([tokens[2].token_id] == fresh) is recompute, "old keys and values, or new ones"
        assert engine.snapshot().metrics.preemptions == recompute


def test_swapping_weights_twice_brings_the_old_ones_back():
    engine, executor = made()
    staged = executor.stage_weights({"salt": 7})
    for version, salt in ((1, 7), (0, 0)):
        engine.install_weights(staged, version, recompute=True)
        engine.add(request("a", range(10), max_tokens=1))
        (token, _) = drain(engine)
        assert ([token.token_id], token.weight_version) == (solo(range(10), 1, salt=salt), version)


def test_forced_tokens_that_cannot_be_are_refused():
    engine, _ = made()
    with pytest.raises(InvalidRequestError):
        SamplingParams(forced_ids=(1, 2), max_tokens=1)
    with pytest.raises(ContextLengthError, match="forced_ids"):
        engine.add(request("b", [1], forced_ids=(5,) * 100, max_tokens=None))
    with pytest.raises(InvalidRequestError, match="forced_ids"):
        engine.add(request("c", [1], forced_ids=(VOCAB_SIZE,)))
    assert not engine.has_work

"""The simulated executor must catch an engine that lies to it."""

import dataclasses

import numpy as np
import pytest

from headrace.base.clock import VirtualClock
from headrace.base.errors import InvalidRequestError
from headrace.engine.sampling import SamplingParams
from headrace.engine.step import SampleRow, Step
from headrace.executors.simulated import SimulatedExecutor, next_token

GREEDY = SampleRow(SamplingParams(temperature=0.0), 0, 0)
VOCAB_SIZE = 97


def step(*parts):
    """One step over (tokens, first position, block table, sample row or None) for each sequence."""
    width = max(len(table) for _, _, table, _ in parts)
    ends = np.cumsum([len(tokens) for tokens, *_ in parts])
    return Step(
        token_ids=np.array([token for tokens, *_ in parts for token in tokens], np.int32),
        positions=np.array([first + i for tokens, first, *_ in parts for i in range(len(tokens))], np.int32),
        seq_starts=np.array([0, *ends], np.int32),
        context_lens=np.array([first + len(tokens) for tokens, first, *_ in parts], np.int32),
        block_tables=np.array([[*table, *[-1] * (width - len(table))] for _, _, table, _ in parts], np.int32),
        sample_rows=np.array([e - 1 for e, part in zip(ends, parts, strict=True) if part[3] is not None], np.int32),
        sampling=tuple(part[3] for part in parts if part[3] is not None),
    )


def made(**arguments):
    return SimulatedExecutor(num_blocks=8, block_size=2, vocab_size=VOCAB_SIZE, **arguments)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_the_hash_of_the_context_however_it_was_chunked_and_batched(temperature):
    row = SampleRow(SamplingParams(temperature=temperature), seed=2**63 - 1, index=4)
    context = [5, 6, 7, 8, 9]
    expected = next_token(context, row, VOCAB_SIZE)
    whole, chunked = made(), made()
    assert whole.execute(step((context, 0, [3, 1, 4], row))).token_ids.tolist() == [expected]
    assert chunked.execute(step((context[:3], 0, [0, 7], None))).token_ids.shape == (0,)
    batched = chunked.execute(step(([1, 2], 0, [2], GREEDY), (context[3:], 3, [0, 7, 5], row)))
    assert batched.token_ids.tolist() == [next_token([1, 2], GREEDY, VOCAB_SIZE), expected]


def test_banned_tokens_are_passed_over():
    best = next_token([5], GREEDY, VOCAB_SIZE)
    banned = dataclasses.replace(GREEDY, banned_ids=(best, (best + 1) % VOCAB_SIZE))
    assert made().execute(step(([5], 0, [0], banned))).token_ids.tolist() == [(best + 2) % VOCAB_SIZE]
    assert next_token([5], banned, VOCAB_SIZE) == (best + 2) % VOCAB_SIZE


def test_logprobs_follow_the_contract_of_the_result():
    rows = [SampleRow(SamplingParams(temperature=1.0, logprobs=k), 3, 0) for k in (None, 0, 3)]
    result = made().execute(step(*(([5], 0, [i], row) for i, row in enumerate(rows))))
    assert np.isnan(result.logprobs).tolist() == [True, False, False]
    assert (result.top_ids.shape, result.top_ids.dtype, result.logprobs.dtype) == ((3, 3), np.int32, np.float32)
    assert (result.top_ids[:2] == -1).all()
    assert result.top_ids[2, 0] == next_token([5], GREEDY, VOCAB_SIZE)
    assert (np.diff(result.top_logprobs[2]) < 0).all()


def lies():
    context = ([5, 6, 7], 0, [0, 1], None)
    yield "the KV before a sequence's rows is not its own", [context], ([8], 3, [0, 2], GREEDY)
    yield "overwritten", [context, ([1, 2, 3], 0, [5, 0], None)], ([8], 3, [0, 1], GREEDY)
    yield "another context", [context, ([1, 2], 0, [2], None)], ([8], 3, [2, 1], GREEDY)
    yield "too short", [], ([5, 6, 7], 0, [0], GREEDY)
    yield "out of range", [], ([5], 0, [8], GREEDY)
    penalized = SampleRow(SamplingParams(presence_penalty=1.0), 0, 1, prompt_ids=(5,), output_ids=(7,))
    yield "penalties would see another context", [], ([5, 6], 0, [0], penalized)


@pytest.mark.parametrize(("message", "before", "lie"), list(lies()), ids=[lie[0] for lie in lies()])
def test_a_lie_is_caught(message, before, lie):
    executor = made()
    for part in before:
        executor.execute(step(part))
    with pytest.raises(AssertionError, match=message):
        executor.execute(step(lie))


def test_two_sequences_may_not_write_one_slot():
    with pytest.raises(AssertionError, match="two rows write one slot"):
        made().execute(step(([1], 0, [0], GREEDY), ([2], 0, [0], GREEDY)))


def test_a_priced_step_moves_the_clock():
    clock = VirtualClock()
    executor = made(clock=clock, cost=lambda step: 0.5 * len(step.token_ids))
    executor.execute(step(([1, 2, 3], 0, [0, 1], GREEDY)))
    assert clock.now() == 1.5
    with pytest.raises(InvalidRequestError, match="cost without a clock"):
        made(cost=lambda step: 1.0)

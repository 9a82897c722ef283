"""What waits for a slow reader is merged, complete and bounded."""

import asyncio

import pytest

from headrace.engine.metrics import RequestMetrics
from headrace.llm.inbox import Inbox
from headrace.llm.outputs import Delta, TokenLogprob

METRICS = RequestMetrics(0.0, 0.0, 0.0, 0.0, 1, 0, 1, 0)


def delta(token, index=0, finish=None, logprobs=True, metrics=None):
    entries = [TokenLogprob(token, -1.0)] if logprobs else None
    return Delta(index, f"<{token}>", [token], entries, finish, None, metrics)


def test_deltas_that_wait_are_one():
    async def run():
        inbox = Inbox(1)
        for token in range(1000):
            metrics = METRICS if token == 999 else None
            inbox.put(token % 2, delta(token, token % 2, "length" if token > 997 else None, metrics=metrics))
        assert inbox.has_ended
        return await inbox.take(), await inbox.take()

    taken, after = asyncio.run(run())
    assert after == {}
    for choice in (0, 1):
        tokens = list(range(choice, 1000, 2))
        assert taken[choice].token_ids == tokens
        assert taken[choice].text == "".join(f"<{token}>" for token in tokens)
        assert [entry.token_id for entry in taken[choice].logprobs] == tokens
        assert taken[choice].finish_reason == "length"


def test_memory_holds_few_deltas_however_many_come():
    inbox = Inbox(1)
    for token in range(10_000):
        inbox.put(0, delta(token))
        assert len(inbox._pending[0]) < 32


def test_no_logprobs_stay_none():
    async def run():
        inbox = Inbox(1)
        inbox.put(0, delta(1, logprobs=False))
        inbox.put(0, delta(2, logprobs=False))
        return (await inbox.take())[0]

    assert asyncio.run(run()).logprobs is None


def test_a_fast_consumer_gets_every_delta_by_itself():
    async def run():
        inbox = Inbox(1)
        taken = []

        async def produce():
            for token in range(20):
                inbox.put(0, delta(token, metrics=METRICS if token == 19 else None))
                await asyncio.sleep(0)
                await asyncio.sleep(0)

        task = asyncio.create_task(produce())
        while deltas := await inbox.take():
            taken.append(deltas[0].token_ids)
        await task
        return taken

    assert asyncio.run(run()) == [[token] for token in range(20)]


def test_end_waits_for_all_requests_and_errors_come_after_what_was_put():
    async def run():
        inbox = Inbox(2)
        inbox.put(0, delta(0, metrics=METRICS))
        assert (await inbox.take())[0].token_ids == [0]
        assert not inbox.has_ended
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(inbox.take(), 0.01)
        inbox.put(0, delta(1))
        inbox.fail(ValueError("first"))
        inbox.fail(ValueError("second"))
        assert (await inbox.take())[0].token_ids == [1]
        with pytest.raises(ValueError, match="first"):
            await inbox.take()

    asyncio.run(run())

"""What waits for a slow client is merged, complete and bounded."""

import asyncio

import pytest

from headrace.llm.outputs import Delta, TokenLogprob
from headrace.serve.mailbox import Mailbox


def delta(token, index=0, finish=None, logprobs=True):
    entries = [TokenLogprob(token, -1.0)] if logprobs else None
    return Delta(index, f"<{token}>", [token], entries, finish)


def test_deltas_that_wait_are_one():
    async def run():
        mailbox = Mailbox(1)
        for token in range(1000):
            mailbox.put(token % 2, delta(token, token % 2, "length" if token > 997 else None))
        mailbox.finish()
        return await mailbox.take(), await mailbox.take()

    taken, after = asyncio.run(run())
    assert after == {}
    for choice in (0, 1):
        tokens = list(range(choice, 1000, 2))
        assert taken[choice].token_ids == tokens
        assert taken[choice].text == "".join(f"<{token}>" for token in tokens)
        assert [entry.token_id for entry in taken[choice].logprobs] == tokens
        assert taken[choice].finish_reason == "length"


def test_memory_holds_few_deltas_however_many_come():
    mailbox = Mailbox(1)
    for token in range(10_000):
        mailbox.put(0, delta(token))
        assert len(mailbox._pending[0]) < 32


def test_no_logprobs_stay_none():
    async def run():
        mailbox = Mailbox(1)
        mailbox.put(0, delta(1, logprobs=False))
        mailbox.put(0, delta(2, logprobs=False))
        return (await mailbox.take())[0]

    assert asyncio.run(run()).logprobs is None


def test_a_fast_consumer_gets_every_delta_by_itself():
    async def run():
        mailbox = Mailbox(1)
        taken = []

        async def produce():
            for token in range(20):
                mailbox.put(0, delta(token))
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            mailbox.finish()

        task = asyncio.create_task(produce())
        while deltas := await mailbox.take():
            taken.append(deltas[0].token_ids)
        await task
        return taken

    assert asyncio.run(run()) == [[token] for token in range(20)]


def test_end_waits_for_all_producers_and_errors_come_after_what_was_put():
    async def run():
        mailbox = Mailbox(2)
        mailbox.finish()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(mailbox.take(), 0.01)
        mailbox.put(0, delta(1))
        mailbox.fail(ValueError("first"))
        mailbox.fail(ValueError("second"))
        assert (await mailbox.take())[0].token_ids == [1]
        with pytest.raises(ValueError, match="first"):
            await mailbox.take()

    asyncio.run(run())

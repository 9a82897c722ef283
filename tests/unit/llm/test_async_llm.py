"""`AsyncLLM` over a model that continues every prompt with the bytes that follow its last one."""

import asyncio
import contextlib

import pytest

from headrace.base.errors import ExecutorError, HeadraceError, InvalidRequestError
from headrace.engine.sampling import SamplingParams
from headrace.llm.async_llm import LONG_PROMPT, AsyncLLM


def tokens(count, **fields):
    return SamplingParams(max_tokens=count, **fields)


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def until_idle(llm):
    """What was cancelled is freed by the engine's thread, before its next step."""
    for _ in range(2):  # the thread may just have taken what was submitted, and not yet have told the engine
        await until(lambda: not (llm._submitted or llm._cancelled or llm._runtime.has_work))
        await asyncio.sleep(0.002)
    engine = llm._runtime.engine
    engine.check_integrity()
    assert not engine.has_work
    assert llm.engine_snapshot().kv_blocks_in_use == 0
    assert llm.engine_snapshot().num_waiting == 0
    assert not llm._inboxes


def run(steps, story):
    """Play a story with a fresh `AsyncLLM`; nothing may be left of it."""

    steps.seconds = 0.003  # a request of 100 tokens outlasts what the story does meanwhile

    async def play():
        async with AsyncLLM(max_num_seqs=4) as llm:
            await asyncio.wait_for(story(llm), 20)
            steps.go.set()
            if llm.is_healthy:
                await until_idle(llm)

    asyncio.run(play())


def test_many_at_once(steps):
    async def story(llm):
        made = await asyncio.gather(*(llm.generate(chr(97 + i % 10), tokens(1 + i)) for i in range(20)))
        for i, output in enumerate(made):
            assert output.outputs[0].token_ids == [98 + i % 10 + j for j in range(1 + i)]
            assert output.metrics.num_output_tokens == 1 + i
        answer = await llm.chat([{"role": "user", "content": "a"}], tokens(2))
        assert answer.outputs[0].text == "bc"

    run(steps, story)


def test_streams_deliver_while_steps_run(steps):
    async def story(llm):
        assert [delta.text async for delta in llm.stream("a", tokens(4))] == ["b", "c", "d", "e"]

    run(steps, story)


@pytest.mark.parametrize("moment", ["submitted", "waiting", "running"])
def test_cancelling_in_any_state_frees_the_blocks(steps, moment):
    async def story(llm):
        others = [asyncio.create_task(llm.generate("a", tokens(100))) for _ in range(4 if moment == "waiting" else 0)]
        if others:
            await until(lambda: llm._runtime.engine.num_running == 4)
        if moment == "submitted":
            steps.go.clear()
        task = asyncio.create_task(llm.generate("b", tokens(100)))
        if moment == "submitted":
            await asyncio.sleep(0)
        elif moment == "waiting":
            await until(lambda: len(llm._inboxes) == 5)
        else:
            await until(lambda: llm._runtime.engine.num_running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        steps.go.set()
        for output in await asyncio.gather(*others):
            assert len(output.outputs[0].token_ids) == 100

    run(steps, story)


def test_leaving_a_stream_cancels_it(steps):
    async def story(llm):
        async with contextlib.aclosing(llm.stream("a", tokens(100, n=3))) as stream:
            async for _ in stream:
                break
        await until_idle(llm)
        count = steps.count
        await asyncio.sleep(0.02)
        assert steps.count == count < 90

    run(steps, story)


def test_a_slow_consumer_delays_nobody_and_misses_nothing(steps):
    async def story(llm):
        slow = llm.stream("a", tokens(100))
        first = await anext(slow)
        fast = await llm.generate("b", tokens(100))
        assert len(fast.outputs[0].token_ids) == 100
        await until_idle_engine(llm)
        rest = [delta async for delta in slow]
        assert [t for delta in (first, *rest) for t in delta.token_ids] == [(98 + i) % 256 for i in range(100)]

    async def until_idle_engine(llm):
        await until(lambda: not llm._runtime.has_work)

    run(steps, story)


def test_two_requests_may_have_one_name(steps):
    async def story(llm):
        outputs = await asyncio.gather(*(llm.generate(p, tokens(3), request_id="same") for p in "ak"))
        assert [(output.request_id, output.outputs[0].text) for output in outputs] == [("same", "bcd"), ("same", "lmn")]

    run(steps, story)


def test_a_failed_step_fails_its_requests_and_the_engine_goes_on(steps):
    def fail(step):
        steps.action = lambda step: None
        raise RuntimeError("tile fault")

    async def story(llm):
        steps.action = fail
        with pytest.raises(ExecutorError, match="tile fault"):
            await llm.generate("a", tokens(3))
        assert llm.is_healthy
        assert (await llm.generate("a", tokens(3))).outputs[0].text == "bcd"

    run(steps, story)


def test_a_crash_of_the_thread_fails_every_open_request_and_health(steps, caplog):
    async def story(llm):
        stream = llm.stream("a", tokens(100))
        await anext(stream)
        steps.go.clear()
        waiting = [asyncio.create_task(llm.generate("b", tokens(100))) for _ in range(6)]
        await asyncio.sleep(0)
        llm._runtime.step = lambda: 1 / 0
        steps.go.set()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        with pytest.raises(ExecutorError, match="ZeroDivisionError") as caught:
            async for _ in stream:
                pass
        assert caught.value.code == "engine_stopped"
        assert all(isinstance(result, ExecutorError) for result in results)
        assert len({id(result) for result in results}) == 6, "each has an error of its own"
        assert not llm.is_healthy
        with pytest.raises(ExecutorError, match="ZeroDivisionError"):
            await llm.generate("c")
        assert not llm._inboxes
        llm.engine_snapshot()

    run(steps, story)
    assert "the engine stopped" in caplog.text


def test_a_refusal_by_the_engine_reaches_its_request_alone(steps, monkeypatch):
    async def story(llm):
        submit = llm._runtime.submit

        def refuse(key, prompt_ids, params):
            if params.max_tokens == 7:
                raise InvalidRequestError("No.", "Never.")
            submit(key, prompt_ids, params)

        monkeypatch.setattr(llm._runtime, "submit", refuse)
        good, bad = await asyncio.gather(
            llm.generate("a", tokens(3)), llm.generate("b", tokens(7)), return_exceptions=True
        )
        assert good.outputs[0].text == "bcd"
        assert isinstance(bad, InvalidRequestError)

    run(steps, story)


def test_bad_prompts_are_refused_before_the_first_delta(steps):
    async def story(llm):
        for prompt in ("", "x" * 200, "x" * (LONG_PROMPT + 1), [1, 300]):
            with pytest.raises(InvalidRequestError):
                await anext(llm.stream(prompt))
        assert steps.count == 0

    run(steps, story)


def test_closing_ends_open_streams_and_refuses_new_ones(steps):
    async def story(llm):
        stream = llm.stream("a", tokens(100))
        await anext(stream)
        waiting = asyncio.create_task(llm.generate("b", tokens(100)))
        await asyncio.sleep(0)
        await llm.aclose()
        await llm.aclose()
        assert llm._executor.is_closed
        for ask in (waiting, drain(stream), llm.generate("c"), llm.start()):
            with pytest.raises(HeadraceError, match="shutting down") as caught:
                await ask
            assert caught.value.code == "shutting_down"

    async def drain(stream):
        async for _ in stream:
            pass

    run(steps, story)


def test_closing_before_starting(steps):
    async def story():
        llm = AsyncLLM()
        await llm.aclose()
        with pytest.raises(HeadraceError, match="shutting down"):
            await llm.generate("a")
        assert not llm.is_healthy

    asyncio.run(story())


def test_another_event_loop_is_an_error_not_a_hang(steps):
    llm = AsyncLLM()
    assert asyncio.run(llm.generate("a", tokens(1))).outputs[0].text == "b"
    with pytest.raises(HeadraceError, match="event loop"):
        asyncio.run(asyncio.wait_for(llm.generate("a"), 5))
    asyncio.run(llm.aclose())


def test_snapshots_are_one_per_step_and_count_what_is_on_its_way(steps):
    async def story(llm):
        stream = llm.stream("a", tokens(100))
        await anext(stream)
        steps.go.clear()
        steps.running.clear()
        await asyncio.to_thread(steps.running.wait, 5)
        before = llm.engine_snapshot()
        assert llm.engine_snapshot() is before
        tasks = [asyncio.create_task(llm.generate("b", tokens(2, n=2))) for _ in range(3)]
        await asyncio.sleep(0)
        llm._report = None
        assert llm.engine_snapshot().num_waiting == 6
        steps.go.set()
        await asyncio.gather(*tasks)
        assert llm.engine_snapshot() is not before
        await stream.aclose()

    run(steps, story)

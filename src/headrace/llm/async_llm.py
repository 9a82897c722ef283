"""`AsyncLLM`: the same model for asyncio. A thread of its own runs the steps; the event loop never waits for one."""

import asyncio
import atexit
import itertools
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Self

from headrace.base.errors import ExecutorError, HeadraceError
from headrace.engine.metrics import EngineSnapshot
from headrace.engine.sampling import SamplingParams
from headrace.llm.collector import Collector
from headrace.llm.config import LLMConfig
from headrace.llm.inbox import Inbox
from headrace.llm.outputs import Delta, RequestOutput
from headrace.llm.refit import WeightSource, WeightUpdate
from headrace.llm.runtime import Output, Prompt
from headrace.llm.served_model import ServedModel, UpdateOptions

log = logging.getLogger(__name__)

LONG_PROMPT = 1_000
"""Characters or tokens from which a prompt is checked on another thread, so that the event loop goes on meanwhile."""

_NOBODY = (None, 0)


class AsyncLLM(ServedModel):
    """A language model for many concurrent streams in one event loop.

    Args:
        model: see `headrace.LLM`.
        served_model_name: name to show instead of the model's own.
        options: see `LLMConfig`.

    ``async with AsyncLLM(...) as llm`` starts and stops its engine thread; or call `start` and `aclose`.
    """

    def __init__(self, model: str | None = None, *, served_model_name: str | None = None, **options: Any) -> None:
        super().__init__(model, LLMConfig.of(options))
        try:
            self._model.text.prepare()  # a server that says it is ready should not have its first client wait
        except BaseException:
            self._executor.close()
            raise
        self._served_name = served_model_name
        self._numbers = itertools.count()
        self._inboxes: dict[str, tuple[Inbox, int]] = {}  # and the choice that the request's first sample is in it
        self._wake = threading.Condition()  # guards the next four
        self._submitted: list[tuple[str, list[int], SamplingParams]] = []
        self._cancelled: list[str] = []
        self._commands: list[tuple[Callable[[], WeightUpdate], Future[WeightUpdate]]] = []
        self._closing = False
        self._cause: BaseException | None = None  # what ended the engine's thread, if that was not `aclose`
        self._num_rounds = 0
        self._report: tuple[int, EngineSnapshot] | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def model_name(self) -> str:
        return self._served_name or super().model_name

    async def start(self) -> None:
        """Start the engine's thread. Idempotent.

        Raises HeadraceError in another event loop than the first time, and after `aclose` or a failure of the engine.
        """
        loop = asyncio.get_running_loop()
        if self._loop is None and not self._closing:
            self._loop = loop
            self._thread = threading.Thread(target=self._run, name="headrace-engine", daemon=True)
            self._thread.start()
            atexit.register(self._stop)  # a thread amid a step when the interpreter ends would abort the process
        if not self.is_healthy:
            raise self._refusal()
        if self._loop is not loop:
            raise HeadraceError("This AsyncLLM belongs to another event loop.", "Make one in each loop.")

    async def aclose(self) -> None:
        """Cancel what runs, stop the thread, free memory. Idempotent."""
        self._closing = True  # from now on, not from when a thread is free to say so
        await asyncio.to_thread(self._stop)
        atexit.unregister(self._stop)
        self._executor.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @property
    def is_healthy(self) -> bool:
        """Whether the engine's thread takes requests."""
        return self._thread is not None and self._thread.is_alive() and not self._closing

    def engine_snapshot(self) -> EngineSnapshot:
        """The engine's counters and gauges: a new object after each step, the same one until then.

        A step that runs meanwhile may have counted some things and not yet others. Requests on their way to the
        engine count as waiting.
        """
        num_rounds = self._num_rounds
        if self._report is None or self._report[0] != num_rounds:
            report = self._runtime.engine.snapshot()
            with self._wake:
                on_their_way = sum(params.n for _, _, params in self._submitted)
            self._report = num_rounds, replace(report, num_waiting=report.num_waiting + on_their_way)
        return self._report[1]

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> AsyncGenerator[Delta, None]:
        """Continue a prompt, increment by increment.

        Closing the generator, or cancelling the task that reads it, frees the request's KV before the next step.

        Raises InvalidRequestError or ContextLengthError before the first delta; other HeadraceErrors at any time.
        """
        async with self.submit([prompt], params or SamplingParams(), request_ids=[request_id]) as inbox:
            while deltas := await inbox.take():
                for delta in deltas.values():
                    yield delta

    @asynccontextmanager
    async def submit(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, request_ids: Sequence[str | None]
    ) -> AsyncGenerator[Inbox, None]:
        """Continue prompts side by side, all into one inbox: sample j of prompt i is its choice ``i * n + j``.

        Leaving the context cancels what has not ended. Errors are those of `stream`; the first one ends the inbox.
        """
        checked = [await self._check(prompt, params) for prompt in prompts]
        async with self._submit(checked, params, request_ids) as inbox:
            yield inbox

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> RequestOutput:
        """Continue one prompt to its end; gather several calls for a batch. Cancelling the task cancels the request."""
        params = params or SamplingParams()
        prompt_ids = await self._check(prompt, params)
        text = prompt if isinstance(prompt, str) else None
        collector = Collector(request_id or f"request-{next(self._numbers)}", text, prompt_ids, params)
        async with self._submit([prompt_ids], params, [request_id]) as inbox:
            while deltas := await inbox.take():
                for delta in deltas.values():
                    collector.add(delta)
        return collector.result()

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None, **template_arguments: Any
    ) -> RequestOutput:
        """Answer a conversation through the model's chat template. To stream, give `stream` what `render_chat` gives.

        Raises TemplateError if the model has no template or the template refuses the messages.
        """
        prompt_ids = await asyncio.to_thread(self.render_chat, messages, **template_arguments)
        return await self.generate(prompt_ids, params)

    async def update_weights(self, source: WeightSource, **options: Any) -> WeightUpdate:
        """Replace all weights while requests run. Reading and packing happen on a thread of their own, the exchange on
        the engine's, between two steps. Not undone by cancelling the caller once that has been asked for.

        See `headrace.LLM.update_weights`.
        """
        await self.start()
        return await asyncio.to_thread(self._update, source, UpdateOptions(**options))

    async def rollback_weights(self, *, running: str = "continue") -> WeightUpdate:
        """Go back to the weights before the last update: see `headrace.LLM.rollback_weights`."""
        await self.start()
        return await asyncio.to_thread(self._update, None, UpdateOptions(running=running))

    def _update(self, source: WeightSource | None, options: UpdateOptions) -> WeightUpdate:
        with self._one_update():
            if source is None:
                return self._between_steps(lambda: self._roll_back(options))
            staged, update = self._stage(source, options)
            return self._between_steps(lambda: self._install(staged, update, options))

    def _between_steps(self, command: Callable[[], WeightUpdate]) -> WeightUpdate:
        """Have the engine's thread call something before its next step, and wait for it."""
        done: Future[WeightUpdate] = Future()
        with self._wake:
            if self._closing:
                raise self._refusal()
            self._commands.append((command, done))
            self._wake.notify()
        return done.result()

    async def _check(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        if len(prompt) > LONG_PROMPT:
            return await asyncio.to_thread(self._runtime.check_prompt, prompt, params)
        return self._runtime.check_prompt(prompt, params)

    @asynccontextmanager
    async def _submit(
        self, prompts: list[list[int]], params: SamplingParams, names: Sequence[str | None]
    ) -> AsyncGenerator[Inbox, None]:
        await self.start()
        # Whatever its caller names a request, no delta reaches another.
        keys = [f"{name or 'request'}-{next(self._numbers)}" for name in names]
        inbox = Inbox(len(keys))
        self._inboxes |= {key: (inbox, index * params.n) for index, key in enumerate(keys)}
        with self._wake:
            self._submitted += [(key, prompt_ids, params) for key, prompt_ids in zip(keys, prompts, strict=True)]
            self._wake.notify()
        try:
            yield inbox
        finally:
            for key in keys:
                del self._inboxes[key]
            if not inbox.has_ended:
                with self._wake:
                    self._cancelled += keys
                    self._wake.notify()

    def _stop(self) -> None:
        """Cancel what runs and wait for the thread's end. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def _refusal(self) -> HeadraceError:
        """Why no request can run; one error for each, since raising an error writes to it."""
        if self._cause is None:
            return HeadraceError("The engine is shutting down.", "Try again later.", code="shutting_down")
        remedy = "Restart the server; its log says more."
        return ExecutorError(f"The engine stopped: {self._cause!r}.", remedy, code="engine_stopped")

    # -- On the engine's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Requests and cancellations, then a step, until closed. An unforeseen error fails every open request."""
        try:
            while self._wait_for_work():
                self._run_commands()
                outputs = self._admit()
                self._num_rounds += 1
                outputs += self._runtime.step()
                self._num_rounds += 1
                if outputs:
                    self._post(self._deliver, outputs)
        except BaseException as error:
            log.exception("the engine stopped")
            self._cause = error
        with self._wake:
            self._closing = True
        for _, done in self._commands:  # none comes any more
            done.set_exception(self._refusal())
        self._post(self._fail_all)

    def _wait_for_work(self) -> bool:
        """Sleep while there is nothing to do; False once closed."""
        with self._wake:
            while not (self._submitted or self._cancelled or self._commands or self._runtime.has_work or self._closing):
                self._wake.wait()
        return not self._closing

    def _run_commands(self) -> None:
        with self._wake:
            commands, self._commands = self._commands, []
        for command, done in commands:
            try:
                done.set_result(command())
            except BaseException as error:
                done.set_exception(error)
                if not isinstance(error, HeadraceError):
                    raise

    def _admit(self) -> list[Output]:
        """Take what was submitted, drop what was cancelled; the refusals of what the engine can never run."""
        with self._wake:
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, []
        refusals: list[Output] = []
        for key, prompt_ids, params in submitted:
            try:
                self._runtime.submit(key, prompt_ids, params)
            except HeadraceError as error:
                refusals.append((key, error))
        for key in cancelled:  # after the submissions: it may be one of them
            self._runtime.cancel(key)
        return refusals

    def _post(self, callback: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None, "the thread runs only after start()"
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            log.debug("the event loop is closed; nobody is left to tell")

    # -- On the event loop, for the engine's thread -------------------------------------------------------------------

    def _deliver(self, outputs: list[Output]) -> None:
        for key, item in outputs:
            inbox, first_choice = self._inboxes.get(key, _NOBODY)
            if inbox is None:
                continue
            if isinstance(item, HeadraceError):
                inbox.fail(item)
            else:
                inbox.put(first_choice + item.index, item)

    def _fail_all(self) -> None:
        for inbox, _ in self._inboxes.values():
            inbox.fail(self._refusal())

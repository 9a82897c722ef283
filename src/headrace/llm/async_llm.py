"""`AsyncLLM`: the same model for asyncio. A thread of its own runs the steps; the event loop never waits for one."""

import asyncio
import itertools
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any, Self

from headrace.base.errors import ExecutorError, HeadraceError
from headrace.engine.metrics import EngineSnapshot
from headrace.engine.sampling import SamplingParams
from headrace.llm.collector import Collector
from headrace.llm.config import LLMConfig
from headrace.llm.outputs import Delta, RequestOutput
from headrace.llm.runtime import Output, Prompt
from headrace.llm.served_model import ServedModel

log = logging.getLogger(__name__)

_SHUT_DOWN = HeadraceError("The engine is shutting down.", "Try again later.", code="shutting_down")

LONG_PROMPT = 20_000
"""Characters or tokens from which a prompt is checked on another thread, so that the event loop goes on meanwhile."""


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
        self._served_name = served_model_name
        self._ids = (f"request-{number}" for number in itertools.count())
        self._inboxes: dict[str, asyncio.Queue[Delta | HeadraceError]] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def model_name(self) -> str:
        return self._served_name or super().model_name

    async def start(self) -> None:
        """Start the engine's thread. Idempotent; belongs to one event loop."""
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._run, name="headrace-engine", daemon=True)
            self._thread.start()

    async def aclose(self) -> None:
        """Cancel what runs, stop the thread, free memory. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
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
        """The engine's counters and gauges. While a step runs, some may already count it and others not yet."""
        return self._runtime.engine.snapshot()

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> AsyncGenerator[Delta, None]:
        """Continue a prompt, increment by increment.

        Closing the generator, or cancelling the task that reads it, frees the request's KV before the next step.

        Raises InvalidRequestError or ContextLengthError before the first delta; other HeadraceErrors at any time.
        """
        params = params or SamplingParams()
        prompt_ids = await self._check(prompt, params)
        await self.start()
        if not self.is_healthy:
            raise _SHUT_DOWN
        request_id = request_id or next(self._ids)
        if request_id in self._inboxes:
            raise HeadraceError(f"Request id {request_id!r} is in use.", "Choose another.", code="duplicate_request_id")
        inbox: asyncio.Queue[Delta | HeadraceError] = asyncio.Queue()
        self._inboxes[request_id] = inbox
        self._tell(lambda: self._submit(request_id, prompt_ids, params))
        ended = False
        try:
            while not ended:
                item = await inbox.get()
                if isinstance(item, HeadraceError):
                    ended = True
                    raise item
                ended = item.metrics is not None
                yield item
        finally:
            del self._inboxes[request_id]
            if not ended:
                self._tell(lambda: self._runtime.cancel(request_id))

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> RequestOutput:
        """Continue a prompt to its end. Cancelling the task cancels the request."""
        params = params or SamplingParams()
        prompt_ids = await self._check(prompt, params)
        text = prompt if isinstance(prompt, str) else None
        request_id = request_id or next(self._ids)
        collector = Collector(request_id, text, prompt_ids, params)
        async for delta in self.stream(prompt_ids, params, request_id=request_id):
            collector.add(delta)
        return collector.result()

    async def _check(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        if len(prompt) > LONG_PROMPT:
            return await asyncio.to_thread(self._runtime.check_prompt, prompt, params)
        return self._runtime.check_prompt(prompt, params)

    def _submit(self, request_id: str, prompt_ids: list[int], params: SamplingParams) -> None:
        try:
            self._runtime.submit(request_id, prompt_ids, params)
        except HeadraceError as error:  # the engine will never be able to run it
            refusal: list[Output] = [(request_id, error)]
            self._post(lambda: self._deliver(refusal))

    def _tell(self, command: Callable[[], None]) -> None:
        """Have the engine's thread run `command` before its next step."""
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _run(self) -> None:
        """The engine's thread: commands, then a step, until closed. An unforeseen error fails every open request."""
        try:
            while self._obey():
                self._publish(self._runtime.step() if self._runtime.has_work else [])
        except BaseException as error:
            log.exception("the engine stopped")
            self._fail_all(ExecutorError(f"The engine stopped: {error!r}.", "Restart the server; its log says more."))
        else:
            self._fail_all(_SHUT_DOWN)

    def _obey(self) -> bool:
        """Run the waiting commands, sleeping while there is nothing to do; False once closed."""
        with self._wake:
            while not (self._commands or self._runtime.has_work or self._closing):
                self._wake.wait()
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        return not self._closing

    def _publish(self, outputs: list[Output]) -> None:
        if outputs:
            self._post(lambda: self._deliver(outputs))

    def _deliver(self, outputs: list[Output]) -> None:
        for request_id, item in outputs:
            inbox = self._inboxes.get(request_id)
            if inbox is not None:
                inbox.put_nowait(item)

    def _fail_all(self, error: HeadraceError) -> None:
        def deliver() -> None:
            for inbox in self._inboxes.values():
                inbox.put_nowait(error)

        self._closing = True
        self._post(deliver)

    def _post(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None, "the thread runs only after start()"
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            log.debug("the event loop is closed; nobody is left to tell")

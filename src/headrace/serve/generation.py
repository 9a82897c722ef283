"""One HTTP request's work: its prompts run side by side, and all of it ends at once when the client leaves."""

import asyncio
import contextlib
import logging
from dataclasses import dataclass, replace
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from headrace.base.errors import CancelledRequestError, HeadraceError
from headrace.engine.metrics import RequestMetrics
from headrace.engine.sampling import SamplingParams
from headrace.llm.outputs import Delta, RequestOutput
from headrace.serve.access import RequestRecord
from headrace.serve.errors import ClientDisconnectedError, error_body
from headrace.serve.model import AsyncModel, Prompt
from headrace.serve.replies import EventWriter
from headrace.serve.scoring import Scoring, prompt_logprobs, without_output

_LOG = logging.getLogger("headrace.serve")

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events otherwise
]
_FAREWELL_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one HTTP request asks of the model. Choice ``i * n + j`` is sample j of prompt i."""

    llm: AsyncModel
    prompts: list[Prompt]
    params: SamplingParams
    request_id: str
    scoring: Scoring = "none"

    def id_of(self, index: int) -> str:
        """The engine's name for one prompt."""
        return self.request_id if len(self.prompts) == 1 else f"{self.request_id}-{index}"


async def generate_all(generation: Generation, receive: Receive, record: RequestRecord) -> list[RequestOutput]:
    """All prompts to their ends.

    Raises:
        HeadraceError: one prompt failed; the others are cancelled.
        ClientDisconnectedError: the client left; everything is cancelled.
    """
    tasks = [
        asyncio.create_task(_generate(generation, prompt, generation.id_of(index)))
        for index, prompt in enumerate(generation.prompts)
    ]
    work = asyncio.gather(*tasks)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((work, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnectedError
        outputs = work.result()
    finally:
        await _end(work, watcher, *tasks)
    record.add_metrics([output.metrics for output in outputs])
    return outputs


async def _generate(generation: Generation, prompt: Prompt, request_id: str) -> RequestOutput:
    llm, params = generation.llm, generation.params
    output = await llm.generate(prompt, params, request_id=request_id)
    if generation.scoring == "none":
        return output
    assert params.logprobs is not None
    scored = await prompt_logprobs(llm, output.prompt_token_ids, params.logprobs, f"{request_id}-prompt")
    output = replace(output, prompt_logprobs=scored)
    return output if generation.scoring == "too" else without_output(output)


class EventStream(Response):
    """A response that streams a generation.

    Nothing is sent before the first delta is there, so that a request that cannot run gets a status of its own.
    An error after that is an event, and the stream ends without its end mark.
    """

    def __init__(self, generation: Generation, writer: EventWriter, record: RequestRecord) -> None:
        super().__init__()
        self._generation = generation
        self._writer = writer
        self._record = record
        self._client_left = False

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._write(send))
        watcher = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((work, watcher), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self._client_left = True
                raise ClientDisconnectedError
            work.result()
        finally:
            await _end(work, watcher)

    async def _write(self, send: Send) -> None:
        generation = self._generation
        ids = [generation.id_of(index) for index in range(len(generation.prompts))]
        started = False
        metrics: list[RequestMetrics] = []
        try:
            async with generation.llm.submit(generation.prompts, generation.params, request_ids=ids) as inbox:
                while deltas := await inbox.take():
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
                        started, send = True, self._record.send or send
                    if text := self._events(deltas, metrics):
                        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        except asyncio.CancelledError:
            if started and not self._client_left:
                await _say_farewell(send)
            raise
        except Exception as error:
            if not started:
                raise
            self._record.error = error
            if not isinstance(error, HeadraceError):
                _LOG.exception("stream %s failed", self._generation.request_id)
            ending = _error_event(error)
        else:
            self._record.add_metrics(metrics)
            ending = self._writer.ending(metrics)
        await send({"type": "http.response.body", "body": ending, "more_body": False})

    def _events(self, deltas: dict[int, Delta], metrics: list[RequestMetrics]) -> str:
        text = ""
        for choice, delta in deltas.items():
            text += self._writer.events(choice, delta)
            self._record.num_output_tokens += len(delta.token_ids)
            if delta.metrics is not None:
                metrics.append(delta.metrics)
        return text


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel what still runs and wait for it, so that nothing of a request outlives it."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _error_event(error: Exception) -> bytes:
    return b"data: " + error_body(error) + b"\n\n"


async def _say_farewell(send: Send) -> None:
    """End a stream that a shutdown cuts off; a client that does not read cannot hold it up."""
    error = CancelledRequestError("The server is shutting down.", "Send the request again later.")
    message = {"type": "http.response.body", "body": _error_event(error), "more_body": False}
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(send(message), _FAREWELL_SECONDS)

"""What happened to each request: its record, its line in the log, and the answer to what nobody else caught."""

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.base.errors import CancelledRequestError
from headrace.engine.metrics import RequestMetrics
from headrace.serve.errors import CLIENT_CLOSED_REQUEST, ClientDisconnectedError, error_response

_LOG = logging.getLogger("headrace.serve")
_ACCESS = logging.getLogger("headrace.serve.access")


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One HTTP request from its arrival to its end; whoever learns something about it writes it here.

    Attributes:
        request_id: sent to the client as ``x-request-id``.
        method, path: as they came.
        endpoint: the route that took it; None where there is none, so that metrics name no path a client made up.
        status: 0 until a response has begun; 499 where the client left first.
        metrics: one entry per prompt that ended.
        num_output_tokens: tokens produced, also of a request that did not end.
        error: what ended a response that had begun.
        started: seconds of the machine's monotonic clock.
        send: the server's own, past every middleware: for the parts of a body, of which none needs to know.
    """

    request_id: str
    method: str
    path: str
    endpoint: str | None = None
    status: int = 0
    metrics: list[RequestMetrics] = field(default_factory=list)
    num_output_tokens: int = 0
    error: Exception | None = None
    started: float = field(default_factory=perf_counter)
    send: Send | None = None

    def add_metrics(self, metrics: Sequence[RequestMetrics]) -> None:
        """The request ended well, with these measurements."""
        self.metrics = list(metrics)
        self.num_output_tokens = sum(one.num_output_tokens for one in metrics)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(one.num_prompt_tokens for one in self.metrics)

    @property
    def num_cached_tokens(self) -> int:
        return sum(one.num_cached_tokens for one in self.metrics)

    def line(self, seconds: float) -> str:
        """The request in the log."""
        parts = [f"{self.method} {self.path} {self.status}"]
        if self.metrics:
            ttft = min(one.ttft for one in self.metrics)
            parts.append(f"prompt={self.num_prompt_tokens} cached={self.num_cached_tokens} ttft={ttft:.3f}s")
        if self.metrics or self.num_output_tokens:
            parts.append(f"output={self.num_output_tokens}")
        if self.error is not None:
            parts.append(f"error={getattr(self.error, 'code', type(self.error).__name__)}")
        return " ".join([*parts, f"total={seconds:.3f}s", self.request_id])


def record_of(request: Request) -> RequestRecord:
    """The record that the middleware keeps of a request."""
    record: RequestRecord = request.state.record
    return record


class AccessMiddleware:
    """Outermost: gives each request its record, and makes sure that it ends with an answer and is accounted for."""

    def __init__(self, app: ASGIApp, observe: Callable[[RequestRecord], None], *, log_lines: bool) -> None:
        self._app = app
        self._observe = observe
        self._log_lines = log_lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(request_id=f"req_{os.urandom(12).hex()}", method=scope["method"], path=scope["path"])
        record.send = send
        scope.setdefault("state", {})["record"] = record

        async def send_recorded(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", record.request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_recorded)
        except ClientDisconnectedError:
            record.status = CLIENT_CLOSED_REQUEST
        except asyncio.CancelledError:  # the server shuts down, and the grace period is over
            if not record.status:
                error = CancelledRequestError("The server is shutting down.", "Send the request again later.")
                await error_response(error)(scope, receive, send_recorded)
        except Exception as error:
            _LOG.exception("%s failed", record.request_id)
            record.error = error
            if record.status:
                raise
            await error_response(error)(scope, receive, send_recorded)
        finally:
            self._close(record, scope)

    def _close(self, record: RequestRecord, scope: Scope) -> None:
        record.endpoint = getattr(scope.get("route"), "path", None)
        self._observe(record)
        if self._log_lines:
            _ACCESS.info("%s", _printable(record.line(perf_counter() - record.started)))


def _printable(line: str) -> str:
    """A path may hold line breaks; a log line may not."""
    return line if line.isprintable() else line.encode("unicode_escape").decode()

"""A client's connection: uvicorn's, with bounds on what it leaves open, the time and the size of a request's head."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from headrace.serve.errors import ApiError, error_response

HEAD_SECONDS = 10.0
"""How long a request's head may take, from the connection or from its first byte."""

MAX_UNDELIVERED = 64 << 10
"""Bytes of a head, of trailers or of chunk framing that may be collected before they make a request or a body."""


class Outbox:
    """A connection's transport that sends what was written during one turn of the event loop in one piece, at its end.

    The tokens of a step reach all clients in one turn, so that their sends follow one another without the work on the
    next client's event in between.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._written: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._written:
            self._loop.call_soon(self.flush)
        self._written.append(data)

    def flush(self) -> None:
        """Send what was written."""
        if self._written:
            written, self._written = self._written, []
            self._transport.write(b"".join(written))

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Connection(HttpToolsProtocol):
    """Closes on clients that send a head slowly (408) or without end (431), and says what is wrong in JSON."""

    _deadline: asyncio.TimerHandle | None = None
    _undelivered = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(Outbox(transport, self.loop))  # type: ignore[arg-type]
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._undelivered += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._undelivered > MAX_UNDELIVERED:
            self._refuse(431, f"The request's head exceeds {MAX_UNDELIVERED} bytes.", "head_too_large")
        elif self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()

    def on_headers_complete(self) -> None:
        self._undelivered = 0
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._undelivered = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for bytes that are no HTTP."""
        self._refuse(400, msg, "invalid_http")

    def _await_head(self) -> None:
        cause = f"The request's head did not arrive within {HEAD_SECONDS:g} seconds."
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._refuse, 408, cause, "request_timeout")

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, status: int, cause: str, code: str) -> None:
        """Answer, unless an answer is on its way already, and close."""
        if self.cycle is None or self.cycle.response_complete:
            answer = error_response(ApiError(status, cause, code=code, headers={"connection": "close"}))
            head = b"".join(name + b": " + value + b"\r\n" for name, value in answer.raw_headers)
            self.transport.write(STATUS_LINE[status] + head + b"\r\n" + bytes(answer.body))
        self.transport.close()

"""The real server on a real socket, in a thread of the test's own process."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from headrace.serve.config import ServerConfig
from headrace.serve.port import reserve_port
from headrace.serve.server import Server, create_app


@dataclass(frozen=True)
class LiveServer:
    """A server that answers at `url`; `llm` lives in its thread and may be read from the test's."""

    url: str
    port: int
    llm: Any
    server: Server


@contextlib.contextmanager
def serving(make_llm: Callable[[], Any], **config: Any) -> Iterator[LiveServer]:
    """Start a model and a server over it, stop both at the end. `make_llm` runs in the server's thread."""
    listener = reserve_port("127.0.0.1", 0)
    port = listener.getsockname()[1]
    started = threading.Event()
    found: dict[str, Any] = {}

    async def run() -> None:
        settings = ServerConfig(**{"access_log": False, "grace_seconds": 1, **config})
        llm = make_llm()
        server = Server(create_app(llm, settings), settings)
        await llm.start()
        found.update(llm=llm, server=server)
        started.set()
        try:
            await server.serve(sockets=[listener])
        finally:
            await llm.aclose()

    thread = threading.Thread(target=_run_and_report, args=(run, found, started), daemon=True)
    thread.start()
    started.wait(60)
    if "error" in found:
        raise found["error"]
    try:
        yield LiveServer(f"http://127.0.0.1:{port}", port, found["llm"], found["server"])
    finally:
        found["server"].should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"


def _run_and_report(run: Callable[[], Any], found: dict[str, Any], started: threading.Event) -> None:
    try:
        asyncio.run(run())
    except BaseException as error:
        found["error"] = error
        started.set()

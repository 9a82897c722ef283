"""The application and the process around it."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import headrace
from headrace.base.errors import HeadraceError
from headrace.serve.access import AccessMiddleware
from headrace.serve.api import build_routers
from headrace.serve.config import ServerConfig
from headrace.serve.connection import Connection
from headrace.serve.errors import answer_headrace_error, answer_routing_error
from headrace.serve.metrics import ServerMetrics
from headrace.serve.model import AsyncModel
from headrace.serve.openapi import describe
from headrace.serve.port import BACKLOG, reserve_port
from headrace.serve.protocol import ChatRequest, CompletionRequest
from headrace.serve.weights import RollbackRequest, UpdateRequest

_LOG = logging.getLogger("headrace.serve")

__all__ = ["ServerConfig", "create_app", "reserve_port", "serve"]


def create_app(llm: AsyncModel, config: ServerConfig) -> FastAPI:
    """The ASGI application over a model that somebody else starts and closes."""
    # The interactive pages would load scripts from elsewhere; the schema itself is at /openapi.json.
    app = FastAPI(title="headrace", version=headrace.__version__, docs_url=None, redoc_url=None)
    metrics = ServerMetrics()
    for router in build_routers(llm, config, metrics):
        app.include_router(router)
    updates = (UpdateRequest, RollbackRequest) if config.weight_updates is not None else ()
    describe(app, (ChatRequest, CompletionRequest, *updates))
    app.add_exception_handler(HeadraceError, answer_headrace_error)
    app.add_exception_handler(HTTPException, answer_routing_error)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    app.add_middleware(AccessMiddleware, observe=metrics.observe, log_lines=config.access_log)
    return app


def serve(llm: AsyncModel, config: ServerConfig, listener: socket.socket) -> None:
    """Start the model, serve it on a listening socket until SIGINT or SIGTERM, close both.

    On the first signal no new connection is accepted and running requests get ``config.grace_seconds`` to end; the
    rest then end with an error. A second signal stops at once.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    server = Server(create_app(llm, config), config)
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(_run(server, llm, listener))


class Server(uvicorn.Server):
    """uvicorn, without its own logging and without its last act, which is to die by the signal that stopped it."""

    def __init__(self, app: FastAPI, config: ServerConfig) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                http=Connection,  # over httptools: 13% less time per streamed token than h11
                loop="asyncio",  # uvloop brought nothing measurable
                ws="none",
                backlog=BACKLOG,
                timeout_graceful_shutdown=config.grace_seconds,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal stops gently; any other one at once, running requests or not."""
        running = self.server_state.tasks
        if self.should_exit:
            self.force_exit = True
            for task in running:
                task.cancel()
        elif running:
            seconds = self.config.timeout_graceful_shutdown
            _LOG.info("stopping; %d running requests may take %s s, a second signal ends them", len(running), seconds)
        super().handle_exit(sig, frame)


async def _run(server: Server, llm: AsyncModel, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    async with _started(llm):
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.handle_exit, number, None)
        await server.serve(sockets=[listener])
        if tasks := server.server_state.tasks:  # cancelled when the grace period ended; they say so to their clients
            await asyncio.wait(tasks, timeout=2.0)


@contextlib.asynccontextmanager
async def _started(llm: AsyncModel) -> AsyncIterator[None]:
    await llm.start()
    try:
        yield
    finally:
        await llm.aclose()

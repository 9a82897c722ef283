"""Asking an application without a socket, and reading server-sent events."""

import asyncio
import json
from typing import Any

import httpx

from headrace.serve.config import ServerConfig
from headrace.serve.server import create_app


def ask(llm: Any, method: str, path: str, *, config: ServerConfig | None = None, **request: Any) -> httpx.Response:
    """One request to a new application over `llm`, whole answer."""
    return ask_all(llm, [(method, path, request)], config=config)[0]


def ask_all(
    llm: Any, requests: list[tuple[str, str, dict[str, Any]]], *, config: ServerConfig | None = None
) -> list[httpx.Response]:
    """Several requests to one application, one after another."""

    async def run() -> list[httpx.Response]:
        app = create_app(llm, config or ServerConfig(access_log=False))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [await client.request(method, path, **request) for method, path, request in requests]

    return asyncio.run(run())


def chat_body(content: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": content}], **fields}


def completion_body(prompt: Any = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": prompt, **fields}


def events(text: str) -> list[Any]:
    """The payloads of an event stream; the end mark as the string ``[DONE]``."""
    assert text.endswith("\n\n"), "an event ends with an empty line"
    payloads = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        assert event.startswith("data: "), event
        data = event.removeprefix("data: ")
        payloads.append(data if data == "[DONE]" else json.loads(data))
    return payloads

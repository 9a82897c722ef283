"""Clients that send slowly, without end, or more than they may: each is bounded, and hurts nobody else."""

import asyncio
import json
import socket
import time

import httpx
import pytest

from headrace.serve import body as body_module
from headrace.serve import connection, protocol
from headrace.serve.config import ServerConfig
from headrace.serve.server import create_app
from tests.support.fake_llm import FakeLLM
from tests.support.http_client import ask, chat_body, completion_body
from tests.support.live_server import serving

CHAT = "/v1/chat/completions"
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()


def answer_to(server, *parts, pause=0.0):
    """What comes back, to the connection's end, for bytes sent in parts."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        try:
            for part in parts:
                client.sendall(part)
                time.sleep(pause)
        except OSError:
            pass  # the server closed first
        received = b""
        try:
            while data := client.recv(1 << 16):
                received += data
        except ConnectionResetError:  # it closed with our bytes unread
            pass
        return received


@pytest.mark.parametrize("sent", [[], [b"GET /health HT"], [HEAD], [HEAD + b"X-A: "], [b"\r\n"] * 6, [b"G"] * 1])
def test_a_head_that_does_not_come_is_408(sent, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with serving(FakeLLM) as server:
        started = time.monotonic()
        assert answer_to(server, *sent, pause=0.02).startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - started < 3
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_second_head_that_does_not_come_closes_the_connection(monkeypatch):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    with serving(FakeLLM) as server:
        received = answer_to(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /hea", pause=0.1)
        assert received.startswith(b"HTTP/1.1 200 ")
        assert b"HTTP/1.1 408 " in received


def test_a_running_request_has_no_deadline_for_its_head(monkeypatch):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.2)
    with serving(lambda: FakeLLM(reply=lambda prompt, sample: "x" * 50, delay=0.01)) as server:
        answer = httpx.post(server.url + CHAT, json=chat_body(max_tokens=50), timeout=10)
        assert answer.json()["usage"]["completion_tokens"] == 50


def test_a_body_that_does_not_come_is_408(monkeypatch):
    monkeypatch.setattr(body_module, "BODY_SECONDS", 0.2)
    with serving(FakeLLM) as server:
        received = answer_to(server, HEAD + b'Content-Length: 100\r\n\r\n{"model"')
        assert received.startswith(b"HTTP/1.1 408 ")
        assert b'"request_timeout"' in received


FLOODS = {
    "many headers": [HEAD, *[b"X-%d: y\r\n" % i * 50 for i in range(400)]],
    "one long header": [HEAD + b"X: ", *[b"y" * 1000] * 300],
    "a long path": [b"GET /", *[b"y" * 1000] * 300],
    "blank lines": [b"\r\n" * 1000] * 300,
    "trailers": [HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX: ", *[b"y" * 1000] * 300],
    "chunk extensions": [HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;", *[b"y" * 1000] * 300],
}


@pytest.mark.parametrize("parts", FLOODS.values(), ids=FLOODS.keys())
def test_floods_are_cut_off(parts):
    with serving(FakeLLM) as server:
        received = answer_to(server, *parts)
        assert received.split(b" ")[1:2] in ([], [b"431"], [b"400"])
        assert not server.server.server_state.connections
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_what_is_not_http_is_an_openai_error():
    with serving(FakeLLM) as server:
        received = answer_to(server, b"\x16\x03\x01 this is TLS\r\n\r\n")
        head, _, body = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error"]["code"] == "invalid_http"


def text_of(fields):
    return json.dumps({**chat_body(), **fields}).encode()


MANY = 300_000
LARGE_BODIES = {
    "unknown fields": (text_of({f"a{i}": 1 for i in range(MANY)}), "unknown_field"),
    "unknown fields of a message": (
        text_of({"messages": [{"role": "user", "content": "x", **{f"a{i}": 1 for i in range(MANY)}}]}),
        "unknown_field",
    ),
    "one long unknown field": (text_of({"a" * 6_000_000: 1}), "unknown_field"),
    "wrong biases": (text_of({"logit_bias": {f"{i}": "x" for i in range(MANY)}}), "invalid_value"),
    "wrong metadata": (text_of({"metadata": {f"{i}": 1 for i in range(MANY)}}), "invalid_value"),
    "wrong messages": (text_of({"messages": [1] * MANY}), "invalid_value"),
    "stop strings": (text_of({"stop": ["x"] * MANY}), "invalid_value"),
    "stop tokens": (text_of({"stop_token_ids": [1] * MANY}), "invalid_value"),
    "digits": (text_of({}).replace(b'"fake"', b"1" * 6_000_000), "invalid_json"),
}


@pytest.mark.parametrize(("content", "code"), LARGE_BODIES.values(), ids=LARGE_BODIES.keys())
def test_a_large_wrong_body_holds_the_event_loop_briefly(content, code):
    async def run():
        app = create_app(FakeLLM(), ServerConfig(access_log=False))
        transport = httpx.ASGITransport(app)
        longest, last = 0.0, time.perf_counter()
        headers = {"content-type": "application/json"}
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            request = asyncio.create_task(client.post(CHAT, content=content, headers=headers))
            while not request.done():
                await asyncio.sleep(0.001)
                now = time.perf_counter()
                longest, last = max(longest, now - last), now
            return await request, longest

    answer, longest = asyncio.run(run())
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert len(answer.content) < 1000
    assert longest < 0.75, "building an error for each item takes seconds"


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"stop": ["x"] * protocol.MAX_STOPS}, 200),
        ({"stop": ["x"] * (protocol.MAX_STOPS + 1)}, 400),
        ({"stop": "x" * protocol.MAX_STOP_LENGTH}, 200),
        ({"stop": "x" * (protocol.MAX_STOP_LENGTH + 1)}, 400),
        ({"metadata": {str(i): "x" for i in range(protocol.MAX_METADATA)}}, 200),
        ({"metadata": {str(i): "x" for i in range(protocol.MAX_METADATA + 1)}}, 400),
        ({"logit_bias": {str(i): 1 for i in range(200)}}, 200),
    ],
)
def test_limits_are_where_they_are_said_to_be(fields, status):
    assert ask(FakeLLM(), "POST", "/v1/completions", json=completion_body(**fields)).status_code == status

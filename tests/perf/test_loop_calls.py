"""What Python does per token outside the plan, counted, not timed, so that no machine's speed matters."""

import asyncio
import socket
import sys
import threading
import time

import pytest

from headrace.engine.sampling import SamplingParams
from headrace.engine.step import SampleRow
from headrace.executors.native_sampling import SamplingEncoder
from headrace.llm.async_llm import AsyncLLM
from headrace.serve.config import ServerConfig
from headrace.serve.port import reserve_port
from headrace.serve.server import Server, create_app
from tests.support.byte_text import counting_model

NUM_CLIENTS = 8
SHORT, LONG = 8, 40
EVENT_LOOP_CALLS = 85
"""Of Python and C functions, per streamed token; counted with CPython 3.11: 69."""
ENCODER_CALLS = 20
"""Per step of a decoding batch, however many rows it has; counted: 3 and 8."""


class Counted:
    """Counts calls of Python and C functions in this thread."""

    def __enter__(self):
        self.calls = 0
        sys.setprofile(self._note)
        return self

    def _note(self, frame, event, argument):
        self.calls += event in ("call", "c_call")

    def __exit__(self, *_):
        sys.setprofile(None)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_calls_of_encoding_a_decoding_batch(temperature, report_figure):
    counts = []
    for num_rows in (8, 64):
        encoder, each = SamplingEncoder(), [SamplingParams(temperature=temperature) for _ in range(num_rows)]
        steady = tuple(SampleRow(params, 0, 0) for params in each)
        for index in range(4):
            step = tuple(SampleRow(params, i, index) for i, params in enumerate(each)) if temperature else steady
            with Counted() as counted:
                encoder.encode(step)
        counts.append(counted.calls)
    report_figure(f"encoding 64 decoding rows of temperature {temperature}: {counts[1]} calls")
    assert max(counts) <= ENCODER_CALLS


def read_streams(port, num_tokens, done):
    """All clients' streams, read to their ends, one event as it comes."""
    body = b'{"model":"counter","prompt":[97],"stream":true,"temperature":0,"max_tokens":%d}' % num_tokens
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    clients = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(NUM_CLIENTS)]
    for client in clients:
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    for client in clients:
        data = b"".join(iter(lambda client=client: client.recv(1 << 16), b""))
        done.append(data.count(b"data: {"))
        client.close()


def event_loop_calls(num_tokens):
    """Calls of a server's event loop while all clients stream, and the events that they got."""
    events = []

    async def run():
        settings = ServerConfig(access_log=False, grace_seconds=1)
        listener = reserve_port("127.0.0.1", 0)
        async with AsyncLLM(max_num_seqs=NUM_CLIENTS) as llm:
            server = Server(create_app(llm, settings), settings)
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            reader = threading.Thread(target=read_streams, args=(listener.getsockname()[1], num_tokens, events))
            reader.start()
            with Counted() as counted:
                while reader.is_alive():
                    await asyncio.sleep(0.02)
            server.should_exit = True
            await serving
        return counted.calls

    return asyncio.run(run()), sum(events)


def test_calls_of_the_event_loop(monkeypatch, report_figure):
    model = counting_model(lambda step: time.sleep(0.01))  # so that no event holds more than one token
    monkeypatch.setattr("headrace.llm.served_model.load_model", lambda name, config: model)
    monkeypatch.setattr(type(model.executor), "close", lambda self: None)  # one model for all
    event_loop_calls(2)  # what happens once per process
    (short, few), (long, many) = event_loop_calls(SHORT), event_loop_calls(LONG)
    assert (few, many) == (NUM_CLIENTS * SHORT, NUM_CLIENTS * LONG), "tokens came together"
    calls = (long - short) / (many - few)
    report_figure(f"event loop: {calls:.0f} calls per streamed token")
    assert calls <= EVENT_LOOP_CALLS

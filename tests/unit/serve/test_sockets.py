"""What only a real socket shows: clients that leave or do not read, shutdown, ports."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from headrace.base.errors import HeadraceError
from headrace.serve.port import reserve_port
from tests.support.fake_llm import FakeLLM
from tests.support.http_client import chat_body, completion_body, events
from tests.support.live_server import serving

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def slow_llm():
    return FakeLLM(reply=lambda prompt, sample: "x" * 4000, delay=0.01)


def wait_until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(stream):
    with serving(slow_llm) as server:
        body = json.dumps(chat_body(stream=stream, n=2)).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            client.sendall(head.encode() + b"\r\n\r\n" + body)
            wait_until(lambda: server.llm.num_running == 2)
            if stream:
                assert client.recv(1000).startswith(b"HTTP/1.1 200")
        left = time.monotonic()
        wait_until(lambda: server.llm.num_free_blocks == server.llm.num_blocks)
        assert time.monotonic() - left < 0.5
        page = httpx.get(f"{server.url}/metrics").text
        assert 'headrace_http_requests_total{endpoint="/v1/chat/completions",status="499"} 1' in page


def test_a_client_that_leaves_the_queue_is_forgotten():
    with serving(lambda: FakeLLM(reply=lambda prompt, sample: "x" * 4000, delay=0.01, max_num_seqs=1)) as server:
        with httpx.stream("POST", server.url + CHAT, json=chat_body(stream=True)) as running:
            parts = running.iter_raw()  # dropping it would close the response
            next(parts)
            with contextlib.suppress(httpx.ReadTimeout):
                httpx.post(server.url + CHAT, json=chat_body(), timeout=0.2)
            wait_until(lambda: server.llm.num_waiting == 0)
            assert server.llm.num_started == 1
        wait_until(lambda: server.llm.num_free_blocks == server.llm.num_blocks)


def test_a_slow_reader_gets_everything_in_fewer_chunks():
    """40,000 tokens of one byte at full speed: the sockets' buffers fill, then increments merge."""

    def make():
        llm = FakeLLM(reply=lambda prompt, sample: "".join(chr(97 + i % 26) for i in range(40_000)))
        llm.max_model_len = 10**6
        return llm

    with serving(make) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        body = json.dumps(completion_body(stream=True, max_tokens=40_000)).encode()
        head = f"POST {COMPLETIONS} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        wait_until(lambda: server.llm.num_output_tokens == 40_000, 60)
        raw = b"".join(iter(lambda: client.recv(1 << 16), b""))
    chunks = [json.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: {")]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == "".join(chr(97 + i % 26) for i in range(40_000))
    assert len(chunks) < 25_000


def test_concurrent_streams_do_not_mix():
    with serving(FakeLLM) as server:
        found = {}

        def read(name):
            body = chat_body(name, stream=True)
            text = httpx.post(server.url + CHAT, json=body, timeout=30).text
            found[name] = "".join(e["choices"][0]["delta"].get("content", "") for e in events(text)[:-1])

        threads = [threading.Thread(target=read, args=(f"client {i}",)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {f"client {i}": f"[0] you said: user: client {i}\nassistant: " for i in range(16)}


def test_a_full_queue_is_429():
    def make():
        return FakeLLM(reply=lambda prompt, sample: "x" * 400, delay=0.01, max_num_seqs=1)

    with serving(make, max_queue=2) as server, contextlib.ExitStack() as stack:
        running = stack.enter_context(httpx.stream("POST", server.url + CHAT, json=chat_body(stream=True)))
        parts = running.iter_raw()  # dropping it would close the response
        next(parts)
        waiting = [threading.Thread(target=_post_quietly, args=(server.url + CHAT,), daemon=True) for _ in range(2)]
        for thread in waiting:
            thread.start()
        wait_until(lambda: server.llm.num_waiting == 2)
        answer = httpx.post(server.url + CHAT, json=chat_body())
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "overloaded"


def _post_quietly(url):
    with contextlib.suppress(httpx.HTTPError):
        httpx.post(url, json=chat_body(), timeout=2)


SCRIPT = """
import sys
from headrace.serve.server import ServerConfig, reserve_port, serve
from tests.support.fake_llm import FakeLLM
llm = FakeLLM(reply=lambda prompt, sample: "x" * int(sys.argv[1]), delay=0.01)
config = ServerConfig(port=0, grace_seconds=int(sys.argv[2]))
with reserve_port(config.host, config.port) as listener:
    print(listener.getsockname()[1], flush=True)
    serve(llm, config, listener)
print("closed", llm.is_open, llm.num_free_blocks == llm.num_blocks, flush=True)
"""


@contextlib.contextmanager
def process(num_tokens, grace):
    command = [sys.executable, "-c", SCRIPT, str(num_tokens), str(grace)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": _path()}
    ) as running:
        try:
            yield running, f"http://127.0.0.1:{int(running.stdout.readline())}"
        finally:
            running.kill()


def _path():
    return os.pathsep.join(path for path in sys.path if path) + os.pathsep + os.getcwd()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_end(number):
    with process(num_tokens=60, grace=10) as (server, url):
        with httpx.stream("POST", url + CHAT, json=chat_body(stream=True), timeout=30) as answer:
            parts = answer.iter_text()
            text = next(parts)
            server.send_signal(number)
            text += "".join(parts)
        assert events(text)[-1] == "[DONE]"
        out, err = server.communicate(timeout=10)
        assert (server.returncode, out) == (0, "closed False True\n"), err
        assert "POST /v1/chat/completions 200 prompt=" in err
        assert "Traceback" not in err


@pytest.mark.parametrize("stream", [True, False])
def test_after_the_grace_period_requests_end_with_an_error(stream):
    with process(num_tokens=4000, grace=1) as (server, url):
        threading.Timer(0.3, server.send_signal, (signal.SIGTERM,)).start()
        answer = httpx.post(url + CHAT, json=chat_body(stream=stream), timeout=30)
        error = events(answer.text)[-1]["error"] if stream else answer.json()["error"]
        assert (answer.status_code, error["code"]) == (200 if stream else 503, "cancelled")
        out, err = server.communicate(timeout=10)
        assert (server.returncode, out) == (0, "closed False True\n"), err
        assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(number):
    with process(num_tokens=4000, grace=30) as (server, url):
        with httpx.stream("POST", url + CHAT, json=chat_body(stream=True), timeout=30) as answer:
            parts = answer.iter_text()
            text = next(parts)
            server.send_signal(number)
            assert "a second signal ends them" in server.stderr.readline()
            signalled = time.monotonic()
            server.send_signal(number)
            text += "".join(parts)
        assert events(text)[-1]["error"]["code"] == "cancelled"
        out, err = server.communicate(timeout=10)
        assert time.monotonic() - signalled < 5
        assert (server.returncode, out) == (0, "closed False True\n"), err
        assert "Traceback" not in err


def test_a_taken_port_says_by_whom():
    with reserve_port("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(HeadraceError) as caught:
            reserve_port("127.0.0.1", port)
    assert str(port) in caught.value.cause
    assert f"pid {os.getpid()}" in caught.value.cause
    assert "--port" in caught.value.remedy
    reserve_port("127.0.0.1", port).close()


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7", "x" * 300])
def test_a_host_that_is_not_ours(host):
    with pytest.raises(HeadraceError, match=r"127\.0\.0\.1"):
        reserve_port(host, 0)


def test_ipv6_and_any_address():
    if socket.has_ipv6 and os.path.exists("/proc/net/if_inet6"):
        reserve_port("::1", 0).close()
    reserve_port("0.0.0.0", 0).close()

"""A server process under 64 streaming clients, a third of which leave: the rest are served, all KV is freed."""

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time

import httpx
import pytest

NUM_CLIENTS = 64
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a village by the river,",
    "机器学习是",
    "The three laws of motion are",
    "SELECT name FROM users WHERE",
    "A headrace brings water to",
    "Q: What is 2 + 2?\nA:",
]
REQUESTS = [
    {"prompt": prompt, "max_tokens": 24, "temperature": temperature, "seed": index, "ignore_eos": True}
    for index, (prompt, temperature) in enumerate((p, t) for p in PROMPTS for t in (0.0, 0.9))
]


@pytest.fixture(scope="module")
def url():
    command = [sys.executable, "-m", "headrace.cli", "serve", "--port", "0", "--max-model-len", "1024"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as server:
        try:
            shown = []
            for line in server.stdout:
                shown.append(line)
                if ready := re.search(r"http://[\w.:]+\d", line):
                    break
            else:
                pytest.fail("the server did not start:\n" + "".join(shown))
            yield ready[0]
            server.terminate()
            server.stdout.read()
            assert server.wait(30) == 0
        finally:
            server.kill()


@pytest.fixture(scope="module")
def model(url):
    return httpx.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"]


async def stream(client, url, body, leave_after):
    """The text of a stream, or None where the client left after some chunks."""
    text, num_chunks, ended = "", 0, False
    async with client.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if not line:
                continue
            assert line.startswith("data: ")
            if line == "data: [DONE]":
                ended = True
                continue
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            text += chunk["choices"][0]["text"]
            num_chunks += 1
            if num_chunks == leave_after:
                return None
    assert ended
    return text


def figures(url):
    page = httpx.get(f"{url}/metrics", timeout=30).text
    return {name: float(value) for name, value in re.findall(r"^(headrace_\S+) (\S+)$", page, re.MULTILINE)}


def test_64_clients_a_third_of_which_leave(url, model):
    def alone(body):
        answer = httpx.post(f"{url}/v1/completions", json={"model": model, **body}, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    expected = [alone(body) for body in REQUESTS]
    rng = random.Random(5)
    leavers = set(rng.sample(range(NUM_CLIENTS), NUM_CLIENTS // 3))

    async def run():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:

            async def one(number):
                await asyncio.sleep(rng.uniform(0, 0.2))
                body = {"model": model, **REQUESTS[number % len(REQUESTS)]}
                if number not in leavers:
                    return await stream(client, url, body, None)
                # So much is asked for that nothing but the cancellation can have freed its blocks.
                return await stream(client, url, {**body, "max_tokens": 900}, rng.randint(1, 5))

            return await asyncio.gather(*(one(number) for number in range(NUM_CLIENTS)))

    texts = asyncio.run(run())
    for number, text in enumerate(texts):
        if number in leavers:
            assert text is None
        else:
            assert text == expected[number % len(REQUESTS)], f"client {number}"

    deadline = time.monotonic() + 10
    while (now := figures(url))["headrace_kv_blocks_in_use"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert now["headrace_kv_blocks_in_use"] == 0
    assert now["headrace_requests_running"] == now["headrace_requests_waiting"] == 0
    assert now['headrace_requests_total{outcome="cancelled"}'] == len(leavers)
    assert now["headrace_kv_blocks_total"] > 0


def test_shared_prefixes_are_reported(url, model):
    body = {"model": model, "prompt": "The quick brown fox jumps over the lazy dog. " * 20, "max_tokens": 2}
    first, second = (httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["usage"] for _ in range(2))
    assert second["prompt_tokens"] == first["prompt_tokens"]
    assert second["prompt_tokens_details"]["cached_tokens"] > first["prompt_tokens"] // 2


def test_port_in_use_is_known_before_the_model_is_loaded(url):
    port = url.rpartition(":")[2]
    command = [sys.executable, "-m", "headrace.cli", "serve", "--port", port]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode != 0
    assert f"Port {port}" in done.stderr
    assert "--port" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 10

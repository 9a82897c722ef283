"""Weights replaced over HTTP while a real, tiny model serves."""

import hashlib
import json
import threading
from pathlib import Path

import httpx
import pytest

from headrace import AsyncLLM
from headrace.base.errors import InvalidRequestError
from headrace.serve.config import ServerConfig
from tests.support.live_server import serving
from tests.support.tiny_model import write_model

ASK = {"model": "tiny", "prompt": "abc", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def folder(tmp_path):
    for seed in range(3):
        write_model(tmp_path / f"step-{seed}", seed=seed)
    return tmp_path


@pytest.fixture
def client(folder):
    def make():
        return AsyncLLM(str(folder / "step-0/tiny.gguf"), served_model_name="tiny", max_num_seqs=4)

    with serving(make, weight_updates=folder) as server, httpx.Client(base_url=server.url, timeout=30) as made:
        yield made


def choice(client, **changes):
    reply = client.post("/v1/completions", json={**ASK, **changes})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]


def put(client, **body):
    return client.post("/v1/weights", json=body)


def test_an_update_and_the_way_back(client, folder):
    assert client.get("/v1/weights").json() == {"object": "weights", "version": 0}
    before = choice(client)
    assert before["weight_versions"] == [0] * 12
    digest = hashlib.sha256((folder / "step-1/tiny.gguf").read_bytes()).hexdigest()
    reply = put(client, path="step-1/tiny.gguf", version=5, keep_previous=True, sha256={"tiny.gguf": digest})
    assert reply.status_code == 200, reply.text
    assert (reply.json()["version"], reply.json()["replaced"]) == (5, 0)
    after = choice(client)
    assert after["weight_versions"] == [5] * 12
    assert after["text"] != before["text"]
    assert "headrace_weight_version 5" in client.get("/metrics").text
    assert client.post("/v1/weights/rollback", json={"running": "recompute"}).json()["version"] == 0
    assert choice(client) == before
    assert client.post("/v1/weights/rollback", json={}).json()["error"]["code"] == "no_previous"


def test_a_stream_tells_which_weights_gave_each_token(client):
    tokens, versions, updated = 0, [], threading.Event()
    with client.stream("POST", "/v1/completions", json={**ASK, "max_tokens": 48, "stream": True}) as stream:
        for line in stream.iter_lines():
            if not line.startswith("data: {"):
                continue
            (found,) = json.loads(line[6:])["choices"]
            versions += found["weight_versions"]
            tokens += len(found["weight_versions"])
            if not updated.is_set():
                updated.set()
                assert put(client, path="step-1/tiny.gguf").status_code == 200
    assert tokens == 48
    assert versions == sorted(versions)
    assert set(versions) <= {0, 1}


def test_chat_replies_tell_too(client):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "abc"}], "max_tokens": 3, "ignore_eos": True}
    assert client.post("/v1/chat/completions", json=body).json()["choices"][0]["weight_versions"] == [0] * 3


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"path": "../elsewhere"}, 400, "does not lie in the folder"),
        ({"path": "/etc/passwd"}, 400, "does not lie in the folder"),
        ({"path": "step-1\0/tiny.gguf"}, 400, "does not lie in the folder"),
        ({"path": "link/tiny.gguf"}, 400, "does not lie in the folder"),
        ({"path": "step-9"}, 404, "does not exist"),
        ({"path": "broken.gguf"}, 400, "broken.gguf"),
        ({"path": "lacking/tiny.gguf"}, 400, "lacks 1 tensors"),
        ({"path": "step-1/tiny.gguf", "version": 0}, 400, "not above 0"),
        ({"path": "step-1/tiny.gguf", "running": "abort"}, 400, "running"),
        ({"path": "step-1/tiny.gguf", "sha256": {"tiny.gguf": "00"}}, 400, "digest"),
        ({"path": "step-1/tiny.gguf", "sha": {}}, 400, "sha256"),
        ({"path": ""}, 400, "path"),
        ({}, 400, "path"),
    ],
)
def test_bad_updates_are_refused_and_serving_goes_on(client, folder, tmp_path_factory, body, status, said):
    write_model(folder / "lacking", without=("blk.1.ffn_down.weight",))
    (folder / "broken.gguf").write_bytes(b"GGUF" + bytes(20))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_model(elsewhere)
    (folder / "link").symlink_to(elsewhere)
    before = choice(client)
    reply = put(client, **body)
    assert reply.status_code == status, reply.text
    assert said in reply.json()["error"]["message"]
    assert choice(client) == before


def test_without_a_folder_there_is_no_endpoint(folder):
    def make():
        return AsyncLLM(str(folder / "step-0/tiny.gguf"), served_model_name="tiny", max_num_seqs=4)

    with serving(make) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        assert put(client, path="step-1/tiny.gguf").status_code == 404
        assert "weight_versions" not in choice(client)


def test_the_key_guards_weights(folder):
    def make():
        return AsyncLLM(str(folder / "step-0/tiny.gguf"), served_model_name="tiny", max_num_seqs=4)

    with serving(make, weight_updates=folder, api_key="k") as server, httpx.Client(base_url=server.url) as client:
        assert put(client, path="step-1/tiny.gguf").status_code == 401
        assert client.get("/v1/weights").status_code == 401


def test_a_folder_that_is_none_is_said_at_once():
    with pytest.raises(InvalidRequestError, match="no folder"):
        ServerConfig(weight_updates=Path("/nonexistent"))

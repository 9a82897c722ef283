"""A side on a server: this project's own over a socket, and scripted ones that answer otherwise."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from math import isnan

import numpy as np
import pytest

from headrace.align import report
from headrace.align.alignment import align
from headrace.align.server import PeerError, ServerSide, open_server, server_named
from headrace.align.sides import tokenizer_of
from headrace.align.subjects import Subject
from headrace.base.errors import InvalidRequestError, ModelNotFoundError
from headrace.cli.main import main
from headrace.llm.async_llm import AsyncLLM
from tests.support.live_server import serving
from tests.support.tiny_model import write_model

TOKENS = [np.random.default_rng(i).integers(0, 90, 24).tolist() for i in range(2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model):
    with serving(lambda: AsyncLLM(model, served_model_name="tiny", max_model_len=64), api_key="secret") as live:
        yield f"{live.url}/v1"


def compared(a, b):
    return align(a, b, TOKENS, threshold=1e-3, by_cause=False)


def test_the_same_model_behind_a_socket_differs_by_f32_only(model, server):
    found = compared(Subject(model=model), ServerSide(url=server, key="secret"))
    d = found.divergence
    assert d.logprob_delta_max < 2e-6, "a log-probability in f32 beside one in f64 of the same logits"
    assert d.num_positions == 46
    assert d.top1_agreement == 1
    assert isnan(d.kl_mean)
    assert not found.nodes
    assert found.exceeded({"kl": 1.0}) == ["kl is not known, not below 1"]
    assert not found.exceeded({"dlogprob": 1e-3, "flips": 1e-3, "clipped": 1e-3})


def test_a_difference_is_measured_as_between_two_models(model, server):
    other = Subject(model=model, weights="int4-g32")
    through, direct = compared(ServerSide(url=server, key="secret"), other), compared(Subject(model=model), other)
    assert through.divergence.logprob_delta_mean == pytest.approx(direct.divergence.logprob_delta_mean, abs=1e-5)
    assert through.divergence.top1_agreement == direct.divergence.top1_agreement < 1
    assert through.policy.k3 == pytest.approx(direct.policy.k3, abs=1e-5)
    assert "no whole distributions" in report.to_text(through)
    assert json.loads(report.to_json(through))["divergence"]["kl_mean"] is None


def test_the_command(model, server, capsys):
    few = ["--texts", "2", "--length", "32"]
    peer = f"{server}?model=tiny&key=secret"
    assert main(["align", model, peer, *few, "--budget", "dlogprob<1e-4"]) == 0
    assert "secret" not in capsys.readouterr().out
    assert main(["align", peer, model, *few, "--budget", "kl<1"]) == 1
    capsys.readouterr()
    for wrong, said in (
        ([model, peer, "--causes"], "taken back"),
        ([peer, "--ladder"], "server"),
        ([peer, peer], "tokenizer"),
        ([model, f"{server}?model=other&key=secret"], "tiny"),
        ([model, f"{server}?model=tiny"], "key"),
    ):
        assert main(["align", *wrong, *few]) == 1
        assert said in capsys.readouterr().err


def test_servers_alone_have_no_tokenizer():
    with pytest.raises(InvalidRequestError, match="tokenizer"):
        tokenizer_of(ServerSide(url="http://a/v1"))


class Scripted(BaseHTTPRequestHandler):
    """Lists one model and answers completions with what `answer` makes of the body."""

    def do_GET(self):
        self.reply(200, {"data": [{"id": "m"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        self.reply(*self.server.answer(body))

    def reply(self, status, value):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def scripted(answer):
    server = HTTPServer(("127.0.0.1", 0), Scripted)
    server.answer, server.asked = answer, []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield ServerSide(url=f"http://127.0.0.1:{server.server_port}/v1", timeout=0.5), server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(names, values, tops=None):
    return 200, {"choices": [{"logprobs": {"tokens": names, "token_logprobs": values, "top_logprobs": tops}}]}


def score(side, ids=(3, 4, 5)):
    return next(iter(open_server(side).scores([list(ids)])))


def test_a_server_that_takes_less_is_asked_for_less():
    def answer(body):
        if "return_tokens_as_token_ids" in body or body["max_tokens"] == 0:
            return 400, {"error": "unknown"}
        return completion(["a", "b", "c", "more"], [None, -1.0, -2.0, -9.0])

    with scripted(answer) as (side, server):
        opened = open_server(side)
        first, second = opened.scores([[3, 4, 5], [3, 4, 5]])
        assert first.logprobs.tolist() == second.logprobs.tolist() == [-1.0, -2.0]
        assert first.top1.tolist() == [-1, -1], "text names no id"
        assert [body["max_tokens"] for body in server.asked] == [0, 0, 1, 1]
        assert all(body["prompt"] == [3, 4, 5] and body["echo"] for body in server.asked)


def test_the_likeliest_token_is_read_from_the_ids():
    names = [f"token_id:{i}" for i in (3, 4, 5)]
    tops = [None, {"token_id:9": -0.5, "token_id:4": -1.0}, {"token_id:5": -2.0, "token_id:2": -2.0}]
    with scripted(lambda body: completion(names, [None, -1.0, -2.0], tops)) as (side, _):
        assert score(side).top1.tolist() == [9, 2]


@pytest.mark.parametrize(("answer", "said"), [
    (lambda body: (200, {"choices": [{"text": "x", "logprobs": None}]}), "of 0 tokens of a prompt of 3"),
    (lambda body: completion(["x"], [-1.0]), "of 1 tokens of a prompt of 3"),
    (lambda body: completion(["token_id:3", "token_id:8", "token_id:5"], [None, -1.0, -2.0]), "token 1 is 8, but 4"),
    (lambda body: completion(["a", "b", "c"], [None, None, -2.0]), "leaves out"),
    (lambda body: (200, b"<html>"), "JSON"),
    (lambda body: (200, [1]), "an object"),
    (lambda body: (500, {"error": "out of memory"}), "answered 500.*out of memory"),
    (lambda body: (400, {"error": "no logprobs here"}), "answered 400.*no logprobs here"),
])  # fmt: skip
def test_answers_that_cannot_be_used_are_errors(answer, said):
    with scripted(answer) as (side, _), pytest.raises(PeerError, match=said) as caught:
        score(side)
    assert caught.value.remedy


def test_a_server_that_is_silent_or_not_there():
    wait = threading.Event()
    with scripted(lambda body: (wait.wait(3), completion([], []))[1]) as (side, _):
        with pytest.raises(PeerError, match=r"said nothing for 0\.5 s"):
            score(side)
        wait.set()
        with pytest.raises(ModelNotFoundError, match="serves m, not other"):
            open_server(ServerSide(url=side.url, model="other"))
    with pytest.raises(PeerError, match="not reached"):
        open_server(side)


def test_names():
    side = server_named("http://host:8000/v1/?model=a/b&top=3&timeout=2.5&key=k")
    assert side == ServerSide(url="http://host:8000/v1", model="a/b", top=3, timeout=2.5, key="k")
    assert side.title == "http://host:8000/v1?model=a/b"
    with pytest.raises(InvalidRequestError) as caught:
        server_named("http://host/v1?key=hidden&foo=1")
    assert "hidden" not in str(caught.value)

"""Every wrong request is refused with the right status, names what is wrong, and costs no tokens."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.serve.config import ServerConfig
from tests.support.fake_llm import FakeLLM
from tests.support.http_client import ask, ask_all, chat_body, completion_body

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

BAD_FIELDS = [
    # endpoint, fields, status, code, param, a part of the message
    (CHAT, {"temprature": 1}, 400, "unknown_field", "temprature", "Did you mean 'temperature'?"),
    (CHAT, {"foo": None}, 400, "unknown_field", "foo", "unknown"),
    (CHAT, {"messages": []}, 400, "invalid_value", "messages", "should not be empty"),
    (CHAT, {"messages": "hello"}, 400, "invalid_value", "messages", "array"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_value", "messages.0.role", "'system'"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_value", "messages.0.role", "not 'tool'"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "missing_field", "messages.0.content", "missing"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, 400, "invalid_value", "messages.0.content", "string"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "invalid_value",
     "messages.0.content", "'image_url'"),
    (CHAT, {"messages": [{"role": "user", "content": "refuse me"}]}, 400, "bad_chat_template", None, "template"),
    (CHAT, {"model": "gpt-5"}, 404, "model_not_found", None, "'fake'"),
    (CHAT, {"model": None}, 400, "invalid_value", "model", "string"),
    (CHAT, {"temperature": -0.1}, 400, "invalid_request", None, "temperature"),
    (CHAT, {"temperature": "1"}, 400, "invalid_value", "temperature", "number"),
    (CHAT, {"temperature": True}, 400, "invalid_value", "temperature", "number"),
    (CHAT, {"top_p": 0}, 400, "invalid_request", None, "top_p"),
    (CHAT, {"top_p": 1.1}, 400, "invalid_request", None, "top_p"),
    (CHAT, {"min_p": 2}, 400, "invalid_request", None, "min_p"),
    (CHAT, {"top_k": -1}, 400, "invalid_request", None, "top_k"),
    (CHAT, {"n": 0}, 400, "invalid_request", None, "n must be"),
    (CHAT, {"n": 129}, 400, "invalid_request", None, "n must be"),
    (CHAT, {"n": 1.5}, 400, "invalid_value", "n", "integer"),
    (CHAT, {"max_tokens": 0}, 400, "invalid_request", None, "max_tokens"),
    (CHAT, {"max_tokens": 5, "max_completion_tokens": 6}, 400, "invalid_request", None, "differ"),
    (CHAT, {"min_tokens": 9, "max_tokens": 5}, 400, "invalid_request", None, "min_tokens"),
    (CHAT, {"presence_penalty": 2.1}, 400, "invalid_request", None, "presence_penalty"),
    (CHAT, {"frequency_penalty": -3}, 400, "invalid_request", None, "frequency_penalty"),
    (CHAT, {"repetition_penalty": 0}, 400, "invalid_request", None, "repetition_penalty"),
    (CHAT, {"seed": 2**64}, 400, "invalid_request", None, "seed"),
    (CHAT, {"stop": [""]}, 400, "invalid_request", None, "stop"),
    (CHAT, {"stop": ["a", 1]}, 400, "invalid_value", "stop", "strings"),
    (CHAT, {"stop_token_ids": [1, True]}, 400, "invalid_value", "stop_token_ids", "token ids"),
    (CHAT, {"stop_token_ids": [300]}, 400, "invalid_request", None, "300"),
    (CHAT, {"logit_bias": {"a": 1}}, 400, "invalid_request", None, "'a'"),
    (CHAT, {"logit_bias": {"-1": 1}}, 400, "invalid_request", None, "'-1'"),
    (CHAT, {"logit_bias": {"5": 101}}, 400, "invalid_request", None, "logit_bias"),
    (CHAT, {"logit_bias": {"5": "1"}}, 400, "invalid_value", "logit_bias.5", "number"),
    (CHAT, {"logit_bias": {"999": 1}}, 400, "invalid_request", None, "999"),
    (CHAT, {"top_logprobs": 2}, 400, "invalid_request", None, "logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, 400, "invalid_request", None, "logprobs"),
    (CHAT, {"logprobs": 1}, 400, "invalid_value", "logprobs", "boolean"),
    (CHAT, {"stream_options": {"include_usage": True}}, 400, "invalid_request", None, "stream"),
    (CHAT, {"stream": True, "stream_options": {"foo": 1}}, 400, "unknown_field", "stream_options.foo", "unknown"),
    (CHAT, {"response_format": {"type": "json_object"}}, 400, "invalid_value", "response_format.type", "'text'"),
    (CHAT, {"tools": [{"type": "function"}]}, 400, "unsupported_field", "tools", "does not support"),
    (CHAT, {"tool_choice": "required"}, 400, "invalid_value", "tool_choice", "'none'"),
    (CHAT, {"store": True}, 400, "invalid_value", "store", "False"),
    (CHAT, {"reasoning_effort": "low"}, 400, "unsupported_field", "reasoning_effort", "does not support"),
    (CHAT, {"best_of": 1}, 400, "unknown_field", "best_of", "unknown"),
    (COMPLETIONS, {"prompt": ""}, 400, "empty_prompt", None, "empty"),
    (COMPLETIONS, {"prompt": []}, 400, "invalid_value", "prompt", "list"),
    (COMPLETIONS, {"prompt": [[]]}, 400, "empty_prompt", None, "empty"),
    (COMPLETIONS, {"prompt": None}, 400, "invalid_value", "prompt", "string"),
    (COMPLETIONS, {"prompt": ["a", 1]}, 400, "invalid_value", "prompt", "list"),
    (COMPLETIONS, {"prompt": [1, True]}, 400, "invalid_value", "prompt", "list"),
    (COMPLETIONS, {"prompt": [1, 300]}, 400, "invalid_request", None, "300"),
    (COMPLETIONS, {"prompt": [-1], "echo": True}, 400, "invalid_request", None, "-1"),
    (COMPLETIONS, {"prompt": "x" * 5000}, 400, "context_length_exceeded", None, "5000"),
    (COMPLETIONS, {"prompt": "x" * 5000, "stream": True}, 400, "context_length_exceeded", None, "5000"),
    (COMPLETIONS, {"prompt": ["good", ""]}, 400, "empty_prompt", None, "empty"),
    (COMPLETIONS, {"suffix": "x"}, 400, "unsupported_field", "suffix", "does not support"),
    (COMPLETIONS, {"best_of": 3}, 400, "invalid_request", None, "best_of"),
    (COMPLETIONS, {"echo": True, "logprobs": 1, "stream": True}, 400, "invalid_request", None, "echo"),
    (COMPLETIONS, {"echo": True, "max_tokens": 0}, 400, "invalid_request", None, "max_tokens"),
    (COMPLETIONS, {"logprobs": 21}, 400, "invalid_request", None, "logprobs"),
    (COMPLETIONS, {"prompt": ["x"] * 5000}, 400, "too_many_prompts", None, "5000"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "status", "code", "param", "part"), BAD_FIELDS)
def test_bad_field(path, fields, status, code, param, part):
    llm = FakeLLM()
    body = {**(chat_body() if path == CHAT else completion_body()), **fields}
    answer = ask(llm, "POST", path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param), error
    assert part in error["message"]
    assert error["type"] == "invalid_request_error"
    assert "headrace" not in error["message"]
    assert llm.num_free_blocks == llm.num_blocks


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"model": "\\ud800"}', b"[" * 9000])
def test_body_that_is_no_request(body):
    answer = ask(FakeLLM(), "POST", CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] in ("invalid_json", "invalid_value")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"])
def test_other_content_type(content_type):
    body = json.dumps(chat_body()).encode()
    answer = ask(FakeLLM(), "POST", CHAT, content=body, headers={"content-type": content_type})
    assert answer.status_code == 415
    assert "application/json" in answer.json()["error"]["message"]


def test_content_type_with_parameters_is_fine():
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert ask(FakeLLM(), "POST", CHAT, content=json.dumps(chat_body()), headers=headers).status_code == 200


@pytest.mark.parametrize("declared", [True, False])
def test_body_too_long(declared):
    body = json.dumps(chat_body("x" * 2000)).encode()

    async def in_parts():
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    config = ServerConfig(max_body_bytes=1000, access_log=False)
    headers = {"content-type": "application/json"}
    content = body if declared else in_parts()
    answer = ask(FakeLLM(), "POST", CHAT, content=content, headers=headers, config=config)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"
    assert answer.headers["connection"] == "close"


def test_body_just_fits():
    body = json.dumps(chat_body()).encode()
    config = ServerConfig(max_body_bytes=len(body), access_log=False)
    headers = {"content-type": "application/json"}
    assert ask(FakeLLM(), "POST", CHAT, content=body, headers=headers, config=config).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "unknown_url"),
        ("GET", "/v1/embeddings", 404, "unknown_url"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", "/v1/models/a/b", 404, "model_not_found"),
    ],
)
def test_wrong_url(method, path, status, code):
    answer = ask(FakeLLM(), method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert status != 405 or answer.headers["allow"]


@pytest.mark.parametrize("header", [None, "Bearer wrong", "secret", "Basic secret", "Bearer", "Bearer sécret"])
def test_wrong_key(header):
    config = ServerConfig(api_key="secret", access_log=False)
    headers = {} if header is None else {"authorization": header.encode()}
    for path in ("/v1/models", "/v1/models/fake"):
        answer = ask(FakeLLM(), "GET", path, headers=headers, config=config)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert ask(FakeLLM(), "POST", CHAT, json=chat_body(), headers=headers, config=config).status_code == 401


def test_right_key_and_open_probes():
    config = ServerConfig(api_key="secret", access_log=False)
    headers = {"authorization": "Bearer secret"}
    assert ask(FakeLLM(), "POST", CHAT, json=chat_body(), headers=headers, config=config).status_code == 200
    for path in ("/health", "/metrics", "/version"):
        assert ask(FakeLLM(), "GET", path, config=config).status_code == 200


FIELDS = [
    *("model", "messages", "prompt", "n", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k"),
    *("logit_bias", "seed", "stop", "stream", "stream_options", "logprobs", "top_logprobs", "echo", "tools", "suffix"),
    *(
        "stop_token_ids",
        "response_format",
        "metadata",
        "user",
        "best_of",
        "min_tokens",
        "ignore_eos",
        "role",
        "content",
    ),
]
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 300)
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=20)
    | st.sampled_from(["fake", "user", "text"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
fuzzed = st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=6)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    bodies=st.lists(st.tuples(st.sampled_from([CHAT, COMPLETIONS]), fuzzed, st.booleans()), min_size=10, max_size=10)
)
def test_no_body_makes_the_server_fail(bodies):
    requests = []
    for path, fields, from_good in bodies:
        good = chat_body(max_tokens=4) if path == CHAT else completion_body(max_tokens=4)
        body = json.dumps({**good, **fields} if from_good else fields).encode()
        requests.append(("POST", path, {"content": body, "headers": {"content-type": "application/json"}}))
    llm = FakeLLM()
    for answer, request in zip(ask_all(llm, requests), requests, strict=True):
        assert answer.status_code in (200, 400, 404), (request, answer.text)
    assert llm.num_free_blocks == llm.num_blocks

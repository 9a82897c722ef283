"""What a good request gets: the shapes of the OpenAI API, whole and streamed, field by field."""

import math

import pytest

from headrace.base.errors import HeadraceError
from headrace.llm.outputs import TokenLogprob
from headrace.serve.logprobs import CompletionLogprobs, chat_logprobs
from tests.support.fake_llm import ByteTokenizer, FakeLLM
from tests.support.http_client import ask, chat_body, completion_body, events

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def replying(text):
    return FakeLLM(reply=lambda prompt, sample: text)


def test_chat_reply():
    reply = ask(replying("Grüße 你好 🙂"), "POST", CHAT, json=chat_body("hi")).json()
    assert reply["id"].startswith("chatcmpl-")
    assert reply["object"] == "chat.completion"
    assert reply["model"] == "fake"
    assert reply["system_fingerprint"].startswith("fp_")
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Grüße 你好 🙂", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    num_prompt = len("user: hi\nassistant: ")
    num_output = len("Grüße 你好 🙂".encode()) + 1
    assert reply["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": 16},
    }


@pytest.mark.parametrize("include_usage", [True, False])
def test_chat_stream(include_usage):
    body = chat_body("hi", stream=True, stream_options={"include_usage": include_usage})
    answer = ask(replying("Grüße\n\n🙂"), "POST", CHAT, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(answer.text)
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    if include_usage:
        *chunks, last = chunks
        assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 14)
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert all("usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "Grüße\n\n🙂"
    assert [choice["finish_reason"] for choice in choices][-1] == "stop"
    assert all(choice["finish_reason"] is None for choice in choices[:-1])


def test_tokens_without_text_yet_make_no_chunk():
    *chunks, _ = events(ask(replying("🙂"), "POST", CHAT, json=chat_body(stream=True)).text)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "🙂"},
        {},
    ]


def test_samples_are_choices():
    body = chat_body(n=3, max_tokens=2)
    reply = ask(FakeLLM(), "POST", CHAT, json=body).json()
    assert [choice["message"]["content"] for choice in reply["choices"]] == ["[0", "[1", "[2"]
    assert [choice["finish_reason"] for choice in reply["choices"]] == ["length"] * 3
    *chunks, _ = events(ask(FakeLLM(), "POST", CHAT, json={**body, "stream": True}).text)
    texts = ["", "", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    assert texts == ["[0", "[1", "[2"]


@pytest.mark.parametrize("stream", [True, False])
def test_completion_of_several_prompts_with_echo_and_samples(stream):
    body = completion_body(["ab", "cd"], n=2, max_tokens=3, echo=True, stream=stream)
    answer = ask(FakeLLM(), "POST", COMPLETIONS, json=body)
    expected = ["ab[0]", "ab[1]", "cd[0]", "cd[1]"]
    if not stream:
        reply = answer.json()
        assert (reply["object"], reply["id"][:5]) == ("text_completion", "cmpl-")
        assert [choice["text"] for choice in reply["choices"]] == expected
        assert reply["usage"]["prompt_tokens"] == 4
        assert reply["usage"]["completion_tokens"] == 12
        return
    texts = [""] * 4
    for chunk in events(answer.text)[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == expected


@pytest.mark.parametrize("prompt", ["hé", [104, 195, 169], [[104, 195, 169]], ["hé"]])
def test_prompts_in_all_forms(prompt):
    llm = FakeLLM()
    reply = ask(llm, "POST", COMPLETIONS, json=completion_body(prompt, echo=True, max_tokens=1)).json()
    assert reply["choices"][0]["text"] == "hé["
    assert llm.seen[0][0] == "hé"


def test_parameters_arrive():
    llm = FakeLLM()
    numbers = {"temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1}
    given = {**numbers, "presence_penalty": 0.5, "frequency_penalty": -0.5, "seed": 7, "ignore_eos": True, "n": 2}
    more = {"stop": "x", "logit_bias": {"5": 1.5}, "stop_token_ids": [9], "max_completion_tokens": 4, "user": "me"}
    body = chat_body(**given, **more, logprobs=True, top_logprobs=2, store=False, metadata={"a": "b"}, tools=[])
    assert ask(llm, "POST", CHAT, json=body).status_code == 200
    params = llm.seen[0][1]
    assert {name: getattr(params, name) for name in given} == given
    assert (params.stop, params.logit_bias, params.stop_token_ids) == (("x",), {5: 1.5}, (9,))
    assert (params.max_tokens, params.logprobs) == (4, 2)


def test_defaults_are_openais():
    llm = FakeLLM()
    ask(llm, "POST", CHAT, json=chat_body(temperature=None, stop=None, n=None, stream=None))
    ask(llm, "POST", COMPLETIONS, json=completion_body())
    chat, completion = (params for _, params in llm.seen)
    assert (chat.temperature, chat.top_p, chat.max_tokens, chat.logprobs, chat.n) == (1.0, 1.0, None, None, 1)
    assert completion.max_tokens == 16


def test_messages_reach_the_template():
    llm = FakeLLM()
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "d"},
    ]
    assert ask(llm, "POST", CHAT, json={"model": "fake", "messages": messages}).status_code == 200
    assert llm.seen[0][0] == "system: be brief\nuser: a\nb\nassistant: c\nuser: d\nassistant: "


def test_a_long_conversation_is_rendered_off_the_loop():
    llm = FakeLLM()
    llm.max_model_len = 10**6
    assert ask(llm, "POST", CHAT, json=chat_body("x" * 100_000, max_tokens=1)).status_code == 200


def test_chat_logprobs_carry_bytes():
    body = chat_body(logprobs=True, top_logprobs=2, max_tokens=2)
    reply = ask(replying("é"), "POST", CHAT, json=body).json()
    first, second = reply["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["bytes"], first["logprob"]) == ("\ufffd", [0xC3], -0.5)
    assert second["bytes"] == [0xA9]
    assert [top["bytes"] for top in first["top_logprobs"]] == [[0xC3], [0xC4]]
    *chunks, _ = events(ask(replying("é"), "POST", CHAT, json={**body, "stream": True}).text)
    streamed = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == [first, second]


def test_completion_logprobs_count_characters():
    body = completion_body(logprobs=1, max_tokens=4)
    whole = ask(replying("aéb"), "POST", COMPLETIONS, json=body).json()["choices"][0]["logprobs"]
    assert whole["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "b"]
    assert whole["text_offset"] == [0, 1, 1, 2]
    assert whole["token_logprobs"] == [-0.5] * 4
    assert whole["top_logprobs"][0] == {"a": -0.5}
    *chunks, _ = events(ask(replying("aéb"), "POST", COMPLETIONS, json={**body, "stream": True}).text)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [offset for part in parts for offset in part["text_offset"]] == [0, 1, 1, 2]


def test_impossible_tokens_have_openais_number():
    entry = TokenLogprob(97, -1.0, ((98, -math.inf),))
    assert chat_logprobs([entry], ByteTokenizer())["content"][0]["top_logprobs"][0]["logprob"] == -9999.0
    assert CompletionLogprobs(ByteTokenizer()).extend([entry])["top_logprobs"] == [{"b": -9999.0, "a": -1.0}]


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (HeadraceError("Out of luck.", "Try again.", code="executor_failed"), 500, "executor_failed"),
        (HeadraceError("Closing.", code="shutting_down"), 503, "shutting_down"),
        (RuntimeError("secret detail"), 500, "internal_error"),
    ],
)
def test_failures(failure, status, code, caplog):
    for fail_after, stream in ((0, False), (3, False), (0, True)):
        llm = FakeLLM(fail_after=fail_after, failure=failure)
        answer = ask(llm, "POST", CHAT, json=chat_body(stream=stream))
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (status, code, "server_error")
        assert "secret" not in answer.text
        assert answer.headers["x-request-id"].startswith("req_")
        assert llm.num_free_blocks == llm.num_blocks
    assert ("secret detail" in caplog.text) == (code == "internal_error")


@pytest.mark.parametrize("failure", [HeadraceError("Bad step.", code="executor_failed"), RuntimeError("secret detail")])
def test_failure_mid_stream_is_an_event_and_the_end(failure, caplog):
    llm = FakeLLM(fail_after=3, failure=failure)
    answer = ask(llm, "POST", CHAT, json=chat_body(stream=True))
    assert answer.status_code == 200
    *chunks, last = events(answer.text)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "[0]"
    assert last["error"]["code"] in ("executor_failed", "internal_error")
    assert "[DONE]" not in answer.text
    assert "secret" not in answer.text
    assert llm.num_free_blocks == llm.num_blocks


def test_one_bad_prompt_of_several_cancels_the_others():
    llm = FakeLLM(reply=lambda prompt, sample: "x" * 1000, delay=0.01)
    answer = ask(llm, "POST", COMPLETIONS, json=completion_body(["good", "", "good"], max_tokens=1000))
    assert answer.status_code == 400
    assert llm.num_free_blocks == llm.num_blocks
    assert llm.num_output_tokens < 1000


def test_models_version_health_and_schema():
    (card,) = ask(FakeLLM(), "GET", "/v1/models").json()["data"]
    assert (card["id"], card["object"], card["owned_by"]) == ("fake", "model", "headrace")
    llm = FakeLLM()
    llm.model_name = "org/model"
    assert ask(llm, "GET", "/v1/models/org/model").json()["id"] == "org/model"
    assert ask(llm, "GET", "/version").json().keys() == {"version"}
    assert ask(llm, "GET", "/health").status_code == 200
    llm.is_healthy = False
    assert ask(llm, "GET", "/health").status_code == 503
    assert ask(llm, "POST", CHAT, json={**chat_body(), "model": "org/model"}).status_code == 503
    schemas = ask(llm, "GET", "/openapi.json").json()["components"]["schemas"]
    assert {"ChatRequest", "CompletionRequest", "Message", "StreamOptions"} <= schemas.keys()

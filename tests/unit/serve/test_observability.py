"""The metrics page, read by Prometheus's own parser, and the access log."""

import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from headrace.base.errors import InvalidRequestError
from headrace.engine.metrics import EngineMetrics, EngineSnapshot
from headrace.serve.config import ServerConfig
from headrace.serve.errors import ApiError
from headrace.serve.gate import Gate
from headrace.serve.metrics import ServerMetrics
from tests.support.fake_llm import FakeLLM
from tests.support.http_client import ask, ask_all, chat_body


def snapshot(**fields):
    empty = {
        "num_running": 0,
        "num_waiting": 0,
        "kv_blocks_total": 10,
        "kv_blocks_in_use": 0,
        "kv_blocks_cached": 0,
        "weight_version": 0,
    }
    return EngineSnapshot(**{**empty, "metrics": EngineMetrics(), **fields})


def parsed(page):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def test_page_has_every_figure():
    metrics = EngineMetrics(prompt_tokens=11, cached_tokens=12, output_tokens=13, preemptions=14)
    metrics.requests["stop"] = 3
    for seconds in (0.005, 0.0051, 1000.0):
        metrics.ttft.observe(seconds)
    page = ServerMetrics().render(snapshot(num_running=4, num_waiting=5, kv_blocks_in_use=5, metrics=metrics))
    found = parsed(page)
    assert found[("headrace_requests_running",)] == 4
    assert found[("headrace_requests_waiting",)] == 5
    assert found[("headrace_kv_usage_ratio",)] == 0.5
    assert found[("headrace_prompt_tokens_total",)] == 11
    assert found[("headrace_cached_prompt_tokens_total",)] == 12
    assert found[("headrace_output_tokens_total",)] == 13
    assert found[("headrace_preemptions_total",)] == 14
    assert found[("headrace_requests_total", ("outcome", "stop"))] == 3
    ttft = "headrace_time_to_first_token_seconds"
    assert found[(f"{ttft}_bucket", ("le", "0.005"))] == 1
    assert found[(f"{ttft}_bucket", ("le", "0.01"))] == 2
    assert found[(f"{ttft}_bucket", ("le", "+Inf"))] == found[(f"{ttft}_count",)] == 3
    assert found[(f"{ttft}_sum",)] == pytest.approx(1000.0101)


def test_every_family_has_help_and_type():
    page = ServerMetrics().render(snapshot())
    for family in text_string_to_metric_families(page):
        assert family.documentation, family.name
        assert family.type in ("counter", "gauge", "histogram"), family.name


def test_replies_are_counted_by_route_and_status():
    good, bad = ("POST", "/v1/chat/completions", {"json": chat_body()}), ("GET", "/made/up", {})
    page = ask_all(FakeLLM(), [good, good, bad, bad, ("GET", "/metrics", {})])[-1]
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = parsed(page.text)
    replies = "headrace_http_requests_total"
    assert found[(replies, ("endpoint", "/v1/chat/completions"), ("status", "200"))] == 2
    assert found[(replies, ("endpoint", "unknown"), ("status", "404"))] == 2


@pytest.mark.parametrize("stream", [True, False])
def test_access_log_line(stream, caplog):
    caplog.set_level(logging.INFO)
    ask(FakeLLM(), "POST", "/v1/chat/completions", json=chat_body(stream=stream, max_tokens=5), config=ServerConfig())
    (line,) = [record.message for record in caplog.records if record.name == "headrace.serve.access"]
    assert "POST /v1/chat/completions 200 prompt=23 cached=16 ttft=0.010s output=5 total=" in line
    assert "req_" in line


def test_access_log_can_be_off_and_keeps_to_one_line(caplog):
    caplog.set_level(logging.INFO)
    ask(FakeLLM(), "GET", "/health", config=ServerConfig(access_log=False))
    assert not [record for record in caplog.records if record.name == "headrace.serve.access"]
    ask(FakeLLM(), "GET", "/a%0Ab", config=ServerConfig())
    (line,) = [record.message for record in caplog.records if record.name == "headrace.serve.access"]
    assert "\n" not in line


def test_gate_counts_what_the_engine_has_not_reported_yet():
    llm = FakeLLM()
    report = snapshot(num_waiting=2)
    llm.engine_snapshot = lambda: report
    gate = Gate(llm, max_queue=4)
    gate.admit(1)
    gate.admit(1)
    with pytest.raises(ApiError) as caught:
        gate.admit(1)
    assert (caught.value.status, caught.value.code) == (429, "overloaded")
    report = snapshot(num_waiting=3)
    gate.admit(1)
    with pytest.raises(ApiError):
        gate.admit(1)


@pytest.mark.parametrize("fields", [{"port": 70000}, {"max_queue": 0}, {"api_key": ""}, {"grace_seconds": 0}])
def test_config_is_checked(fields):
    with pytest.raises(InvalidRequestError):
        ServerConfig(**fields)


def test_cors_only_where_asked():
    headers = {"origin": "http://page.example", "access-control-request-method": "POST"}
    path = "/v1/chat/completions"
    closed = ask(FakeLLM(), "OPTIONS", path, headers=headers)
    assert "access-control-allow-origin" not in closed.headers
    config = ServerConfig(cors_origins=("http://page.example",), api_key="secret", access_log=False)
    opened = ask(FakeLLM(), "OPTIONS", path, headers=headers, config=config)
    assert opened.headers["access-control-allow-origin"] == "http://page.example"
    other = ask(FakeLLM(), "OPTIONS", path, headers={**headers, "origin": "http://evil.example"}, config=config)
    assert "access-control-allow-origin" not in other.headers

import json

import pytest

from headrace.base.errors import InvalidRequestError
from headrace.bench.report import SCHEMA, Findings, Measurement, Report, number, table
from headrace.bench.validity import Check

FAST = Measurement(name="decode", unit="tok/s", samples=(90.0, 100.0, 110.0), limit=400.0)
SLOW = Measurement(
    name="TTFT", unit="ms", samples=(20.0,), limit=5.0, lower_is_better=True, details={"kernel": "w4", "GB/s": 1.25}
)


def report(*checks):
    return Report(
        benchmark="latency",
        environment={"date": "2026-11-25", "machine": {"cpu": "a processor", "cores": 2}},
        model={"name": "tiny", "file": "tiny.gguf", "bytes": 98_000_000},
        settings={"repeats": 3},
        findings=Findings(measurements=[FAST, SLOW], checks=checks, notes=["a note"]),
    )


def test_the_share_is_of_the_limit_whichever_way_is_better():
    assert FAST.share == pytest.approx(0.25)
    assert SLOW.share == pytest.approx(0.25)
    assert Measurement(name="x", unit="s", samples=(1.0,)).share is None


def test_the_table_shows_achieved_and_possible_and_leaves_empty_columns_out():
    header, first, second = table([FAST, SLOW])
    assert header.split() == ["median", "unit", "±", "possible", "achieved", "kernel", "GB/s"]
    assert first.split() == ["decode", "100", "tok/s", "10%", "400", "25%"]
    assert second.split() == ["TTFT", "20.0", "ms", "5.00", "25%", "w4", "1.25"]
    assert table([Measurement(name="x", unit="s", samples=(1.0,))])[0].split() == ["median", "unit"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.0123"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (12345.6, "12,346")]
)
def test_numbers(value, text):
    assert number(value) == text


def test_the_json_holds_every_sample_and_verdict(tmp_path):
    file = tmp_path / "report.json"
    report(Check("outputs", "ok", "all alike"), Check("steal", "warning", "a lot")).write_json(file)
    read = json.loads(file.read_text())
    assert set(read) == {
        "schema", "benchmark", "valid", "environment", "model", "settings", "measurements", "checks", "notes"
    }  # fmt: skip
    assert (read["schema"], read["valid"]) == (SCHEMA, True)
    assert read["measurements"][0] == {
        "name": "decode",
        "unit": "tok/s",
        "median": 100.0,
        "spread": 0.1,
        "limit": 400.0,
        "share": 0.25,
        "lower_is_better": False,
        "samples": [90.0, 100.0, 110.0],
        "details": {},
    }
    assert read["checks"][1] == {"name": "steal", "verdict": "warning", "detail": "a lot"}


def test_a_failed_check_makes_it_invalid_and_is_in_the_text():
    failed = report(Check("outputs", "failed", "run 2 differs"), Check("steal", "ok", "none"))
    assert not failed.is_valid
    assert "failed   outputs: run 2 differs" in failed.text()
    assert failed.text().startswith("latency of tiny (98 MB) on a processor, 2 cores, 2026-11-25\n")
    assert "a note" in failed.text()
    assert report(Check("steal", "warning", "a lot")).is_valid


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(InvalidRequestError, match="nowhere"):
        report().write_json(tmp_path / "nowhere/report.json")

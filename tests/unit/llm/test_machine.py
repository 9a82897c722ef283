import json

from headrace._native import available_isas
from headrace.cli.main import main


def test_doctor_says_what_there_is(capsys, monkeypatch):
    monkeypatch.delenv("HEADRACE_ISA", raising=False)
    monkeypatch.setenv("HEADRACE_THREADS", "100")
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["isas"] == list(available_isas())
    assert report["chosen_isa"] == report["isas"][-1]
    assert report["cores"] >= 1
    assert report["memory_available"] > 2**20
    assert all(speed > 1e8 for speed in report["bandwidth"].values())
    assert any("HEADRACE_THREADS=100" in warning for warning in report["warnings"])

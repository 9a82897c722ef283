import json

import pytest

from headrace import LLM, _native
from headrace.cli.main import main
from headrace.llm.config import LLMConfig
from headrace.llm.loader import plan_model
from headrace.llm.memory import MemoryPlan
from headrace.plan import calibrate as calibrate_module
from headrace.plan.load import Disturbance, Watch
from tests.support.tiny_model import write_model

ISAS = _native.available_isas()


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    """A cache of its own, few working sets, a machine that nobody else uses, no settings but the test's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HEADRACE_ISA", raising=False)
    monkeypatch.delenv("HEADRACE_THREADS", raising=False)
    monkeypatch.setattr(calibrate_module, "working_sets", lambda host: [1 << 20, 4 << 20])
    monkeypatch.setattr(Watch, "disturbance", lambda self: Disturbance())


def doctor(capsys, *arguments: str) -> str:
    assert main(["doctor", *arguments]) == 0
    return capsys.readouterr().out


def test_doctor_says_what_there_is(capsys, monkeypatch):
    monkeypatch.setenv("HEADRACE_THREADS", "100")
    report = json.loads(doctor(capsys, "--json"))
    assert report["isas"] == ISAS
    assert report["isa"] == report["isas"][-1]
    assert report["cores"] >= 1
    assert report["memory_available"] > 2**20
    assert all(speed > 1e8 for speed in report["read_bandwidth"].values())
    assert set(report["matrix_rate"]) == set(_native.arithmetics(report["isa"]))
    (warning,) = [each for each in report["warnings"] if each["code"] == "too_many_threads"]
    assert "100 threads" in warning["cause"]
    assert "HEADRACE_THREADS" in warning["remedy"]


def test_doctor_for_people(capsys):
    out = doctor(capsys)
    for name in ("CPU", "cores", "instruction sets", "memory", "caches", "reads of 1 MiB", "f32 products"):
        assert f"\n{name}" in f"\n{out}"
    assert f"{ISAS[-1]} (the best of them)" in out


def test_a_forced_instruction_set_is_used_and_warned_of(capsys, monkeypatch):
    monkeypatch.setenv("HEADRACE_ISA", "portable")
    out = doctor(capsys)
    assert "portable (HEADRACE_ISA)" in out
    assert ("HEADRACE_ISA=portable keeps this machine below" in out) == (len(ISAS) > 1)


@pytest.mark.parametrize("command", [["doctor"], ["generate", "-p", "x"]])
def test_an_instruction_set_that_is_not_there_is_an_error_with_a_remedy(capsys, monkeypatch, command):
    monkeypatch.setattr(_native, "available_isas", lambda: ["portable"])
    monkeypatch.setenv("HEADRACE_ISA", "amx")
    assert main(command) == 1
    err = capsys.readouterr().err
    assert "does not have the instruction set 'amx'" in err
    assert "try:   Use one of portable, or unset HEADRACE_ISA" in err


def test_measured_once_then_again_when_asked(capsys, monkeypatch):
    runs = []
    measured = calibrate_module._measure
    monkeypatch.setattr(calibrate_module, "_measure", lambda *given: runs.append(1) or measured(*given))
    doctor(capsys)
    doctor(capsys)
    assert len(runs) == 1
    doctor(capsys, "--remeasure")
    assert len(runs) == 2


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path)


def test_a_model_s_limits(capsys, model):
    report = json.loads(doctor(capsys, model, "--json", "--context", "32"))["model"]
    assert report["name"] == "tiny"
    assert report["context_len"] == 32
    used = report["limits"][report["arithmetic"]]
    assert list(used) == ["decode1", "decode8", "decode64", "prefill512", "prefill2048"]
    decode = used["decode8"]
    assert decode["tokens_per_second"] == pytest.approx(8 / decode["seconds"])
    assert report["memory"]["weight_bytes"] > 0
    out = doctor(capsys, model)
    assert "tokens/s at best" in out
    assert f"{report['arithmetic']} (kernels)" in out
    assert "memory plan" in out


def test_a_model_that_does_not_fit_is_said_with_its_remedy(capsys, monkeypatch, model):
    monkeypatch.setattr("headrace.llm.loader.available_memory", lambda: 1000)
    out = doctor(capsys, model)
    assert "does not fit: The weights need" in out
    assert "Free memory, or use a smaller" in out
    assert "tokens/s at best" in out, "the limits hold all the same"
    report = json.loads(doctor(capsys, model, "--json"))["model"]
    assert "weights need" in report["memory"]["cause"]


def test_a_model_that_is_not_there(capsys):
    assert main(["doctor", "/nowhere/model.gguf"]) == 1
    assert "/nowhere/model.gguf" in capsys.readouterr().err


def test_the_plan_is_that_of_loading(model):
    with LLM(model) as llm:
        loaded = llm.model.memory
    planned = plan_model(model, LLMConfig()).memory
    assert isinstance(planned, MemoryPlan)
    assert (planned.weight_bytes, planned.block_bytes, planned.max_model_len) == (
        loaded.weight_bytes,
        loaded.block_bytes,
        loaded.max_model_len,
    )

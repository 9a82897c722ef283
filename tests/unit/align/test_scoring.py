"""Scores of tasks: the likeliest continuation a byte, what differs between two sides, and how both are told."""

import json
from math import sqrt

import numpy as np
import pytest

from headrace.align import report, scoring
from headrace.align.alignment import align
from headrace.align.branches import Branches
from headrace.align.scoring import Answers, Question, Score, in_all, questions_of, score
from headrace.align.server import ServerSide
from headrace.align.sides import open_side, tokenizer_of
from headrace.align.subjects import Subject
from headrace.align.tasks import Item
from headrace.base.errors import InvalidRequestError
from headrace.cli.main import main
from headrace.llm.async_llm import AsyncLLM
from tests.support.live_server import serving
from tests.support.tiny_model import write_model

TASKS = {
    "one": [Item("what-is", ("this", "that?", "here"), 1), Item("we-went", ("home", "a"), 0)],
    "two": [Item("0+1+1=", ("2", "3", "44"), 0), Item("abc,abc,ab", ("c", "xyz"), 1), Item("x", ("y", "z"), 0)],
}


class Merging:
    """A token for each character, and one for "ab"."""

    def encode(self, text):
        return [300 if part == "\0" else ord(part) for part in text.replace("ab", "\0")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def few_tasks(monkeypatch):
    monkeypatch.setattr("headrace.align.tasks.suite", lambda: TASKS)


def test_a_choice_is_the_likeliest_a_byte(model, monkeypatch):
    sums = {"c": -1.5, "efgh": -4.0, "éé": -3.2}  # likeliest: the first; by character the second; by byte the third
    item = Item("ab", tuple(sums), 2)
    (question,) = questions_of(Merging(), {"one": [item]})["one"]
    assert question == Question(Branches((300,), ((99,), (101, 102, 103, 104), (233, 233))), (1, 4, 4), 2)

    def given(executor, asked, *, rows_per_step):
        yield tuple(np.array([value / 2, value / 2]) for value in sums.values())

    monkeypatch.setattr(scoring, "branch_logprobs", given)
    assert score(open_side(Subject(model=model)), {"one": [question]})["one"].right == (True,)


def test_a_prompt_that_merges_with_a_continuation_is_cut_before_it():
    (question,) = questions_of(Merging(), {"one": [Item("xa", ("b", "c"), 0)]})["one"]
    assert question.branches == Branches((ord("x"),), ((300,), (ord("a"), ord("c"))))
    for item in (Item("xy", ("", "c"), 1), Item("a", ("b", "c"), 1)):
        with pytest.raises(InvalidRequestError, match="no token of its own"):
            questions_of(Merging(), {"one": [item]})


def test_scores_and_what_differs_between_them():
    a, b = Score((True, True, False, True)), Score((True, False, True, False))
    assert a.accuracy == 0.75
    assert a.error == pytest.approx(sqrt(0.75 * 0.25 / 4))
    assert a.against(b) == (2, 1)
    differences = [0, 1, -1, 1]
    assert a.minus(b) == pytest.approx((np.mean(differences), np.std(differences) / 2))
    assert a.minus(a) == (0, 0)
    assert in_all({"x": a, "y": b}).right == a.right + b.right
    assert Answers({"x": a, "y": a}, {"x": a, "y": b}).lost == pytest.approx(1 / 8)


def test_every_kind_of_side_answers_alike(model):
    tokenizer = tokenizer_of(Subject(model=model))
    questions = questions_of(tokenizer, TASKS)
    done = []
    native = score(open_side(Subject(model=model, kv="f32")), questions, progress=done.append)
    assert done == ["one", "two"]
    assert {name: len(each.right) for name, each in native.items()} == {"one": 2, "two": 3}
    assert 0 < in_all(native).accuracy < 1, "the items tell sides apart"
    assert score(open_side(Subject(model=model, executor="torch", kv="f32")), questions) == native
    with serving(lambda: AsyncLLM(model, served_model_name="tiny", max_model_len=64)) as live:
        assert score(open_side(ServerSide(url=f"{live.url}/v1")), questions) == native


def test_one_side_alone_and_its_report(model, few_tasks, tmp_path, capsys):
    file = tmp_path / "a.json"
    assert main(["align", model, "--tasks", "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"A  {model}"
    assert [line.split()[:2] for line in lines[2:]] == [["task", "items"], ["one", "2"], ["two", "3"], ["all", "5"]]
    held = json.loads(file.read_text())
    assert held["tasks"].keys() == {"one", "two", "all"}
    whole = held["tasks"]["all"]
    assert lines[-1].split()[2:] == [f"{100 * whole['accuracy']:.1f}", "±", f"{100 * whole['error']:.1f}"]


def test_two_sides_and_a_budget(model, few_tasks, tmp_path, capsys):
    files = ["--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")]
    few = ["--texts", "2", "--length", "32", "--tasks"]
    b = f"{model}?weights=int4-g32&kv=int4"
    assert main(["align", model, b, *few, *files, "--budget", "tasks<2"]) == 0
    shown = capsys.readouterr().out
    held = json.loads((tmp_path / "a.json").read_text())["tasks"]
    for name in ("one", "two", "all"):
        row = held[name]
        assert row["difference"] == pytest.approx(row["b"]["accuracy"] - row["a"]["accuracy"])
        assert f"{100 * row['difference']:+.1f} ± {100 * row['difference_error']:.1f}" in shown
        assert row["b_alone"] - row["a_alone"] == pytest.approx(row["difference"] * row["a"]["items"])
    assert shown.splitlines()[-1] in (tmp_path / "a.html").read_text()
    assert main(["align", model, model, *few, "--budget", "tasks<0"]) == 1
    assert "beyond the budget: tasks is 0, not below 0" in capsys.readouterr().err


def test_what_was_not_asked_is_in_no_report(model):
    found = align(Subject(model=model), Subject(model=model), [[1, 2, 3]], threshold=1e-3, by_cause=False)
    assert json.loads(report.to_json(found))["tasks"] is None
    assert "B alone" not in report.to_text(found)
    assert found.exceeded({"tasks": 1.0}) == ["tasks is not known, not below 1"]


@pytest.mark.parametrize(("arguments", "said"), [
    (["--tasks", "--ladder"], "Say what to compare"),
    (["--tasks", "--budget", "tasks<0.1"], "Tasks of one side"),
    (["--tasks", "--html", "x.html"], "Tasks of one side"),
    (["--tasks", "--causes"], "Tasks of one side"),
    (["native", "--budget", "tasks<0.1"], "Give --tasks too"),
    (["native?temperature=0.5", "--tasks"], "cannot be scored"),
])  # fmt: skip
def test_what_makes_no_sense_is_said_before_anything_runs(model, few_tasks, arguments, said, capsys):
    sides = [arg.replace("native", model) for arg in arguments]
    assert main(["align", model, *sides]) == 1
    shown = capsys.readouterr()
    assert said in shown.err
    assert not shown.out


def test_sides_without_the_samplers_logprobs_or_a_tokenizer(model, few_tasks, capsys):
    assert main(["align", f"{model}?logprobs=bf16", "--tasks"]) == 1
    assert "cannot be scored" in capsys.readouterr().err
    assert main(["align", "http://127.0.0.1:1/v1", "--tasks"]) == 1
    assert "no tokenizer" in capsys.readouterr().err

"""The commands on the embedded model, as a user runs them; those of the README are in test_readme.py."""

import io
import json
import pathlib
import re

import pytest

from headrace.align import tasks
from headrace.cli.main import main

ROOT = pathlib.Path(__file__).parents[2]
QUESTION = "What is the capital of France?"


def test_demo_answers_and_prints_its_share_of_the_limit(capsys, report_figure):
    assert main(["demo", "--max-tokens", "40", "-q", QUESTION]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^{part} ", out, re.MULTILINE) for part in ("model", "start", "KV", "kernels"))
    assert "Paris" in out
    last = out.rstrip().splitlines()[-1]
    report_figure(f"demo: {last}")
    found = re.fullmatch(
        r"TTFT \d+ ms for \d+ prompt tokens; decode (\d+) tok/s = (\d+)% of the machine's limit \((\d+) tok/s: .*\)\.",
        last,
    )
    assert found, last
    speed, share, limit = map(int, found.groups())
    assert abs(share - 100 * speed / limit) <= 2, "but for rounding"


@pytest.mark.parametrize("source", ["-p", "-f", "stdin"])
def test_generate_takes_its_prompt_from_anywhere(capsys, monkeypatch, tmp_path, source):
    file = tmp_path / "question.txt"
    file.write_text(QUESTION)
    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTION))
    prompt = {"-p": ["-p", QUESTION], "-f": ["-f", str(file)], "stdin": []}[source]
    assert main(["generate", *prompt, "--chat", "--stats", "--max-tokens", "30", "--stop", "."]) == 0
    shown = capsys.readouterr()
    assert "Paris" in shown.out
    assert "." not in shown.out
    assert re.fullmatch(r"\d+ tokens in, \d+ out, TTFT \d+ ms, [\d.]+ tok/s\n", shown.err)


def test_the_picture_in_the_docs_is_what_graph_draws(tmp_path):
    drawn = tmp_path / "layer.svg"
    assert main(["graph", "--svg", str(drawn)]) == 0
    assert drawn.read_text() == (ROOT / "docs/layer.svg").read_text()


def test_tasks_find_what_rounding_to_int4_loses(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tasks, "ITEMS", 6)
    held = {}
    for weights in ("stored", "int4-g32"):
        file = tmp_path / f"{weights}.json"
        assert main(["align", f"smollm2-135m?threads=1&weights={weights}", "--tasks", "--json", str(file)]) == 0
        held[weights] = json.loads(file.read_text())["tasks"]
    assert "look-up" in capsys.readouterr().out
    assert held["stored"].keys() == {*tasks.suite(), "all"}
    assert held["stored"]["all"]["items"] == 42
    assert held["stored"]["all"]["accuracy"] > 0.6, "guessing gives 0.29"
    assert held["int4-g32"]["all"]["accuracy"] < held["stored"]["all"]["accuracy"]

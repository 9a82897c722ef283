"""Every benchmark on a model of two layers: it runs, its figures are there with their limits, its checks hold."""

import json
import pathlib
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from headrace.bench.report import SCHEMA
from headrace.cli.main import main, parser
from tests.support.tiny_model import write_model

DOCS = pathlib.Path(__file__).parents[2] / "docs/benchmarks.md"
LENGTHS = ["--input-len", "8", "--output-len", "96"]
CASES = {
    "latency": LENGTHS,
    "throughput": [*LENGTHS, "--num-seqs", "2", "4"],
    "prefill": ["--lengths", "16", "32"],
    "kernels": ["--rows", "1", "4"],
    "startup": ["--input-len", "8"],
    "waterfall": ["--num-seqs", "3", "--prefix-len", "32", "--own-len", "8", "--output-len", "8"],
    "roofline": ["--input-len", "16", "--output-len", "8", "--num-seqs", "1", "2"],
}
FIGURES = {
    "latency": ["TTFT", "TPOT p50", "TPOT p90", "TPOT p99", "decode"],
    "throughput": ["decode, 2 seqs", "decode, 4 seqs", "mixed, 4 seqs"],
    "prefill": ["prefill 16", "prefill 32"],
    "kernels": ["q8_0 32→32, 1 row", "q8_0 64→32, 4 rows"],
    "startup": ["process to first token", "  load", "peak memory"],
    "waterfall": ["naive", "+ KV cache", "+ q8_0 weights", "+ batching", "+ prefix cache"],
    "roofline": ["decode 1: linear", "decode 2: attention", "prefill 64: linear"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), matrices="q8_0", llama__context_length=256)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What is measured of this machine is kept for these tests alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize("benchmark", CASES)
def test_a_benchmark(benchmark, model, tmp_path, capsys):
    file, picture = tmp_path / "report.json", tmp_path / "picture.svg"
    command = ["bench", benchmark, model, *CASES[benchmark], "--repeats", "2"]
    assert main([*command, "--json", str(file), "--picture", str(picture)]) == 0
    shown, report = capsys.readouterr().out, json.loads(file.read_text())
    assert (report["schema"], report["benchmark"], report["valid"]) == (SCHEMA, benchmark, True)
    figures = {each["name"]: each for each in report["measurements"]}
    assert set(FIGURES[benchmark]) <= set(figures)
    for name, figure in figures.items():
        assert name.strip() in shown
        assert all(sample > 0 for sample in figure["samples"])
    assert any(figure["limit"] and figure["share"] > 0 for figure in figures.values())
    assert report["settings"]["repeats"] == 2
    assert report["model"]["file"] == "tiny.gguf"
    assert {check["name"] for check in report["checks"]} >= {"outputs", "warm-up", "spread", "other load", "limits"}
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")


def test_wrong_outputs_fail_the_command(model, capsys, monkeypatch):
    """A system that answers differently each time must not be timed."""
    from headrace.bench import subject

    real, turns = subject.run, iter(range(100))

    def forgetful(llm, batch):
        done = real(llm, batch)
        changed = ((next(turns), *done.outputs[0][1:]), *done.outputs[1:])
        return subject.Run(done.seconds, done.execute_seconds, changed, done.metrics)

    monkeypatch.setattr(subject, "run", forgetful)
    assert main(["bench", "prefill", model, "--lengths", "8", "--repeats", "1"]) == 1
    assert "failed   outputs: run 2 of request 0 differs from run 1 at token 0" in capsys.readouterr().out


def test_without_matplotlib_a_picture_is_refused_at_once_and_the_rest_works(model):
    script = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from headrace.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, "bench", "prefill", model, "--lengths", "8", "--repeats", "1"]
    refused = subprocess.run([*command, "--picture", "x.svg"], capture_output=True, text=True, timeout=60)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "pip install 'headrace[bench]'" in refused.stderr
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "prefill 8" in done.stdout


@pytest.mark.parametrize("name", ["picture.pdf", "picture"])
def test_only_svg_and_png_are_drawn(name, capsys):
    assert main(["bench", "latency", "--picture", name]) == 1
    assert "neither an SVG nor a PNG" in capsys.readouterr().err


def test_a_batch_longer_than_the_context_says_what_would_fit(model, capsys):
    assert main(["bench", "latency", model, "--input-len", "500"]) == 1
    assert "context window" in capsys.readouterr().err


def test_the_documented_commands_are_commands():
    lines = re.findall(r"^    headrace (bench [^#\n]*)", DOCS.read_text(), flags=re.MULTILINE)
    assert {parser().parse_args(shlex.split(line)).benchmark for line in lines} == set(CASES)


@pytest.mark.parametrize("arguments", [[], ["speed"], ["latency", "--repeats", "0"], ["prefill", "--lengths", "x"]])
def test_usage_errors(arguments):
    with pytest.raises(SystemExit) as caught:
        main(["bench", *arguments])
    assert caught.value.code == 2

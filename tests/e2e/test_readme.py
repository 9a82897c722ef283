"""Every command of the README, in both languages, run as written (but for the interpreter's path, the port, where
folders are made, and how much is calibrated on)."""

import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import urllib.request

import pytest

from headrace.formats.resolve import resolve_model

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
HEADRACE = [sys.executable, "-m", "headrace.cli"]


SMALL = {"quantize": ["--calibration-texts", "4", "--held-out-texts", "2", "--length", "128", "--no-gate"]}


def commands(text: str) -> list[str]:
    lines = re.findall(r"^    \.venv/bin/headrace (.*)$", text, flags=re.MULTILINE)
    return [line.split("#")[0].strip() for line in lines]


def code(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def curl_body(text: str) -> dict[str, object]:
    (body,) = re.findall(r"-d '(.*?)'", text, flags=re.DOTALL)
    return json.loads(body)


def test_both_languages_show_the_same_commands_and_code():
    chinese = (ROOT / "README.zh.md").read_text()
    assert commands(chinese) == commands(README)
    assert code(chinese, "python") == code(README, "python")
    assert curl_body(chinese) == curl_body(README)
    assert set(re.findall(r"`make (\w+)`|^    make (\w+)$", README, flags=re.MULTILINE)) == set(
        re.findall(r"`make (\w+)`|^    make (\w+)$", chinese, flags=re.MULTILINE)
    )


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for pair in re.findall(r"`make (\w+)`|^    make (\w+)$", README, flags=re.MULTILINE):
        target = next(filter(None, pair))
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("line", [c for c in commands(README) if not c.startswith("serve")])
def test_a_command(line, tmp_path):
    name, *arguments = shlex.split(line)
    if "-o" in arguments:
        arguments[arguments.index("-o") + 1] = str(tmp_path / "out")
    done = subprocess.run(
        [*HEADRACE, name, *arguments, *SMALL.get(name, [])],
        input="Hello\n/exit\n",
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 40


def test_the_python_code():
    (script,) = code(README, "python")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_serve_and_curl():
    (line,) = [c for c in commands(README) if c.startswith("serve")]
    arguments = [str(resolve_model(None)) if a == "path/to/model.gguf" else a for a in shlex.split(line)]
    server = subprocess.Popen([*HEADRACE, *arguments, "--port", "0"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        ready = next(out for out in server.stdout if out.startswith("ready: "))
        base = re.search(r"http://[\d.:]+", ready)
        assert base
        asked = curl_body(README) | {
            "model": json.load(urllib.request.urlopen(f"{base[0]}/v1/models"))["data"][0]["id"]
        }
        request = urllib.request.Request(
            f"{base[0]}/v1/chat/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        answer = json.load(urllib.request.urlopen(request, timeout=60))
        assert "Paris" in answer["choices"][0]["message"]["content"]
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) in (0, 130)

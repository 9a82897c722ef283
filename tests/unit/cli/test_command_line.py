import argparse
import subprocess
import sys

import pytest

from headrace.cli.main import main, parser
from headrace.cli.options import llm_arguments, memory_size


@pytest.mark.parametrize(
    ("text", "size"), [("1024", 1024), ("512M", 512 << 20), ("2GiB", 2 << 30), ("1.5g", 3 << 29), ("1 KB", 1024)]
)
def test_memory_sizes(text, size):
    assert memory_size(text) == size


@pytest.mark.parametrize("text", ["", "many", "-1G", "1X", "G"])
def test_unreadable_memory_sizes(text):
    with pytest.raises(argparse.ArgumentTypeError):
        memory_size(text)


def test_every_option_of_the_model_is_one_of_llm():
    from headrace.llm.config import LLMConfig

    arguments = llm_arguments(parser().parse_args(["serve"]))
    assert arguments.pop("model") is None
    LLMConfig.of(arguments)


def test_an_error_is_cause_and_remedy_and_exit_code_1(capsys):
    assert main(["generate", "/nowhere/model.gguf", "-p", "x"]) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith("error: ")
    assert "/nowhere/model.gguf" in err[0]
    assert err[1].startswith("try:   ")


@pytest.mark.parametrize("command", ["quantize -o out", "align native torch", "train qat -o out"])
def test_a_command_that_needs_torch_says_so(command, tmp_path):
    without = (
        "import sys; sys.modules['torch'] = None; from headrace.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", without, *command.split()], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    cause, remedy = found.stderr.splitlines()
    assert found.returncode == 1
    assert cause.startswith("error: ")
    assert "needs torch" in cause
    assert "pip install" in remedy


def test_usage_errors_exit_with_2():
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--max-num-seqs", "none"])
    assert caught.value.code == 2


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["serve", "--help"], ["chat", "--help"]])
def test_help_and_version(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "headrace.cli", *arguments], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0
    assert "headrace" in done.stdout

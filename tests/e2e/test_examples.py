"""Every example, as a reader would run it."""

import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


def run(path, *arguments):
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # torch's threads wait for each other where others use the cores
    return subprocess.run([sys.executable, path, *arguments], capture_output=True, text=True, timeout=600, env=alone)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example(path):
    done = run(path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 3


@pytest.mark.timeout(600)
def test_a_candidate_beyond_the_budget_fails_its_job():
    done = run(FOLDER / "align_in_ci.py", "smollm2-135m?executor=torch&inputs=int4-g32&inputs_of=*.mlp.down")
    assert done.returncode == 1, done.stderr
    assert "with inputs=" in done.stdout
    assert done.stdout.splitlines()[-1].count(".mlp.down") == 3, done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_index_has_it(path):
    assert f"({path.name})" in (FOLDER / "README.md").read_text()

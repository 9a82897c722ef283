"""The Makefile's own errors: what a fresh machine may lack."""

import pathlib
import subprocess

ROOT = pathlib.Path(__file__).parents[2]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "--silent", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_no_space_to_build_is_said_before_anything_is_written(tmp_path):
    venv = tmp_path / "venv"
    done = make("build", f"VENV={venv}", "CORE_MB=999999999")
    assert done.returncode != 0
    assert "needs 999999999 MB" in done.stdout
    assert not venv.exists()


def test_an_old_python_is_named(tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\n[ \"$1\" = -V ] && echo 'Python 3.9.2'\nexit 1\n")
    old.chmod(0o755)
    done = make("build", f"VENV={tmp_path / 'venv'}", f"PYTHON={old}")
    assert done.returncode != 0
    assert "Python 3.9.2" in done.stdout
    assert "3.11" in done.stdout


def test_no_compiler_is_said(tmp_path):
    done = make("build", f"VENV={tmp_path / 'venv'}", "CXX=no-such-compiler")
    assert done.returncode != 0
    assert "no-such-compiler" in done.stdout
    assert "apt-get install g++" in done.stdout

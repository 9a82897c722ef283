"""What a reader needs to know to judge a figure or to repeat it: machine, date, versions, model."""

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from headrace import __version__
from headrace.plan.machine import Machine


def environment(machine: Machine) -> dict[str, Any]:
    """Machine, date and versions, as plain data for the report."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "headrace": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": platform.platform(),
        "machine": machine.as_dict(),
    }


def model_facts(name: str | None, path: Path) -> dict[str, Any]:
    """A model as the report names it: not where it lies, but what it is and how large."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".gguf"))
    shown = path.stem if path.is_file() else (name or path.name).rstrip("/").rsplit("/", 1)[-1]
    return {"name": shown, "file": path.name, "bytes": sum(file.stat().st_size for file in files)}


def commit() -> str | None:
    """The commit that this source tree is at, with ``+`` if files differ from it; None for an installed package."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

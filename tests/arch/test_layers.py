"""The import table of the design: imports point down only, and heavy packages stay where they belong."""

import ast
import pathlib
import subprocess
import sys

import pytest

SOURCE = pathlib.Path(__file__).parents[2] / "src/headrace"

LAYERS = {
    "base": set(),
    "numerics": {"base"},
    "graph": {"base", "numerics"},
    "models": {"base", "graph"},
    "formats": {"base", "numerics", "graph", "models"},
    "text": {"base"},
    "engine": {"base"},
    "executors": {"base", "numerics", "graph", "engine"},
    "llm": {"base", "numerics", "graph", "models", "formats", "text", "engine", "executors"},
    "serve": {"base", "text", "engine", "llm"},
    "plan": {"base", "graph", "models", "engine", "executors"},
}
LAYERS["align"] = LAYERS["llm"] | {"llm"}
LAYERS["compress"] = LAYERS["align"] | {"align"}
LAYERS["train"] = LAYERS["compress"] | {"compress"}
LAYERS["bench"] = LAYERS["llm"] | {"llm", "plan"}
LAYERS["cli"] = set(LAYERS)

# Packages or single files that may import what is heavy or optional.
HEAVY = {
    "torch": {"executors", "numerics/fake_quantize.py", "align", "compress", "train"},
    "triton": {"executors"},
    "ray": set(),
    "transformers": {"align/huggingface.py"},
    "fastapi": {"serve"},
    "uvicorn": {"serve"},
    "starlette": {"serve"},
    "prompt_toolkit": {"cli"},
    "gguf": set(),
    "matplotlib": {"bench"},
    "safetensors": set(),
    "compressed_tensors": set(),
}


def imports(path: pathlib.Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            found.append((node.lineno, node.module or ""))
    return found


FILES = sorted(p for p in SOURCE.rglob("*.py") if p.parent != SOURCE)


def test_every_package_is_in_the_table():
    packages = {p.parent.name for p in SOURCE.glob("*/__init__.py")}
    assert packages <= set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path):
    file = path.relative_to(SOURCE)
    package = file.parts[0]
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] == "headrace" and len(parts) > 1 and parts[1] != package and not parts[1].startswith("_"):
            assert parts[1] in LAYERS[package], f"{path}:{line}: {package} may not import {name}"
        if parts[0] in HEAVY:
            assert HEAVY[parts[0]] & {package, str(file)}, f"{path}:{line}: {file} may not import {parts[0]}"


def test_packages_hold_no_import_cycle():
    """Inside a package too: no module reaches itself through the modules it imports at load time."""
    modules = {".".join(p.relative_to(SOURCE.parent).with_suffix("").parts): p for p in FILES}
    edges = {
        name: {target for _, target in _top_level_imports(path) if target in modules} for name, path in modules.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in edges[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in modules:
        visit(name, ())


def _top_level_imports(path: pathlib.Path) -> list[tuple[int, str]]:
    tree = ast.parse(path.read_text())
    return [
        (node.lineno, node.module or "")
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("headrace.")
    ]


def test_import_and_help_load_nothing_heavy():
    script = (
        "import sys, runpy; sys.argv = ['headrace', '--help']\n"
        "import headrace\n"
        "try: runpy.run_module('headrace.cli', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'torch', 'fastapi', 'tokenizers', 'jinja2', 'transformers', 'matplotlib'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_core_runs_without_torch():
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "import headrace.llm.llm, headrace.llm.async_llm, headrace.serve.server, headrace.executors.native\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

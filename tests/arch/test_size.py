"""Files and functions that have grown past what one reads in a sitting warn; nothing may exceed twice the mark."""

import ast
import pathlib
import warnings

ROOT = pathlib.Path(__file__).parents[2]
FILE_LINES, FUNCTION_LINES = 400, 60


def logical_lines(node: ast.AST) -> int:
    """Lines that hold code: statements' own lines, without docstrings, comments and blank lines."""
    lines: set[int] = set()
    for child in ast.walk(node):
        is_text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
        if isinstance(child, ast.stmt) and not is_text:
            lines.add(child.lineno)
    return len(lines)


def test_files_and_functions_stay_readable():
    for path in sorted((ROOT / "src").rglob("*.py")):
        tree = ast.parse(path.read_text())
        _judge(str(path.relative_to(ROOT)), logical_lines(tree), FILE_LINES)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                _judge(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", logical_lines(node), FUNCTION_LINES)


def _judge(what: str, lines: int, mark: int) -> None:
    assert lines <= 2 * mark, f"{what} has {lines} logical lines: split it by meaning"
    if lines > mark:
        warnings.warn(f"{what} has {lines} logical lines (mark: {mark})", stacklevel=1)

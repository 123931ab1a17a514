"""The scripts are written to be read: bytes, lines of main() and of other functions that they may take."""

import ast

import pytest
from conftest import ROOT

# What they take now: they may shrink, to 36, 42, 32 and 105 KB, but not grow
BYTES = {"gretta.py": 54_300, "advaa.py": 40_500, "game_of_noise.py": 39_500, "common.py": 147_700}
BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try)


def nesting(node: ast.AST) -> int:
    """How deep blocks stand within each other; functions within a function count for themselves."""
    inside = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.FunctionDef)]
    chain = node.orelse if isinstance(node, ast.If) and isinstance((node.orelse or [0])[0], ast.If) else []
    deeper = max((nesting(child) for child in inside if child not in chain), default=0)
    return max([isinstance(node, BLOCKS) + deeper, *map(nesting, chain)])  # elif is no deeper


@pytest.mark.parametrize("name", BYTES)
def test_budgets(name):
    source = (ROOT / name).read_text()
    assert len(source.encode()) <= BYTES[name]
    for function in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)):
        most = {"main": 120, "parse_args": 90}.get(function.name, 60)
        assert function.end_lineno - function.lineno < most, function.name
        assert function.name != "main" or nesting(function) <= 3


def test_tests_and_front_page():
    assert sum(len(file.read_text().splitlines()) for file in (ROOT / "tests").glob("*.py")) <= 4570
    readme = (ROOT / "README.md").read_text()
    assert len(readme.encode()) <= 14_000 and len(readme.splitlines()) <= 220
    assert all(len(page.read_text().splitlines()) <= 350 for page in (ROOT / "docs").glob("*.md"))

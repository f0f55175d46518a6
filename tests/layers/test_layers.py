"""Imports run downward only, and heavy libraries stay where they belong (docs/architecture.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "medicalgpt_cli"
FLOORS = {
    "errors": 0,
    "working_folder": 0,
    "settings": 1,
    "engine": 2,
    "terminal": 3,
    "serving": 3,
    "commands": 4,
    "app": 5,
    "__main__": 6,
}
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "gradio", "accelerate", "bitsandbytes"}
FRONT_ENDS = {"typer", "rich", "gradio", "prompt_toolkit"}


def _files():
    return sorted(PACKAGE.rglob("*.py"))


def _area(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def _imports(tree: ast.AST):
    """(module, at module level) of each import; type-checking blocks do not run."""
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    inside = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node not in inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module, node not in inside


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path: Path) -> None:
    area = _area(path)
    if area == "__init__":
        return
    floor = FLOORS[area]
    for module, at_top in _imports(ast.parse(path.read_text(encoding="utf-8"))):
        parts = module.split(".")
        if parts[0] == "medicalgpt_cli" and len(parts) > 1:
            assert FLOORS.get(parts[1], 0) <= floor, f"{path}: {area} imports {module}, which lies above it"
        if parts[0] in HEAVY and at_top:
            assert floor == 2, f"{path}: {module} is imported at module level outside the engine"
        if parts[0] in FRONT_ENDS:
            assert floor != 2, f"{path}: the engine imports {module}"
        if floor <= 1:
            import sys

            assert parts[0] in sys.stdlib_module_names | {"medicalgpt_cli"}, f"{path}: {module} in settings"


def test_the_check_sees_an_upward_import() -> None:
    found = list(_imports(ast.parse("from medicalgpt_cli.commands import x\ndef f():\n    import torch\n")))
    assert found == [("medicalgpt_cli.commands", True), ("torch", False)]

"""The wings of ``src/``: imports go down, never up; src imports no script, tool or test."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WINGS = [
    "common",
    "proteins",
    "loss",
    "models",
    "trainer",
    "distillation",
    "evaluation",
    "training",
    "publishing",
    "experiments",
]
"""From the ground up; ``src/distillation.py`` is a floor of its own."""
MODULES = sorted((ROOT / "src").rglob("*.py"))


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    """Return line and dotted name of every import, also of those inside functions."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return names


def faults(path: Path, text: str) -> list[str]:
    """Return a line for each import that goes up or leaves ``src/``."""
    parts = path.with_suffix("").parts
    if len(parts) == 2 and parts[1] == "__init__":
        return []
    floor = WINGS.index(parts[1])
    found = []
    for line, name in imported(ast.parse(text)):
        first, *rest = name.split(".")
        if first in ("scripts", "tools", "tests"):
            found.append(f"{path}:{line}: src imports {name}")
        elif first == "src" and rest and rest[0] in WINGS and WINGS.index(rest[0]) > floor:
            found.append(f"{path}:{line}: {parts[1]} imports {name}, which stands above it")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_imports_go_down(path):
    assert not faults(path.relative_to(ROOT), path.read_text())


def test_every_module_stands_in_a_wing():
    for path in MODULES:
        parts = path.relative_to(ROOT / "src").with_suffix("").parts
        assert parts[0] in (*WINGS, "__init__"), path
        assert len(parts) <= 2, path


def test_an_import_that_goes_up_is_named_with_its_line():
    text = "import os\n\ndef f():\n    from src.training.stages import train\n"
    assert faults(Path("src/loss/fused.py"), text) == [
        "src/loss/fused.py:4: loss imports src.training.stages.train, which stands above it"
    ]
    assert faults(Path("src/experiments/grids.py"), text) == []
    assert faults(Path("src/common/cli.py"), "from scripts import train\n") == [
        "src/common/cli.py:1: src imports scripts.train"
    ]

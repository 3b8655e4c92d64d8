"""What the documents point to exists: files, headings, tests, modules and tools."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
TESTS = {path.name: path.read_text() for path in sorted(ROOT.glob("tests/test_*.py"))}
FUNCTIONS = {name for text in TESTS.values() for name in re.findall(r"def (test_\w+)", text)}


def anchor(heading: str) -> str:
    """Return the fragment under which a heading is reached, as on GitHub."""
    plain = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return plain.replace(" ", "-")


def prose(text: str) -> str:
    """Return a document without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document.read_text())):
        if re.match(r"\w+:", target):
            continue
        name, _, fragment = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), target
        if fragment and path.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert fragment in map(anchor, headings), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tests_that_are_named_exist(document):
    """Also ``test_x.py::test_y`` and ``test_y``; ``test_y_…`` (or ``*``): any that begin so."""
    text = document.read_text()
    for file, name, rest in re.findall(r"(test_\w+\.py)(?:::(test_\w+)([…*]?))?", text):
        assert file in TESTS, file
        end = "" if rest else "("
        assert not name or f"def {name}{end}" in TESTS[file], f"{file}::{name}"
    for name, rest in re.findall(r"`(?:test_\w+\.py::)?(test_\w+)([…*]?)`", text):
        assert any(f == name or (rest and f.startswith(name)) for f in FUNCTIONS), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_code_that_is_named_exists(document):
    text = document.read_text()
    for name in re.findall(r"\b((?:src|scripts|tools|tests)/[\w/]+\.py)\b", text):
        assert (ROOT / name).is_file(), name


def test_these_tests_see_something():
    assert anchor("What `x` is: a test, one & two") == "what-x-is-a-test-one--two"
    assert len(DOCUMENTS) > 8
    named = [re.findall(r"`(?:test_\w+\.py::)?(test_\w+)", d.read_text()) for d in DOCUMENTS]
    assert sum(map(len, named)) > 40

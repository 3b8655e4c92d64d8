"""Every package that is installed is pinned, and its licence is listed."""

from __future__ import annotations

import re
from email.message import Message
from pathlib import Path

import pytest

from tools import licences

ROOT = Path(__file__).resolve().parents[1]


def names_in(path: Path) -> set[str]:
    from packaging.utils import canonicalize_name

    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return {canonicalize_name(re.split(r"[=<>!~\[; ]", line)[0]) for line in lines if line}


def test_every_package_that_is_installed_is_pinned():
    found = {package.name for package in licences.packages()}
    assert {"torch", "wandb", "pytest", "pyarrow"} <= found
    assert found - names_in(ROOT / "constraints.txt") == set()


def test_pins_are_exact_and_within_the_ranges():
    from packaging.requirements import Requirement

    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[\w.\-]+==[\w.+!\-]+", line), line
            name, version = line.split("==")
            pins[name.lower().replace("_", "-")] = version
    for file in ("requirements.txt", "requirements-dev.txt"):
        for line in licences.required(ROOT / file):
            need = Requirement(line)
            assert need.specifier, f"{line} has no range"
            assert need.specifier.contains(pins[need.name.lower().replace("_", "-")]), line


def test_the_document_lists_what_the_requirements_name():
    text = (ROOT / "docs" / "DEPENDENCIES.md").read_text()
    listed = set(re.findall(r"^\| ([\w.\-]+) \|", text, re.MULTILINE))
    for file in ("requirements.txt", "requirements-dev.txt"):
        wanted = {re.split(r"[=<>]", line)[0] for line in licences.required(ROOT / file)}
        assert {name.replace("_", "-") for name in wanted} <= listed


@pytest.mark.parametrize(
    ("fields", "licence"),
    [
        ([("License-Expression", "MIT"), ("License", "other")], "MIT"),
        ([("Classifier", "License :: OSI Approved :: BSD License")], "BSD License"),
        ([("Classifier", "License :: OSI Approved"), ("License", "Apache\n2.0")], "Apache 2.0"),
        ([("License", "x" * 5000)], ""),
        ([], ""),
    ],
)
def test_licences_as_packages_state_them(fields, licence):
    facts = Message()
    for key, value in fields:
        facts[key] = value
    assert licences.licence_of(facts) == licence

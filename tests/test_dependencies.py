"""Every package that is installed is pinned, and every requirement is explained."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
FILES = ("requirements.txt", "requirements-family.txt", "requirements-dev.txt")


def required() -> list[Requirement]:
    """Return the requirements of all files."""
    lines = [
        line.split("#")[0].strip() for f in FILES for line in (ROOT / f).read_text().split("\n")
    ]
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def pins() -> dict[str, str]:
    """Return the pinned versions by package."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.\-]+==[\w.+!\-]+", line) for line in lines)
    return {canonicalize_name(name): version for name, version in (x.split("==") for x in lines)}


def test_every_package_that_the_requirements_install_is_pinned():
    installed: set[str] = set()
    waiting = [(need, "") for need in required()]
    while waiting:
        need, extra = waiting.pop()
        name = canonicalize_name(need.name)
        applies = need.marker is None or need.marker.evaluate({"extra": extra})
        if applies and name not in installed:
            installed.add(name)
            lines = metadata.requires(need.name) or []
            waiting += [(Requirement(x), e) for x in lines for e in (need.extras or {""})]
    assert {"torch", "wandb", "pytest", "pyarrow", "hypothesis"} <= installed
    assert installed - set(pins()) == set()


def test_pins_are_within_the_ranges():
    for need in required():
        assert need.specifier, f"{need} has no range"
        assert need.specifier.contains(pins()[canonicalize_name(need.name)]), str(need)


LICENCES = (
    "MIT",
    "BSD",
    "Apache",
    "ISC",
    "Python Software Foundation",
    "Biopython",
    "MPL",
    "Mozilla Public",
)


def test_every_requirement_has_a_licence_that_the_document_names():
    for need in required():
        about: Any = metadata.metadata(need.name)
        texts = [c for c in about.get_all("Classifier") or [] if c.startswith("License")]
        texts += [about.get("License-Expression"), about.get("License")]
        shown = " ".join(filter(None, texts))[:1000]
        assert any(name in shown for name in LICENCES), (need.name, shown)

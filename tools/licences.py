#!/usr/bin/env python3
"""List the licences of everything that the requirements install, from the installed packages.

Examples:
  python tools/licences.py
  python tools/licences.py --update docs/DEPENDENCIES.md
"""

from __future__ import annotations

import argparse
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.common.cli import HelpFormatter, run_script, say

SECTION = "licences"
COPYLEFT = ("GPL", "AGPL", "EUPL", "CECILL", "OSL", "SSPL")


class Package(NamedTuple):
    """An installed package: its licence, and whether the tool itself needs it or only its tests."""

    name: str
    version: str
    licence: str
    needed_by: str


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--update", type=Path, help=f"document whose section '{SECTION}' gets it")
    return parser


def run(args: argparse.Namespace) -> list[Package]:
    """Print the table, and write it where asked for. Returns the packages."""
    from src.common.files import replace_section

    found = packages()
    text = table(found)
    if args.update:
        replace_section(args.update, SECTION, text)
    say(text)
    copyleft = [p.name for p in found if any(word in p.licence.upper() for word in COPYLEFT)]
    unknown = [p.name for p in found if not p.licence]
    say(f"{len(found)} packages; without a stated licence: {', '.join(unknown) or 'none'}")
    say(f"with a copyleft licence by name: {', '.join(copyleft) or 'none'}")
    return found


def required(path: Path) -> list[str]:
    """Return the requirements of a file; other files that it includes are left out."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("-")]


def packages() -> list[Package]:
    """Return what the two requirements files install here, with what those need in turn."""
    found: dict[str, Package] = {}
    for file, needed_by in (("requirements.txt", "tool"), ("requirements-dev.txt", "tests")):
        waiting = [(line, "") for line in required(ROOT / file)]
        while waiting:
            line, extra = waiting.pop()
            package = _installed(line, extra, needed_by)
            if package is not None and package.name not in found:
                found[package.name] = package
                waiting += _needs_of(line)
    return sorted(found.values())


def _installed(line: str, extra: str, needed_by: str) -> Package | None:
    """Return the package that a requirement names, None where it does not apply here."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    need = Requirement(line)
    if need.marker is not None and not need.marker.evaluate({"extra": extra}):
        return None
    try:
        facts = metadata.metadata(need.name)
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"{need.name} is not installed: pip install -r requirements-dev.txt"
        ) from None
    return Package(canonicalize_name(facts["Name"]), facts["Version"], licence_of(facts), needed_by)


def _needs_of(line: str) -> list[tuple[str, str]]:
    from packaging.requirements import Requirement

    need = Requirement(line)
    lines = metadata.requires(need.name) or []
    return [(each, extra) for each in lines for extra in (need.extras or {""})]


def licence_of(facts: Any) -> str:
    """Return the licence that a package states: as an expression, a classifier or in words."""
    if facts.get("License-Expression"):
        return facts["License-Expression"]
    classifiers = facts.get_all("Classifier") or []
    named = [c.split(" :: ")[-1] for c in classifiers if c.startswith("License ::")]
    named = [name for name in named if name != "OSI Approved"]
    words = " ".join((facts.get("License") or "").split())
    return "; ".join(named) or (words if len(words) <= 60 else "")


def table(found: list[Package]) -> str:
    """Return the packages as a Markdown table."""
    lines = ["| Package | Version | Licence | Needed by |", "|---|---|---|---|"]
    lines += [
        f"| {p.name} | {p.version} | {p.licence or 'not stated'} | {p.needed_by} |" for p in found
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

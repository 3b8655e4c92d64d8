#!/usr/bin/env python3
"""Write docs/CLI.md: every flag of every script, from the parsers themselves.

Examples:
  python tools/write_cli_docs.py
  python tools/write_cli_docs.py --check
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.common.cli import HelpFormatter, run_script, say
from src.common.files import write_text

PATTERNS = ("scripts/*.py", "tools/*.py", "tools/benchmark/run.py")
HEAD = """# Command line

Every flag of every script. This file is generated from the parsers by
`python tools/write_cli_docs.py`; a test fails where it is not up to date.
A script ends with status 0, with 2 after a user's error (one line says what to do) and with 130
after Ctrl-C. Set `DISTILL_TRACEBACK=1` to see where an error came from.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/CLI.md"), help="Markdown file")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where it differs")
    return parser


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield each script's path and parser, in the order of their names."""
    for pattern in PATTERNS:
        for path in sorted(ROOT.glob(pattern)):
            if "def build_parser(" not in path.read_text(encoding="utf-8"):
                continue
            spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            # Dataclasses look their own module up.
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
            yield path.relative_to(ROOT).as_posix(), module.build_parser()


def document(name: str, parser: argparse.ArgumentParser) -> str:
    """Return a script's section: what it does, its examples, a table for each group of flags.

    The help that argparse prints differs between versions of Python; this does not.
    """
    what, *examples = re.split(r"\nExamples?:\n", (parser.description or "").strip(), maxsplit=1)
    lines = [f"## {name}", "", " ".join(what.split())]
    if examples:
        shown = [line.removeprefix("  ") for line in examples[0].rstrip().splitlines()]
        lines += ["", "```bash", *shown, "```"]
    for group in parser._action_groups:
        rows = [
            row(action)
            for action in group._group_actions
            if not isinstance(action, argparse._HelpAction) and action.help != argparse.SUPPRESS
        ]
        if not rows:
            continue
        title = {"options": "", "positional arguments": ""}.get(group.title or "", group.title)
        lines += ["", f"**{title}**" if title else "", "", "| flag | what it does | default |"]
        lines += ["| --- | --- | --- |", *rows]
    text = "\n".join(lines)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text + "\n"


def row(action: argparse.Action) -> str:
    """Return a flag's line in the table."""
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    names = names or f"`{action.metavar or action.dest}`"
    if action.option_strings and action.nargs != 0:
        names = names[:-1] + f" {value_name(action)}`"
    what = (action.help or "").replace("%%", "%").replace("|", "\\|")
    if action.choices:
        what += f": {', '.join(map(str, action.choices))}"
    default = ""
    if action.required and action.nargs != "*":
        default = "required"
    elif not (action.default is None or action.default is False or action.default == ""):
        shown = action.default
        if isinstance(shown, Path) and shown.is_relative_to(ROOT):
            shown = shown.relative_to(ROOT)  # the same on every machine
        default = f"`{shown}`"
    return f"| {names} | {what} | {default} |"


def value_name(action: argparse.Action) -> str:
    """Return what stands for a flag's value."""
    if isinstance(action.metavar, str):
        return action.metavar
    kind = getattr(action.type, "__name__", "text")
    return {
        "positive_int": "N",
        "natural": "N",
        "int": "N",
        "positive_float": "X",
        "float": "X",
        "share": "X",
        "Path": "PATH",
    }.get(kind, "TEXT" if action.choices is None else "CHOICE")


def run(args: argparse.Namespace) -> dict:
    """Write the file, or compare it. Returns how many scripts it describes."""
    sections = [document(name, parser) for name, parser in parsers()]
    text = "\n".join([HEAD, *sections])
    path = args.output if args.output.is_absolute() else ROOT / args.output
    if args.check:
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            raise ValueError(f"{args.output} is not up to date: python tools/write_cli_docs.py")
        say(f"{args.output} is up to date: {len(sections)} scripts")
    else:
        write_text(path, text)
        say(f"written: {args.output}, {len(sections)} scripts")
    return {"scripts": len(sections)}


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Make the figures and tables of an experiment on the synergy claim from its results alone.

Figures come as PNG and PDF, tables as Markdown and LaTeX. What lacks its results is left out, and
the command that makes them is named.

Examples:
  python scripts/figures.py
  python scripts/figures.py --results results/mine --output figures
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common.cli import HelpFormatter, run_script


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--results", type=Path, default=Path("results/claim"), help="directory of results")
    add("--output", type=Path, help="directory to write to (default: RESULTS/figures)")
    return parser


def run(args: argparse.Namespace) -> dict[str, Sequence[str]]:
    """Make everything that can be made. Returns what was written and what is missing."""
    from src.experiments.figures import make_all

    if not args.results.is_dir():
        raise ValueError(f"--results {args.results}: is no directory")
    return make_all(args.results, args.output or args.results / "figures")


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Decide the synergy claim from the tables that scripts/ablation.py left.

Contrasts, intervals and the decision rule are those of docs/EXPERIMENT.md. Writes analysis.json and
analysis.md beside the tables.

Examples:
  python scripts/analyse_ablation.py --results results/synergy
  python scripts/analyse_ablation.py --results results/recipe --grid recipe --against baseline cut
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common.cli import HelpFormatter, run_script, say


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--results", type=Path, required=True, help="directory with per_protein-<grid>-*.parquet")
    add("--grid", default="synergy", help="which grid's tables")
    add("--split", default="test", help="the part that was measured")
    add("--against", nargs="+", default=["baseline"], help="arms that all others are compared with")
    return parser


def run(args: argparse.Namespace) -> dict:
    """Analyse, write and print. Returns the analysis."""
    from src.common.files import write_json, write_text
    from src.common.runs import provenance
    from src.experiments.synergy import analyse, analysis_lines, read_runs

    analysis = analyse(read_runs(args.results, args.grid, args.split), args.against)
    lines = analysis_lines(analysis)
    for line in lines:
        say(line)
    write_json(args.results / "analysis.json", {"sizes": analysis, "run": provenance()})
    write_text(args.results / "analysis.md", "\n".join(lines))
    say(f"written: {args.results / 'analysis.json'} and analysis.md")
    return analysis


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

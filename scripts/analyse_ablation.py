#!/usr/bin/env python3
r"""Decide the synergy claim from the tables that scripts/ablation.py left.

Contrasts, intervals and the decision rule are those of docs/EXPERIMENT.md. Writes analysis.json and
analysis.md beside the tables.

Examples:
  python scripts/analyse_ablation.py --results results/synergy
  python scripts/analyse_ablation.py --results results/synergy --against baseline weight_matched
  python scripts/analyse_ablation.py --results results/claim/cut-1200 \
      --shorter results/claim/cut-400
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
    add("--shorter", type=Path, help="results of the same grid after fewer steps, to compare")
    return parser


def run(args: argparse.Namespace) -> dict:
    """Analyse, write and print. Returns the analysis."""
    from src.common.files import write_json, write_text
    from src.common.runs import provenance
    from src.experiments.synergy import (
        ANALYSIS_FILE,
        analyse,
        analysis_lines,
        change_lines,
        changes,
        read_runs,
    )

    runs = read_runs(args.results, args.grid, args.split)
    analysis = analyse(runs, args.against)
    lines = analysis_lines(analysis)
    record = {"sizes": analysis}
    if args.shorter:
        record["changes"] = changes(runs, read_runs(args.shorter, args.grid, args.split))
        lines += change_lines(record["changes"])
    for line in lines:
        say(line)
    write_json(args.results / ANALYSIS_FILE, {**record, "run": provenance()})
    write_text(args.results / "analysis.md", "\n".join(lines))
    say(f"written: {args.results / ANALYSIS_FILE} and analysis.md")
    return analysis


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
r"""Write one HTML page about a run: what was trained on what, how good it is, how to use it.

Examples:
  python scripts/report.py --run models/demo --results results/demo.json -o report.html
  python scripts/report.py --run models/demo --results results/demo.json --fasta new.fasta \
      -o report.html --overwrite
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common.cli import HelpFormatter, run_script, say, size
from src.common.files import check_outputs, write_text


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, help="directory of a run, as scripts/train.py leaves it")
    add("--results", type=Path, help="results file of scripts/evaluate.py")
    add("--fasta", type=Path, help="generated proteins to show (default: those in the results)")
    add("--output", "-o", type=Path, required=True, help="HTML file; it needs nothing beside it")
    add("--overwrite", action="store_true", help="replace the file")
    return parser


def run(args: argparse.Namespace) -> dict:
    """Write the page. Returns its size in bytes."""
    check_outputs(args.output, overwrite=args.overwrite, inputs=(args.results, args.fasta))
    from src.publishing.report import build_report

    write_text(args.output, build_report(args.run, args.results, args.fasta))
    written = args.output.stat().st_size
    say(f"written: {args.output} ({size(written)})")
    return {"bytes": written}


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

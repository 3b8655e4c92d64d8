#!/usr/bin/env python3
"""Make the sample of proteins that the repository carries, or check that it is what it says.

The settings are those of data/proteins; scripts/split_data.py does the work.

Example:
  python tools/prepare_sample.py --check data/proteins
  python tools/prepare_sample.py --data swissprot90.fasta.gz --output sample
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import split_data
from src.common.cli import HelpFormatter, run_script, say

SETTINGS = {
    "seed": 0,
    "validation_proteins": 1000,
    "test_proteins": 2500,
    "in_family_proteins": 1000,
    "train_proteins": 20_000,
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--check", type=Path, help="directory of parts to compare with its record")
    parser.add_argument("--data", help="the file of proteins to sample")
    parser.add_argument("--output", help="directory to make")
    parser.add_argument("--clusters", help="MMseqs2's table of clusters, if made before")
    return parser


def run(args: argparse.Namespace) -> dict:
    """Make or check the sample. Returns its record."""
    from src.proteins.splits import check_split, record_lines

    if args.check:
        record = check_split(args.check)
        for line in [*record_lines(record), f"{args.check} is what its record says"]:
            say(line)
        return record
    if not (args.data and args.output):
        raise ValueError("give --check DIR, or --data FILE with --output DIR")
    given = {"data": args.data, "output": args.output, **SETTINGS}
    if args.clusters:
        given["clusters"] = args.clusters
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return split_data.run(split_data.build_parser().parse_args(flags))


def main(argv: list[str] | None = None) -> int:
    """Run the script. Returns the exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Set evaluations side by side, and judge them against a reference.

Examples:
  python scripts/compare.py results/*.json
  python scripts/compare.py results/eval_*.json --output docs/comparison.md
  python scripts/compare.py results/eval_synergy_tiny.json --reference results/eval_hf_tiny_old.json
  python scripts/compare.py results/eval_*.json --format latex
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common.cli import HelpFormatter, natural, positive_float, positive_int, run_script, say


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="results of scripts/evaluate.py, of any version; a missing one shows as ---",
    )
    add = parser.add_argument_group("verdict").add_argument
    add("--reference", type=Path, metavar="FILE", help="judge every other file against this one")
    add(
        "--margin",
        type=positive_float,
        default=0.02,
        help="perplexities within it, in ln(perplexity), are equivalent",
    )
    add("--bootstrap", type=positive_int, default=2000, help="replicates, where paired")
    add("--seed", type=natural, default=0, help="of the bootstrap")

    add = parser.add_argument_group("output").add_argument
    add("--format", choices=("terminal", "markdown", "csv", "latex"), help="(default: terminal)")
    add("--output", type=Path, help="write there; the suffix .md, .csv or .tex names the format")
    add("--overwrite", action="store_true", help="replace that file")
    return parser


def run(args: argparse.Namespace) -> dict:
    """Compare, print and write. Returns the entries and verdicts."""
    from src.common.files import check_outputs, write_text
    from src.publishing import comparison as c
    from src.publishing.verdicts import unlike, verdicts_on

    check_outputs(args.output, overwrite=args.overwrite)
    if args.output:
        if args.format == "terminal":
            raise ValueError("--format terminal goes to the screen: leave out --output")
        args.format = args.format or c.format_of(args.output)
    reference = [args.reference] if args.reference else []
    entries, notes = c.read_entries([*args.files, *reference])
    verdicts = []
    if args.reference:
        verdicts, problem = verdicts_on(
            entries, args.reference, args.margin, args.bootstrap, args.seed
        )
        notes += [problem] if problem else []
    else:
        notes += unlike(entries)
    if args.format in (None, "terminal") or args.output:
        c.print_comparison(entries, verdicts, notes)
    if args.format in c.FORMATS:
        text = c.FORMATS[args.format](entries, verdicts, notes)
        if args.output:
            write_text(args.output, text)
            say(f"written: {args.output}")
        else:
            sys.stdout.write(text)
    return {"entries": entries, "verdicts": verdicts, "notes": notes}


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Estimate hours and storage of distilling on many devices, from figures measured on one.

Examples:
  python scripts/simulate_scaling.py --measurements my_gpu.json --clusters 1x1 1x8 4x8
  python scripts/simulate_scaling.py --bounds --update docs/SCALING.md
  python scripts/simulate_scaling.py --example > my_gpu.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common.cli import HelpFormatter, positive_float, positive_int, run_script, say, size

SECTION = "scaling tables"


def cluster(text: str) -> tuple[int, int]:
    """Argparse type: ``nodes x devices``, for example ``4x8``."""
    nodes, _, devices = text.lower().partition("x")
    if not (nodes.isdecimal() and devices.isdecimal() and int(nodes) and int(devices)):
        raise argparse.ArgumentTypeError(f"must be NODESxDEVICES, for example 4x8, got {text!r}")
    return int(nodes), int(devices)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument_group("figures of one device").add_argument
    add("--measurements", type=Path, nargs="+", default=[], help="JSON files (see --example)")
    add("--bounds", action="store_true", help="bounds of an assumed device (docs/SCALING.md)")
    add("--example", action="store_true", help="print the form of such a file and stop")

    add = parser.add_argument_group("what to distil").add_argument
    add("--proteins", type=positive_int, default=45_000_000, help="UniRef50: 45 million")
    add("--tokens_per_protein", type=positive_float, default=75.0, help="train.py --dry_run says")
    add("--epochs", type=positive_float, default=1.0, help="passes over them")
    add("--students", type=positive_int, default=1, help="trained from one cache, in turn")
    add(
        "--clusters",
        type=cluster,
        nargs="+",
        default=[(1, 1), (1, 2), (1, 4), (1, 8), (2, 8), (4, 8), (8, 8)],
        help="nodes x devices on each (default: 1x1 to 8x8)",
    )

    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, help="JSON file with the estimates")
    add("--overwrite", action="store_true", help="replace --output")
    add("--update", type=Path, help=f"document whose section '{SECTION}' gets the tables")
    return parser


def run(args: argparse.Namespace) -> dict:
    """Estimate, print tables and write what was asked for. Returns the estimates."""
    from dataclasses import asdict

    from src.common.files import check_outputs, read_json, replace_section, write_json
    from src.common.privacy import publishable
    from src.common.runs import provenance
    from src.experiments import scaling

    if args.example:
        say(json.dumps(scaling.EXAMPLE, indent=2))
        return scaling.EXAMPLE
    check_outputs(args.output, overwrite=args.overwrite)
    figures = [scaling.Measurements.from_json(read_json(p), p) for p in args.measurements]
    figures += scaling.assumed_bounds() if args.bounds else []
    if not figures:
        raise ValueError("pass --measurements FILE (--example shows its form), or --bounds")
    job = scaling.Job(args.proteins, args.tokens_per_protein, args.epochs, args.students)
    sections, record = [], []
    for m in figures:
        table = scaling.table(m, job, args.clusters)
        sections.append(f"**{m.name}** ({scaling.SOURCES[m.source]})\n\n{table}")
        sections.append("\n".join(scaling.remarks(m, job, size)))
        rows = [asdict(scaling.estimate(m, job, *where)) for where in args.clusters]
        record.append({"figures": asdict(m), "estimates": rows})
    text = "\n\n".join(sections)
    say(text)
    if args.update:
        replace_section(args.update, SECTION, text)
    result = {"schema_version": 1, "job": asdict(job), "devices": record}
    if args.output:
        made_by = {**provenance(), "measurements": publishable(list(args.measurements))}
        write_json(args.output, {**result, "run": made_by})
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

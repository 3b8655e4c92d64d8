#!/usr/bin/env python3
r"""Measure the peak memory of training presets at ProtGPT2's shape, and write a table of it.

Each combination of preset, batch size and teacher is measured in a process of its own, with random
weights and rows of equal length. Combinations that --output already has are not measured again;
--update writes the table into docs/TROUBLESHOOTING.md.

Examples:
  python tools/memory_table.py --batch_sizes 1 4
  python tools/memory_table.py --update
  python tools/memory_table.py --device cuda --precision bf16 --batch_sizes 8 16 32 \
      --output results/memory_gpu.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.common.cli import HelpFormatter, positive_int, run_script, say, size
from src.common.settings import PRECISIONS, PRESETS

DOCUMENT = ROOT / "docs" / "TROUBLESHOOTING.md"
SCHEMA_VERSION = 1
ABOUT = ("tokens", "device", "precision")
"""What all cells of a record share."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add(
        "--presets",
        nargs="+",
        default=["hf-tiny", "hf-small", "hf-medium"],
        choices=sorted(PRESETS),
        metavar="PRESET",
        help="students",
    )
    add("--batch_sizes", nargs="+", type=positive_int, default=[1, 4], help="rows of a batch")
    add(
        "--teachers",
        nargs="+",
        default=["cached", "online"],
        choices=("cached", "online"),
        help="states from disk, or the whole teacher beside the student",
    )
    add("--max_length", type=positive_int, default=512, help="tokens of each row")
    add("--device", default="cpu", help="cpu or cuda")
    add("--precision", choices=PRECISIONS[1:], default="fp32", help="of the training")
    add("--output", type=Path, default=Path("results/memory_cpu.json"), help="record")
    add("--update", action="store_true", help="only write the record's table into the document")
    add("--child", type=json.loads, help=argparse.SUPPRESS)
    return parser


def child(args: argparse.Namespace) -> dict:
    """Measure one cell in this process, and print it."""
    from tools.benchmark.memory import Cell, measure

    oom = Path("/proc/self/oom_score_adj")
    if oom.exists():
        oom.write_text("1000")  # where memory ends, it is this process that goes
    record = measure(Cell(**args.child), args.device, args.precision)
    print(json.dumps(record))
    return record


def run(args: argparse.Namespace) -> dict:
    """Measure what is missing and write the record, or write the table. Returns the record."""
    if args.child:
        return child(args)
    from src.common.files import replace_section, write_json
    from src.common.runs import provenance
    from tools.benchmark.memory import Cell, comparison_line, planned, table

    record: dict[str, Any] = {"cells": []}
    if args.output.exists():
        record = read_record(args.output)
    if args.update:
        if not record["cells"]:
            raise ValueError(f"{args.output}: nothing was measured yet")
        replace_section(DOCUMENT, "memory", f"{table(record)}\n\n{comparison_line(record)}")
        return record
    about = {"tokens": args.max_length, "device": args.device, "precision": args.precision}
    if record["cells"] and any(record[name] != about[name] for name in ABOUT):
        raise ValueError(f"{args.output} holds other measurements: choose another --output")
    done = {Cell(**{n: c[n] for n in Cell.__annotations__}).key for c in record["cells"]}
    for teacher in args.teachers:
        for preset in args.presets:
            for batch_size in args.batch_sizes:
                cell = Cell(preset, batch_size, teacher, args.max_length)
                if cell.key in done:
                    continue
                found = measured_alone(cell, args)
                extra = {"planned_bytes": planned(cell, args.precision)}
                record["cells"].append({**asdict(cell), **found, **extra})
                record |= {"schema_version": SCHEMA_VERSION, **about, **provenance()}
                write_json(args.output, record)
                say(f"{preset}, {batch_size} rows, {teacher}: {size(found['peak_bytes'])}")
    return record


def read_record(path: Path) -> dict[str, Any]:
    """Read what was measured before. Raises ``ValueError`` if it is no record of this tool."""
    from src.common.files import read_json

    record = read_json(path)
    try:
        complete = all(
            cell["peak_bytes"] > cell["base_bytes"] and cell["planned_bytes"] > 0
            for cell in record["cells"]
        )
        complete = complete and (not record["cells"] or {*ABOUT} <= {*record})
    except (TypeError, KeyError):
        complete = False
    if not complete:
        raise ValueError(f"{path}: not a record of this tool: choose another --output")
    return record


def measured_alone(cell, args: argparse.Namespace) -> dict:
    """Return what a process of its own measures. Raises ``ValueError`` where it fails."""
    command = [sys.executable, __file__, "--child", json.dumps(asdict(cell))]
    command += ["--device", args.device, "--precision", args.precision]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["killed"]
        raise ValueError(
            f"{cell.preset} with {cell.batch_size} rows, {cell.teacher}: status "
            f"{done.returncode}, {last[0]:.200}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    """Run the script. Returns the exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

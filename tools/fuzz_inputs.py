#!/usr/bin/env python3
"""Feed hostile files to everything that reads one, and count what goes wrong.

Examples:
  python tools/fuzz_inputs.py --cases 12000 --seed 1
  python tools/fuzz_inputs.py --seed 1 --format CSV --case 17 --keep /tmp/case
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common.cli import HelpFormatter, duration, natural, positive_int, progress, run_script, say


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--cases", type=positive_int, default=10_000, help="how many files")
    add("--seed", type=natural, default=0, help="the same seed makes the same files")
    add("--format", help="only this format (default: all)")
    add("--case", type=natural, help="only this case of --format, shown")
    add("--keep", type=Path, help="directory for the files of --case, or of every fault")
    add("--output", type=Path, help="JSON file for the counts")
    add("--overwrite", action="store_true", help="replace --output")
    return parser


def run(args: argparse.Namespace) -> dict:
    """Run the cases and print a table. Returns the counts."""
    if args.case is not None and not args.format:
        raise ValueError("--case needs --format: cases are numbered within a format")
    import torch

    from src.common.cli import quiet_libraries
    from src.common.files import check_outputs
    from tests.stress import fuzzing

    check_outputs(args.output, overwrite=args.overwrite)

    torch.set_num_threads(1)  # threads do not survive a fork
    quiet_libraries()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-valid-") as folder:
        formats = fuzzing.build_formats(Path(folder))
    if args.format and args.format not in formats:
        raise ValueError(f"--format must be one of {', '.join(formats)}, got {args.format!r}")
    if args.format:
        formats = {args.format: formats[args.format]}
    cases = fuzzing.planned_cases(formats, args.cases)
    if args.case is not None:
        cases = [(args.format, args.case)]
    tallies = {name: fuzzing.Tally() for name in formats}

    ends = fuzzing.run_cases(formats, cases, args.seed)
    for name, case, kind, detail in progress(ends, len(cases), "fuzzing", "cases"):
        tallies[name].add(name, case, kind, detail)
        shown = kind not in fuzzing.RIGHT_ENDS or args.case is not None
        if shown:
            say(f"{name}, case {case}: {kind}: {detail}")
        if shown and args.keep:
            folder = args.keep / f"{name}-{case}".replace(" ", "-")
            fuzzing.write_files(folder, fuzzing.spoiled_case(formats, name, args.seed, case))
    say(f"{'format':<20}{'cases':>8}{'read':>8}{'refused':>9}{'faults':>8}")
    for name, tally in tallies.items():
        counts = f"{tally.cases:>8,}{tally.read:>8,}{tally.refused:>9,}{len(tally.faults):>8,}"
        say(f"{name:<20}{counts}")
    seconds = time.monotonic() - started
    say(f"in {duration(seconds)}, at most {fuzzing.SECONDS} s of the processor and 3 GiB a case")
    record = fuzzing.record(tallies, args.seed, seconds)
    if args.output:
        write_record(args.output, record)
    say(f"cases {record['cases']}, faults {record['faults']}")
    if record["faults"]:
        raise SystemExit(1)
    return record


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write the counts with what made them."""
    from src.common.files import write_json
    from src.common.runs import provenance

    write_json(path, {**record, "run": provenance()})


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

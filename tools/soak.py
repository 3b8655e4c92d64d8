#!/usr/bin/env python3
"""Train and evaluate over and over in one process, and see whether it grows.

After each cycle memory, file handles, threads, child processes and disk are sampled into a file
beside the record (.jsonl), one line a cycle. The record (JSON) is written anew every two minutes,
so that a soak that is cut short leaves what it saw; its figure (PNG) is drawn at the end, or from
such a record by --draw. The exit status is 1 where something grew above its bound, a cycle failed,
or cycles of one kind did not end alike.

Examples:
  python tools/soak.py --minutes 120 --record results/reliability/soak.json
  python tools/soak.py --draw --record results/reliability/soak.json
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

from src.common.cli import HelpFormatter, positive_float, run_script, say
from src.common.settings import BUNDLED_DATA, BUNDLED_TEACHER


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--minutes", type=positive_float, default=120.0, help="how long")
    add("--record", type=Path, required=True, help="JSON file for what is found")
    add("--teacher_model", default=BUNDLED_TEACHER, help="directory")
    add("--data", default=BUNDLED_DATA, help="proteins with train and test parts")
    add("--work_dir", type=Path, help="where runs are made (default: the system's temporary)")
    add("--draw", action="store_true", help="only draw the figure of an existing record")
    add("--overwrite", action="store_true", help="replace the record and its samples")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Soak, and write record, samples and figure. Exits with 1 where something is wrong."""
    from src.common.files import check_outputs
    from tests.stress import soaking

    if args.draw:
        soaking.draw(args.record)
        say(f"written: {args.record.with_suffix('.png')}")
        return {}
    outputs = [args.record.with_suffix(ending) for ending in (".json", ".jsonl", ".png")]
    check_outputs(*outputs, overwrite=args.overwrite)
    from src.common.runs import provenance

    for path in outputs:
        path.unlink(missing_ok=True)
    recorder = soaking.Recorder(args.record, args.minutes, provenance())
    with tempfile.TemporaryDirectory(prefix="soak-", dir=args.work_dir) as folder:
        work = Path(folder)
        ended = soaking.soak(
            soaking.Cycles(work, args.teacher_model, args.data),
            60 * args.minutes,
            lambda: soaking.holdings(work),
            recorder.keep,
        )
    record = recorder.write(ended)
    soaking.draw(args.record)
    for name, found in record["quantities"].items():
        quantity = soaking.QUANTITIES[name]
        low, high = found["growth_interval"]
        say(
            f"{quantity.label:<26}{found['first']:10.2f} → {found['last']:10.2f} {quantity.unit:<3}"
            f" growth {found['growth']:8.3f} ({low:.3f} to {high:.3f}, bound {found['bound']:g})"
        )
    for name in record["creeps"]:
        say(f"rises steadily, below its bound: {soaking.QUANTITIES[name].label}")
    if ended:
        say(f"ended early: {ended}")
    grew = ", ".join([*record["grows"], *record["unlike"]]) or "nothing"
    say(f"{record['cycles']} cycles in {record['minutes']:.1f} minutes, grew or differed: {grew}")
    if record["passed"] is False or ended not in (None, soaking.ASKED_TO_STOP):
        raise SystemExit(1)
    return record


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

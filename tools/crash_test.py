#!/usr/bin/env python3
"""Kill runs of the scripts with SIGKILL, resume them, compare with undisturbed runs, bit by bit.

A run is killed at random moments and at named points of its saves (``src/common/crash_points.py``), some
times over, resumed with --resume each time, and at last left to finish. Then every file that a
run leaves, apart from times, must equal that of an undisturbed run. With --stops, runs are also
asked to stop by SIGTERM and SIGINT, and have to leave with 143 or 130 within 30 seconds. The last
line printed is ``kills N, differing bytes M``; the exit status is 1 where M is not 0.

Examples:
  python tools/crash_test.py --kills 2 --seed 0
  python tools/crash_test.py --kills 1000 --seed 1 --record results/reliability/crash_test.json
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Before PyTorch is imported. One thread: forked processes are whole, and sums have one order.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

from src.common.cli import HelpFormatter, natural, positive_int, run_script, say


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Kill, resume, compare, and record. Exits with 1 where anything differs."""
    from src.common.files import check_outputs, write_json
    from tests.stress.crash_testing import Failed, session

    check_outputs(args.record, overwrite=True)
    read_sessions(args.record)
    work = Path(tempfile.mkdtemp(prefix="crash-test-", dir=args.work_dir))
    try:
        record = session(work, args.kills, args.stops, args.seed, args.only, args.jobs)
    except Failed as error:
        say(str(error))
        say(f"kept for a look: {work}")
        raise SystemExit(1) from None
    if record["differences"]:
        for name, number in sorted(record["differences"].items()):
            say(f"differs: {name}, {number:,} bytes")
        say(f"kept for a look: {work}")
    else:
        shutil.rmtree(work)
    for place, number in record["places"].items():
        say(f"  {number:6,}  {place}")
    if args.record:
        # Read again: another session may have ended while this one ran.
        sessions = [*read_sessions(args.record), record]
        write_json(args.record, {"schema_version": 1, "sessions": sessions})
    say(f"kills {record['kills']}, differing bytes {record['differing_bytes']}")
    if record["differing_bytes"]:
        raise SystemExit(1)
    return record


def read_sessions(path: Path | None) -> list[dict[str, Any]]:
    """Return the sessions of a record. Raises ``ValueError`` where a file is there and is none."""
    from src.common.files import read_json
    from src.evaluation.results import check_figures

    if path is None or not path.exists():
        return []
    record = read_json(path)
    way_out = "choose another --record"
    check_figures(record, {"sessions": "objects"}, path, needed=True, way_out=way_out)
    return record["sessions"]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--kills", type=positive_int, default=20, help="how many runs are killed")
    add("--stops", type=natural, default=0, help="how many are asked to stop (SIGTERM, SIGINT)")
    add("--seed", type=natural, default=0, help="of the choice of moments, points and scenarios")
    add("--only", default="", help="scenarios whose name contains this")
    add("--jobs", type=positive_int, default=os.cpu_count(), help="runs at a time")
    add("--record", type=Path, help="JSON file to which the session is appended")
    add("--work_dir", type=Path, help="where runs are made (default: the system's temporary)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Time this project beside the plain way, TRL and Liger on this machine, and write the ratios.

A ratio is the time or memory of the other way divided by ours: 2 means that ours takes half. The
machine should be idle otherwise. docs/PERFORMANCE.md explains each ratio.

Examples:
  python tools/benchmark/run.py              # everything: about a quarter of an hour
  python tools/benchmark/run.py --only loss,evaluation --output /tmp/loss.json
  python tools/benchmark/run.py --quick --output /tmp/quick.json
  python tools/benchmark/run.py --tables docs/PERFORMANCE.md   # from results/benchmark_*.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from src.common import settings as s
from src.common.cli import HelpFormatter, folder, positive_int, run_script, say
from src.common.files import check_outputs
from tools.benchmark.report import SECTIONS, fill_page


def sections(text: str) -> list[str]:
    """Argparse type: names of sections, separated by commas."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    wrong = [name for name in names if name not in SECTIONS]
    if wrong or not names:
        raise argparse.ArgumentTypeError(f"must be some of {','.join(SECTIONS)}, got {text!r}")
    return list(dict.fromkeys(names))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument_group("what to measure").add_argument
    add("--only", type=sections, metavar="A,B", help=f"some of {','.join(SECTIONS)} (default: all)")
    add("--quick", action="store_true", help="tiny shapes: whether it runs, not how fast")
    add("--rounds", type=positive_int, help="timed rounds of every section (default: 2 to 20)")
    add("--data", default=s.BUNDLED_DATA, help="real proteins: a directory of parts or a file")
    add("--teacher_model", default=s.BUNDLED_TEACHER, help="small teacher: its tokenizer is used")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--threads", type=positive_int, help="threads of a CPU (default: PyTorch's choice)")
    add("--cache_dir", type=folder, help="where tokenised proteins are kept")

    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, help="results, JSON (default: results/benchmark_<device>.json)")
    add("--overwrite", action="store_true", help="replace the results")
    add(
        "--tables",
        type=Path,
        metavar="FILE",
        help="measure nothing: write the tables of the results into this page",
    )
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and write the results, or write the tables of a page. Returns the results."""
    if args.tables:
        pages = [args.output] if args.output else sorted(Path("results").glob("benchmark_*.json"))
        fill_page(args.tables, pages)
        say(f"written: {args.tables}")
        return {}
    import torch

    from src.common.devices import choose_device

    device = choose_device(args.device)
    output = args.output or Path("results") / f"benchmark_{device.type}.json"
    check_outputs(output, overwrite=args.overwrite)
    if args.threads:
        torch.set_num_threads(args.threads)

    from src.common.cli import quiet_libraries
    from src.common.files import write_json
    from src.common.runs import provenance
    from tools.benchmark.sections import run_benchmark
    from tools.benchmark.workbench import open_workbench

    quiet_libraries()
    record = provenance()
    bench = open_workbench(
        device, args.data, args.teacher_model, args.quick, args.rounds, args.cache_dir
    )
    results = run_benchmark(bench, args.only or SECTIONS) | {"run": record}
    write_json(output, results)
    say(f"written: {output}")
    return results


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

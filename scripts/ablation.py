#!/usr/bin/env python3
"""Run a declared grid of trainings against one teacher, and measure every cell.

The cells of a group share the initial student, the data order and the teacher. A grid that was
stopped goes on where it was when the same command is given again; several processes may run it at
once. --list shows the grids. To choose T or alpha for one preset with its own data and teacher, and
have the best named, run scripts/pipeline.py --sweep.

Examples:
  python scripts/ablation.py --list
  python scripts/ablation.py --grid owner --results results --work models/owner
  python scripts/ablation.py --grid synergy-tuning --results results/synergy
  python scripts/ablation.py --grid synergy-tuning --results results/synergy --choose
  python scripts/ablation.py --grid synergy --results results/synergy
  python scripts/ablation.py --grid temperature
  python scripts/ablation.py --grid temperature --choose
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common.cli import HelpFormatter, folder, positive_int, run_script, say, share
from src.common.settings import PRESETS
from src.experiments.grids import GRIDS, RATES_FILE


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument_group("what to run").add_argument
    add("--grid", choices=sorted(GRIDS), help="which grid")
    add("--list", action="store_true", help="show the grids and stop")
    add("--status", action="store_true", help="show what is done and stop")
    add("--choose", action="store_true", help="write the best rates and arm of a finished grid")
    add("--seeds", type=int, nargs="+", help="these instead of the grid's own")
    add("--sizes", nargs="+", help="these sizes: of the grid, or presets of train.py")
    add("--arms", nargs="+", help="only these of the grid's arms")
    add("--rates", type=float, nargs="+", help="these learning rates instead of the grid's own")
    add("--teacher_model", help="(default: the bundled teacher)")
    add("--data", help="(default: the bundled proteins)")
    add("--train_size_prop", type=share, help="share of the training proteins (default: all)")
    add("--max_steps", type=positive_int, help="of every cell (default: the grid's)")

    add = parser.add_argument_group("where").add_argument
    add("--results", type=Path, help="directory of results (default: results/<grid>)")
    add("--work", type=Path, help="directory of checkpoints (default: models/<grid>)")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--cache_dir", type=folder, help="where tokenised proteins are kept")
    add("--threads", type=positive_int, help="CPU threads (default: PyTorch's choice)")
    return parser


def run(args: argparse.Namespace) -> dict:
    """Run the grid, or show what there is. Returns counts, choices or names."""
    if args.list:
        for grid in GRIDS.values():
            cells = len(grid.arms) * len(grid.sizes) * len(grid.seeds)
            cells *= 1 if grid.tuned else len(grid.rates)
            say(f"{grid.name:<16} {cells:>4} cells  {grid.purpose}")
        return {"grids": sorted(GRIDS)}
    if not args.grid:
        raise ValueError("pass --grid NAME, or --list to see the grids")
    grid = chosen(args)
    results = args.results or Path("results") / grid.name
    work = args.work or Path("models") / grid.name

    from src.common.files import write_json
    from src.experiments.ablation import GridRun, tuned_rates

    if args.choose:
        record = tuned_rates(results, grid)
        write_json(results / RATES_FILE, record)
        for size, arm in record["best_arm"].items():
            say(f"best on validation at {size}: {arm}")
        for edge in record["at_edge"]:
            say(f"at an end of the range: {edge}")
        say(f"written: {results / RATES_FILE}")
        return record
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    job = GridRun(grid, results, work, device=args.device, cache_dir=args.cache_dir)
    if args.status:
        for line in job.status_lines():
            say(line)
        return {"cells": len(job.cells)}
    done = job.run()
    say(f"{done['done']} of {done['cells']} cells in {results}")
    return done


def chosen(args: argparse.Namespace):
    """Return the grid with what the arguments change of it."""
    grid = GRIDS[args.grid]
    presets = {name: preset.student for name, preset in PRESETS.items()}
    for name, there in (("sizes", {**grid.sizes, **presets}), ("arms", grid.arms)):
        wanted = getattr(args, name)
        if wanted:
            unknown = [each for each in wanted if each not in there]
            if unknown:
                raise ValueError(
                    f"--{name} {unknown[0]}: the grid {grid.name} has {', '.join(there)}"
                )
            grid = replace(grid, **{name: {each: there[each] for each in wanted}})
    names = ("teacher_model", "data", "train_size_prop", "max_steps")
    shared = {k: v for k in names if (v := getattr(args, k)) is not None}
    if args.teacher_model and grid.shared.init_from == grid.shared.teacher_model:
        shared["init_from"] = args.teacher_model
    grid = replace(grid, shared=replace(grid.shared, **shared))
    if args.rates and grid.tuned:
        raise ValueError(f"--rates: the grid {grid.name} reads each arm's rate from --results")
    for name in ("seeds", "rates"):
        if getattr(args, name):
            grid = replace(grid, **{name: tuple(getattr(args, name))})
    return grid


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

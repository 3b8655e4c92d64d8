#!/usr/bin/env python3
"""Train every cell of a grid of experiments against one teacher, and measure it.

The cells of a group share the initial weights, the data order and the teacher, and are trained
together. The same command resumes a stopped grid, which several processes may run at once. --list
shows the grids. With flags of train.py after --, the grids temperature, alpha and smoothing sweep
one setting around that run, at its seed and learning rate; scripts/pipeline.py --sweep does this
and names the best value.

Examples:
  python scripts/ablation.py --list
  python scripts/ablation.py --grid owner --results results --work models/owner
  python scripts/ablation.py --grid synergy-tuning --results results/synergy
  python scripts/ablation.py --grid synergy-tuning --results results/synergy --choose
  python scripts/ablation.py --grid synergy --results results/synergy
  python scripts/ablation.py --grid temperature
  python scripts/ablation.py --grid temperature --choose
  python scripts/ablation.py --grid alpha --values 0.1 0.5 --max_proteins 5000 -- --preset tiny
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common.cli import (
    LAYOUT_HELP,
    HelpFormatter,
    add_data_flags,
    folder,
    positive_int,
    run_script,
    say,
    share,
)
from src.common.settings import PRESETS
from src.experiments.grids import GRIDS, RATES_FILE, SWEPT, Grid, sweep_of_run

RUN_FLAGS = (
    "output_dir", "resume", "report_to", "device", "cache_dir", "teacher_cache", "shard_teacher",
    "num_workers", "compile", "dry_run",
)  # fmt: skip
"""Flags of scripts/train.py that say how one run is done, not what is trained."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("train_args", nargs="*", metavar="-- ...", help="a run to sweep around")
    add = parser.add_argument_group("what to run").add_argument
    add("--grid", choices=sorted(GRIDS), help="which grid")
    add("--list", action="store_true", help="show the grids and stop")
    add("--status", action="store_true", help="show how many cells are done and stop")
    add("--choose", action="store_true", help="write the best rates and arm of a finished grid")
    add("--pack", action="store_true", help="put the files of all finished cells into two")
    add("--seeds", type=int, nargs="+", help="seeds instead of the grid's own")
    add("--sizes", nargs="+", help="sizes: of the grid, or presets of train.py")
    add("--arms", nargs="+", help="only these of the grid's arms")
    add("--rates", type=float, nargs="+", help="learning rates instead of the grid's own")
    add("--values", type=float, nargs="+", help="of a sweep around a run, instead of the usual")
    add("--teacher_model", help="(default: the bundled teacher)")
    add_data_flags(add, "(default: the bundled proteins)")
    add("--layout", help=LAYOUT_HELP)
    add("--train_size_prop", type=share, help="share of the training proteins (default: all)")
    add("--max_steps", type=positive_int, help="of every cell (default: the grid's)")
    add("--batch_size", type=positive_int, help="proteins of a step (default: the grid's)")
    add("--max_proteins", type=positive_int, help="measure on the first so many (default: all)")

    add = parser.add_argument_group("where").add_argument
    add("--results", type=Path, help="directory of results (default: results/GRID)")
    add("--work", type=Path, help="directory of checkpoints (default: models/GRID)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--cache_dir", type=folder, help="where tokenised proteins are kept")
    add("--threads", type=positive_int, help="CPU threads (default: PyTorch's choice)")
    return parser


def run(args: argparse.Namespace) -> dict:
    """Run the grid, or show it, or choose from it. Returns counts, choices or names."""
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

    from src.experiments.ablation import GridRun
    from src.experiments.cells import CELLS, PROTEINS

    if args.choose:
        return choose(results, grid)
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    job = GridRun(
        grid,
        results,
        work,
        device=args.device,
        cache_dir=args.cache_dir,
        max_proteins=args.max_proteins,
    )
    if args.status:
        for line in job.status_lines():
            say(line)
        return {"cells": len(job.cells)}
    if args.pack:
        packed = job.pack()
        say(f"{packed} cells packed into {results / CELLS} and {results / PROTEINS}")
        return {"packed": packed}
    done = job.run()
    say(f"{done['done']} of {done['cells']} cells in {results}")
    return done


def choose(results: Path, grid: Grid) -> dict:
    """Write and print the best learning rates and arms of a finished grid."""
    from src.common.files import write_json
    from src.experiments.ablation import tuned_rates

    record = tuned_rates(results, grid)
    write_json(results / RATES_FILE, record)
    say(f"written: {results / RATES_FILE}")
    for size, arms in record["nats_per_residue"].items():
        for arm, by_rate in arms.items():
            say(f"{size} {arm}: {min(by_rate.values()):.4f} nats per residue on validation")
    for edge in record["at_edge"]:
        say(f"at an end of the range: {edge}")
    for size, arm in record["best_arm"].items():
        say(f"best on validation at {size}: {arm}")
    return record


def chosen(args: argparse.Namespace) -> Grid:
    """Return the grid with the changes that the arguments ask for."""
    grid = sweep_around(args) if args.train_args else GRIDS[args.grid]
    if args.values and not args.train_args:
        raise ValueError("--values: needs the flags of a run after --, such as -- --preset tiny")
    presets = {name: preset.student for name, preset in PRESETS.items()}
    for name, known in (("sizes", {**grid.sizes, **presets}), ("arms", grid.arms)):
        wanted = getattr(args, name)
        if wanted:
            unknown = [key for key in wanted if key not in known]
            if unknown:
                raise ValueError(
                    f"--{name} {unknown[0]}: the grid {grid.name} has {', '.join(known)}"
                )
            grid = replace(grid, **{name: {key: known[key] for key in wanted}})
    names = (
        "teacher_model", "data", "sequence_column", "layout", "train_size_prop", "max_steps",
        "batch_size",
    )  # fmt: skip
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


def sweep_around(args: argparse.Namespace) -> Grid:
    """Return the sweep of a setting around the run whose flags stand after ``--``."""
    from scripts import train

    if args.grid not in SWEPT:
        raise ValueError(f"flags after --: only with --grid {', '.join(SWEPT)}")
    parser = train.with_recipe(train.build_parser(), args.train_args)
    parsed = parse_for(parser, args.train_args, "scripts/train.py")
    swept = SWEPT[args.grid][0]
    for name in (*RUN_FLAGS, swept):
        if getattr(parsed, name) != parser.get_default(name):
            raise ValueError(f"--{name} after --: does not apply to a sweep of {swept}")
    size = parsed.preset or "student"
    return sweep_of_run(args.grid, train.build_settings(parsed), size, args.values or ())


def parse_for(
    parser: argparse.ArgumentParser, argv: Sequence[str], script: str
) -> argparse.Namespace:
    """Parse another script's flags. Raises ``ValueError`` where that script would refuse them."""

    def refuse(message: str) -> None:
        raise ValueError(f"{script} would refuse its arguments: {message}")

    parser.error = refuse  # type: ignore[assignment,method-assign]
    return parser.parse_args(list(argv))


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

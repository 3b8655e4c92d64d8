#!/usr/bin/env python3
r"""Run the experiment on specialists (docs/EXPERIMENT.md): families, members, draws, starts.

Each cell leaves a file in RESULTS/cells, and all of them one table, specialists.parquet, which is
enough to go on with a stopped run; several processes may share one. First --tune, then --choose,
then neither, then --analyse.

Example:
  python tools/family_experiment.py --start teacher=data/small_teacher \
      --start student27=models/student27 --random_start random27=models/student27 \
      --specialist specialist=data/small_teacher:4,4,128 --results results/specialists --dry_run
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common.cli import HelpFormatter, positive_int, run_script, say


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    many = {"action": "append", "default": [], "metavar": "NAME=MODEL"}
    add("--start", **many, help="adapt this model; may be given several times, as the next two")
    add("--random_start", **many, help="train its class and shape from random weights")
    add(
        "--specialist",
        action="append",
        default=[],
        metavar="NAME=MODEL:L,H,E",
        help="adapt a --start and distil a GPT-2 of this shape from it",
    )
    data = Path("data/proteins")
    add("--families", type=Path, default=data / "test_new.fasta.gz", help="FASTA with family=NAME")
    add("--profiles", type=Path, default=data / "families.hmm.gz", help="HMM file")
    add("--table", type=Path, default=data / "families.tsv", help="whose profile is which")
    add("--related", type=Path, help="table whose first column names members to leave out")
    add("--members", type=positive_int, nargs="+", default=[10, 30, 100], help="in training")
    add("--draws", type=positive_int, default=2, help="of the members")
    add("--results", type=Path, required=True, help="directory of cells, rates and table")
    add("--work", type=Path, default=Path("models/specialists"), help="data and models in work")
    add("--device", default="cpu", help="auto, cpu or cuda")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--tune", action="store_true", help="run the cells of the tuning")
    mode.add_argument("--choose", action="store_true", help="choose the learning rates, once")
    mode.add_argument("--analyse", action="store_true", help="answer from what is finished")
    add("--dry_run", action="store_true", help="list the open cells and the hours, and stop")
    return parser


def starts(args: argparse.Namespace) -> tuple:
    """Return the starting points that the flags name.

    Raises:
        ValueError: a flag has another form, a name is there twice, or a specialist's model is no
            --start.
    """
    from src.common.settings import StudentSettings
    from src.experiments.family_grid import PROFILE, Start

    found = []
    for flag in ("start", "random_start", "specialist"):
        for text in getattr(args, flag):
            name, _, model = text.partition("=")
            shape = None
            if flag == "specialist":
                model, _, numbers = model.rpartition(":")
                try:
                    n_layer, n_head, n_embd = map(int, numbers.split(","))
                    shape = StudentSettings(n_layer, n_head, n_embd)
                except ValueError:
                    raise ValueError(f"--{flag} {text!r}: give NAME=MODEL:L,H,E") from None
                if model not in {start.model for start in found if not start.random}:
                    raise ValueError(f"--{flag} {text!r}: its model must be a --start, too")
            if not name or not model:
                raise ValueError(f"--{flag} {text!r}: give NAME=MODEL")
            if name in {PROFILE, *(start.name for start in found)}:
                raise ValueError(f"--{flag} {text!r}: the name {name} is taken")
            found.append(Start(name, model, flag == "random_start", shape))
    if not found:
        raise ValueError("no starting point: give --start NAME=MODEL")
    return tuple(found)


def run(args: argparse.Namespace) -> dict:
    """Run, choose or plan. Returns the number of rows of the table, or the rates."""
    from src.common.cli import quiet_libraries
    from src.experiments.family_grid import FamilyGrid

    if args.analyse:
        return show_analysis(args)
    quiet_libraries()
    names = ("families", "profiles", "table", "related", "results", "work", "draws", "device")
    grid = FamilyGrid(
        **{name: getattr(args, name) for name in names},
        members=tuple(args.members),
        starts=starts(args),
    )
    if args.choose:
        return grid.choose()
    cells = grid.cells(args.tune)
    _ = grid.profile_keys  # a missing one is told now
    for line in grid.plan(cells):
        say(line)
    if args.dry_run:
        return {"cells": len(cells)}
    grid.run(cells)
    while args.tune and (further := grid.cells(args.tune)) != cells:
        grid.run(cells := further)
    rows = grid.write_table()
    say(f"{len(rows):,} cells in {args.results}")
    return {"rows": len(rows)}


def show_analysis(args: argparse.Namespace) -> dict:
    """Print the answers, write them beside the table and return them."""
    from src.common.files import write_json, write_text
    from src.experiments.charts import families_figure
    from src.experiments.family_analysis import analyse, analysis_lines, points
    from src.experiments.family_grid import TABLE, read_rows
    from src.publishing.plots import save_figure

    rows = read_rows(args.results / TABLE)
    analysis = analyse(rows, args.members)
    lines = analysis_lines(analysis)
    write_json(args.results / "analysis.json", analysis)
    write_text(args.results / "analysis.md", "\n".join(lines) + "\n")
    for line in lines:
        say(line)
    figure = families_figure(points(rows, args.members), "training members")
    save_figure(figure, args.results / "specialists.png")
    say(f"written: {args.results / 'analysis.md'}, analysis.json, specialists.png")
    return analysis


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

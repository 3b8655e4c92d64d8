#!/usr/bin/env python3
r"""Train students by several recipes and say what each is worth for how much compute.

Learning rates are chosen first, in short runs, on validation proteins. Each run leaves a
file in RESULTS with its curve of KL divergence against steps and seconds; students stay in WORK.
The same command goes on with a stopped experiment, and draws KL against seconds.
scripts/evaluate.py measures students on test.

Example:
  python tools/student_experiment.py --steps 3000 --sizes s27 --recipes published recommended \
      --results results/students
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common import settings as s
from src.common.cli import HelpFormatter, positive_float, positive_int, run_script, say


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add(
        "--recipes",
        nargs="+",
        default=["published", "plain", "cut", "small", "recommended"],
        help="published, plain, cut, small, recommended, cached (batches of 4)",
    )
    add(
        "--sizes",
        nargs="+",
        default=["s27", "s11"],
        help="s27, s11, s05: percent of the bundled teacher; deep11: 11 with three layers; "
        "or layers, heads and width, such as 3x4x88",
    )
    add("--steps", type=positive_int, required=True, help="of 16 proteins; four times as many of 4")
    add(
        "--tuning_steps",
        type=positive_int,
        help="steps of the runs that choose rates (default: a tenth of --steps)",
    )
    add("--learning_rate", type=positive_float, help="of all runs (default: chosen by short runs)")
    add("--seeds", type=positive_int, nargs="+", default=[1], help="of weights and data order")
    add("--teacher_model", default=s.BUNDLED_TEACHER, help="directory")
    add("--init_from", help="what students are cut from (default: the teacher)")
    add("--data", default=s.BUNDLED_DATA, help="directory of parts")
    add("--precision", choices=s.PRECISIONS, default="auto", help="bf16 on a GPU, else fp32")
    add("--results", type=Path, required=True, help="directory of a file for each run")
    add("--work", type=Path, default=Path("models/students"), help="students and checkpoints")
    add("--summary", action="store_true", help="train nothing: compare what is there")
    return parser


def run(args: argparse.Namespace) -> dict:
    """Tune, train and compare. Returns the runs by recipe, size and seed."""
    from src.experiments.grids import shape_named
    from src.experiments.students import COMPARED, Students

    if wrong := sorted(set(args.recipes) - set(COMPARED)):
        raise ValueError(f"--recipes: must be some of {', '.join(COMPARED)}, got {wrong[0]!r}")
    base = s.TrainSettings(
        data=args.data, teacher_model=args.teacher_model, init_from=args.init_from,
        train_size_prop=1.0, batch_size=16, precision=args.precision, validation_proteins=1,
    )  # fmt: skip
    shapes = {name: shape_named(name) for name in args.sizes}
    experiment = Students(base, shapes, COMPARED, args.results, args.work, args.summary)
    runs = {}
    for size in args.sizes:
        for recipe in args.recipes:
            tuning = args.tuning_steps or max(1, args.steps // 10)
            rate = args.learning_rate or experiment.tuned(recipe, size, tuning)
            for seed in args.seeds:
                runs[recipe, size, seed] = experiment.run(recipe, size, rate, args.steps, seed)
    show(args, runs)
    draw(args, runs)
    return {"-".join(map(str, key)): result for key, result in runs.items()}


def show(args: argparse.Namespace, runs: dict) -> None:
    """Print each run's end, and what it took to reach the quality of the first recipe's end."""
    from src.experiments.students import compute_ratios

    first = args.recipes[0]
    say(f"\n{'recipe':<14}{'size':<6}{'seed':>5}{'rate':>9}{'KL':>9}{'NLL':>9}{'seconds':>9}"
        f"  compute of '{first}' to its end / to the same KL")  # fmt: skip
    for (recipe, size, seed), result in runs.items():
        end = result["curve"][-1]
        ratios = compute_ratios(runs[first, size, seed], result)
        line = "not reached" if ratios is None else (
            f"{ratios['seconds']:.1f} in seconds, {ratios['operations']:.1f} in operations"
        )  # fmt: skip
        say(f"{recipe:<14}{size:<6}{seed:>5}{result['rate']:>9.2g}{end['kl_per_residue']:>9.4f}"
            f"{end['nats_per_residue']:>9.4f}{end['seconds']:>9.0f}  {line}")  # fmt: skip


def draw(args: argparse.Namespace, runs: dict) -> None:
    """Draw KL against seconds for every run."""
    from src.experiments.charts import compute_figure
    from src.publishing.plots import save_figure

    panels: dict = {size: {recipe: [] for recipe in args.recipes} for size in args.sizes}
    for (recipe, size, _), result in runs.items():
        panels[size][recipe].append(result["curve"])
    path = args.results / f"compute_{args.steps}.png"
    save_figure(compute_figure(panels), path)
    say(f"written: {path}")


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

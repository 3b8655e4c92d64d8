#!/usr/bin/env python3
r"""Train and evaluate presets one after another, unattended, and go on where it stopped.

Arguments after -- go to every training as they are. Started again, the same command skips what is
finished and resumes what was cut off. logs/pipeline-NAME/pipeline.status tells what happened.
Evaluations have --num_samples 100 --compute_ece, and --max_proteins 5000 where the data is on a
hub, unless --evaluate_args says otherwise; a sweep is judged on validation proteins. It trains one
value after another with any teacher; scripts/ablation.py --grid temperature trains all values at
once, and two seeds, against the bundled teacher or --teacher_model.

Examples:
  bash scripts/pipeline.sh
  bash scripts/pipeline.sh --references --on_success 'sudo shutdown -h now'
  bash scripts/pipeline.sh --baselines
  bash scripts/pipeline.sh --sweep temperature
  bash scripts/pipeline.sh --sweep alpha -- --temperature 4.0
  bash scripts/pipeline.sh --presets xs tiny --teacher_model data/small_teacher \
      --data data/proteins -- --max_steps 200 --batch_size 8
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import evaluate, train
from src.common.cli import HelpFormatter, folder, run_script, say

HUB_PROTEINS = 5000
"""Proteins of a hub data set's held-out part that are evaluated: it may have millions."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("train_args", nargs="*", metavar="-- ...", help="flags of train.py, if any")
    add = parser.add_argument_group("what to run").add_argument
    add("--presets", nargs="+", metavar="PRESET", help="(default: hf-tiny hf-small hf-medium)")
    add("--name", help="models/NAME-tiny, results/eval_NAME_tiny.json (default: synergy)")
    add("--baselines", action="store_true", help="xs tiny small medium, without enhancements")
    add("--sweep", choices=("temperature", "alpha"), help="train at each value, choose the best")
    add("--values", nargs="+", type=float, help="instead of 1 2 4 6 8 10, or 0.1 to 0.9")
    add(
        "--enhancements",
        choices=("both", "uncertainty", "calibration", "none"),
        help="(default: both; none with --baselines)",
    )
    add("--references", action="store_true", help="evaluate the published students too; needs hub")

    add = parser.add_argument_group("for all stages").add_argument
    add("--teacher_model", help="directory or hub id of the teacher")
    add("--data", help="proteins")
    add("--device", help="auto, cpu or cuda")
    add("--cache_dir", type=folder, help="where tokenised proteins are kept")
    add("--evaluate_args", default="", metavar="'...'", help="flags of scripts/evaluate.py")
    add("--models_dir", type=Path, default=Path("models"), help="where the students go")
    add("--results_dir", type=Path, default=Path("results"), help="where the results go")
    add("--overwrite", action="store_true", help="replace results of something else; never models")

    add = parser.add_argument_group("how").add_argument
    add("--log_dir", type=Path, help="log, state and status (default: logs/pipeline-NAME)")
    add("--on_success", metavar="CMD", help="shell command after all stages succeeded")
    add("--on_exit", metavar="CMD", help="the same after success or failure, not after Ctrl-C")
    add("--dry_run", action="store_true", help="print the stages and where they stand, and stop")
    return parser


def train_settings(argv: Any) -> Any:
    """Return the settings that scripts/train.py would read."""
    return train.build_settings(parse(train.build_parser(), argv, "scripts/train.py"))


def evaluate_arguments(argv: Any) -> dict[str, Any]:
    """Return the arguments that scripts/evaluate.py would record."""
    return evaluate.recorded(parse(evaluate.build_parser(), argv, "scripts/evaluate.py"))


def parse(parser: argparse.ArgumentParser, argv: Any, name: str) -> argparse.Namespace:
    """Parse another script's arguments; what is wrong with them is this script's user's error."""

    def refuse(message: str) -> None:
        raise ValueError(f"{name} would refuse its arguments: {message}")

    parser.error = refuse  # type: ignore[assignment,method-assign]
    return parser.parse_args(list(argv))


def refuse_reserved(args: argparse.Namespace, evaluate_args: list[str]) -> None:
    """Stop where the user sets what the pipeline sets. Raises ``ValueError``."""
    given = parse(train.build_parser(), args.train_args, "scripts/train.py")
    for name in ("preset", "output_dir", "dry_run", *([args.sweep] if args.sweep else [])):
        if getattr(given, name) != train.build_parser().get_default(name):
            raise ValueError(f"--{name} after --: the pipeline sets it itself (see --help)")
    needed = ["--student_model", "", "--output", "results"]
    given = parse(evaluate.build_parser(), [*needed, *evaluate_args], "scripts/evaluate.py")
    own = {"student_model": "", "output": Path("results"), "per_protein": None, "overwrite": False}
    for name, value in (own | ({"split": None} if args.sweep else {})).items():
        if getattr(given, name) != value:
            raise ValueError(f"--evaluate_args --{name}: the pipeline sets it itself (see --help)")


def build_plan(args: argparse.Namespace) -> Any:
    """Return the stages that the arguments ask for. Raises ``ValueError``."""
    from src.experiments import pipeline as p

    if args.sweep and (args.baselines or args.references):
        raise ValueError("--sweep: without --baselines and --references")
    if args.values and not args.sweep:
        raise ValueError("--values: only with --sweep")
    evaluate_args = shlex.split(args.evaluate_args)
    refuse_reserved(args, evaluate_args)
    defaults = ["--compute_ece"] if args.sweep else ["--num_samples", "100", "--compute_ece"]
    both = [x for n in ("device", "cache_dir") if (v := getattr(args, n)) for x in (f"--{n}", v)]
    own = [x for n in ("teacher_model", "data") if (v := getattr(args, n)) for x in (f"--{n}", v)]
    train_args = [*own, *both, *args.train_args]
    if not Path(train_settings(train_args).data).exists():
        defaults += ["--max_proteins", str(HUB_PROTEINS)]
    choices = p.Choices(
        train_args,
        [*defaults, *both, *evaluate_args],
        args.models_dir,
        args.results_dir,
        args.overwrite,
    )
    parsers = p.Parsers(train_settings, evaluate_arguments)
    enhancements = args.enhancements or ("none" if args.baselines else "both")
    if args.sweep:
        presets = args.presets or ["tiny"]
        if len(presets) != 1:
            raise ValueError("--sweep: takes one preset")
        values = args.values or p.SWEEPS[args.sweep]
        return p.sweep_plan(args.sweep, values, presets[0], enhancements, choices, parsers)
    presets = args.presets or (p.BASELINES if args.baselines else p.SYNERGY)
    name = args.name or ("baseline" if args.baselines else "synergy")
    return p.presets_plan(name, presets, enhancements, choices, parsers, args.references)


def run(args: argparse.Namespace) -> dict:
    """Run the stages. Returns nothing of interest; a failure leaves with its exit status."""
    from src.experiments import pipeline as p

    plan = build_plan(args)
    if args.dry_run:
        for number, stage in enumerate(plan.stages, start=1):
            say(f"[{number}/{len(plan.stages)}] {stage.title}: {stage.standing()}")
            say(f"    {shlex.join(p.shown_command(stage.command))}")
        return {}
    folder = args.log_dir or Path("logs") / f"pipeline-{plan.name}"
    status = p.Runner(plan, folder).run(args.on_success, args.on_exit)
    if status:
        raise SystemExit(status)
    return {}


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
r"""Train and evaluate presets one after another, unattended.

The first failure stops it. The same command again skips what is finished and resumes the rest.
logs/pipeline-NAME/pipeline.status says what happened, pipeline.log has all output. Arguments after
-- go to every training. Evaluations have --num_samples 100 --compute_ece, and --max_proteins 5000
where the data is on a hub, unless --evaluate_args says otherwise. --sweep trains one student for
each value, all together (scripts/ablation.py), and chooses the best on validation proteins.

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import ablation, evaluate, train
from src.common.cli import LAYOUT_HELP, HelpFormatter, add_data_flags, folder, run_script, say
from src.common.runs import claim_folder
from src.common.settings import PRESETS, PUBLISHED_STUDENTS, TrainSettings, as_recorded
from src.experiments.pipeline import Pipeline, Stage, evaluation_state, shown_command

SCRIPTS = Path(__file__).resolve().parent
HUB_PROTEINS = "5000"
"""Proteins of a hub data set's held-out part that are evaluated: it may have millions."""
ENHANCED = ("hf-tiny", "hf-small", "hf-medium")
BASELINES = ("xs", "tiny", "small", "medium")
ENHANCEMENTS = ("--use_uncertainty_weighting", "--use_calibration_smoothing")
OWN_TRAIN_FLAGS = ("--preset", "--output_dir", "--dry_run")
OWN_EVALUATE_FLAGS = ("--student_model", "--output", "--per_protein", "--overwrite")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("train_args", nargs="*", metavar="-- ...", help="flags of train.py, if any")
    add = parser.add_argument_group("what to run").add_argument
    add("--presets", nargs="+", metavar="PRESET", help="(default: hf-tiny hf-small hf-medium)")
    add("--name", help="models/NAME-tiny, results/eval_NAME_tiny.json (default: synergy)")
    add(
        "--baselines",
        action="store_true",
        help="without enhancements (default presets: xs tiny small medium)",
    )
    add("--sweep", choices=("temperature", "alpha"), help="train at each value, choose the best")
    add("--values", nargs="+", metavar="VALUE", help="instead of 1 2 4 6 8 10, or 0.1 to 0.9")
    add("--references", action="store_true", help="evaluate the published students too; needs hub")

    add = parser.add_argument_group("for all stages").add_argument
    add("--teacher_model", help="directory or hub id of the teacher")
    add_data_flags(add, "proteins, as for scripts/train.py")
    add("--layout", help=LAYOUT_HELP)
    add("--device", help="auto, cpu, cuda, cuda:N or mps")
    add("--cache_dir", type=folder, help="where tokenised proteins are kept")
    add("--evaluate_args", default="", metavar="'...'", help="flags of scripts/evaluate.py")
    add("--models_dir", type=Path, default=Path("models"), help="where the students go")
    add("--results_dir", type=Path, default=Path("results"), help="where the results go")
    add("--overwrite", action="store_true", help="replace results of other runs; never models")

    add = parser.add_argument_group("how").add_argument
    add("--log_dir", type=Path, help="log and status (default: logs/pipeline-NAME)")
    add("--on_success", metavar="CMD", help="shell command after all stages succeeded")
    add("--dry_run", action="store_true", help="print the stages and their state, and stop")
    return parser


def train_settings(argv: Sequence[str]) -> TrainSettings:
    """Return the settings that scripts/train.py would read. Raises ``ValueError``."""
    parser = train.with_recipe(train.build_parser(), argv)
    return train.build_settings(ablation.parse_for(parser, argv, "scripts/train.py"))


def evaluate_arguments(argv: Sequence[str]) -> dict[str, Any]:
    """Return the arguments that scripts/evaluate.py would record. Raises ``ValueError``."""
    parser = evaluate.build_parser()
    return evaluate.recorded(ablation.parse_for(parser, argv, "scripts/evaluate.py"))


def command(script: str, *arguments: object) -> tuple[str, ...]:
    """Return the command of one of our scripts under this interpreter."""
    return (sys.executable, str(SCRIPTS / script), *map(str, arguments))


def given(args: argparse.Namespace, *names: str) -> list[str]:
    """Return those of the named flags that the user gave, as typed."""
    pairs = [(f"--{name}", getattr(args, name)) for name in names]
    return [word for flag, value in pairs if value for word in (flag, str(value))]


def require_free(words: Sequence[str], own: Sequence[str], where: str) -> None:
    """Raise ``ValueError`` where the user gives a flag that the pipeline sets itself."""
    for word in words:
        if word.partition("=")[0] in own:
            raise ValueError(f"{word} {where}: the pipeline sets it itself (see --help)")


def preset_stages(args: argparse.Namespace, name: str) -> list[Stage]:
    """Return trainings and evaluations of the presets, then of the published students."""
    from src.proteins.locations import has_split, on_hub

    presets = args.presets or (BASELINES if args.baselines else ENHANCED)
    sizes = [preset.removeprefix("hf-") for preset in presets]
    for preset in presets:
        if preset not in PRESETS:
            raise ValueError(f"--presets {preset}: choose among {', '.join(sorted(PRESETS))}")
        if args.references and preset not in PUBLISHED_STUDENTS:
            raise ValueError(f"--references: no published student has the shape of {preset}")
    if len(set(sizes)) < len(sizes):
        raise ValueError("--presets: two of them would be written to the same directory")
    both = given(args, "layout", "device", "cache_dir")
    train_args = [*given(args, "teacher_model", "data", "sequence_column"), *both, *args.train_args]
    settings = train_settings(train_args)
    hub = on_hub(settings.data)
    evaluate_args = ["--num_samples", "100", "--compute_ece"]
    evaluate_args += ["--max_proteins", HUB_PROTEINS] if hub else []
    evaluate_args += [*both, *shlex.split(args.evaluate_args)]
    given_there = evaluate_arguments(["--student_model", "", "--output", "", *evaluate_args])
    own = Path(settings.data).exists() and not (given_there["data"] or given_there["split"])
    if own and not any(has_split(settings.data, part) for part in ("test", "validation")):
        raise ValueError(
            f"--data {settings.data} has no test or validation part to measure students on: "
            "split it with scripts/split_data.py, or pass --evaluate_args '--data FILE'"
        )

    def evaluation(title: str, student: Path | str, output: Path, *more: object) -> Stage:
        words = ["--student_model", student, *more, *evaluate_args, "--output", output]
        words = [str(w) for w in (*words, "--per_protein", output.with_suffix(".parquet"))]
        expected = evaluate_arguments(words)
        return Stage(
            title,
            command("evaluate.py", *words),
            lambda: evaluation_state(output, expected, student, args.overwrite),
            output,
            optional=student in PUBLISHED_STUDENTS.values(),
        )

    def training(preset: str, output: Path) -> Stage:
        words = [*train_args, "--preset", preset, *(() if args.baselines else ENHANCEMENTS)]
        words += ["--output_dir", str(output)]
        recorded = as_recorded(train_settings(words))
        return Stage(
            f"train {preset}",
            command("train.py", *words, "--resume"),
            lambda: claim_folder(output, recorded, resume=True, flag="--name or --models_dir"),
            output,
        )

    stages, references = [], []
    for preset, size in zip(presets, sizes, strict=True):
        model, output = args.models_dir / f"{name}-{size}", result_file(args, name, size)
        stages += [training(preset, model), evaluation(f"evaluate {preset}", model, output)]
        if args.references:
            reference = result_file(args, "hf", f"{size}_old")
            student = PUBLISHED_STUDENTS[preset]
            same = ["--data", settings.data, "--teacher_model", settings.teacher_model]
            if settings.sequence_column:
                same += ["--sequence_column", settings.sequence_column]
            compare = command("compare.py", output, "--reference", reference)
            references += [
                evaluation(f"evaluate the published {size}", student, reference, *same),
                Stage(f"compare {size}", compare, optional=True),
            ]
    return stages + references


def result_file(args: argparse.Namespace, name: str, size: str) -> Path:
    """Return where the results of one student go."""
    return args.results_dir / f"eval_{name}_{size}.json"


def sweep_stages(args: argparse.Namespace, name: str) -> list[Stage]:
    """Return the sweep's training, its choice, and a table of all values with intervals."""
    from src.proteins.locations import on_hub

    presets = args.presets or ["tiny"]
    if len(presets) > 1:
        raise ValueError("--sweep: takes one preset")
    run_args = [
        *given(args, "teacher_model", "data", "sequence_column", "layout"),
        *args.train_args,
        "--preset",
        presets[0],
    ]
    run_args += () if args.baselines else ENHANCEMENTS
    words = ["--grid", args.sweep, *(["--values", *args.values] if args.values else [])]
    words += ["--results", str(args.results_dir / name), "--work", str(args.models_dir / name)]
    words += given(args, "device", "cache_dir")
    if on_hub(train_settings(run_args).data):
        words += ["--max_proteins", HUB_PROTEINS]
    parsed = ablation.parse_for(
        ablation.build_parser(), [*words, "--", *run_args], "scripts/ablation.py"
    )
    grid = ablation.chosen(parsed)
    files = [parsed.results / grid.file_of(cell) for cell in grid.cells()]
    return [
        Stage(f"sweep {args.sweep}", command("ablation.py", *words, "--", *run_args)),
        Stage("choose", command("ablation.py", *words, "--choose", "--", *run_args)),
        Stage("compare", command("compare.py", *files)),
    ]


def build_stages(args: argparse.Namespace) -> tuple[str, list[Stage]]:
    """Return the pipeline's name and its stages. Raises ``ValueError``."""
    if args.sweep and (args.references or args.evaluate_args or args.overwrite):
        raise ValueError("--sweep: without --references, --evaluate_args and --overwrite")
    if args.values and not args.sweep:
        raise ValueError("--values: only with --sweep")
    require_free(args.train_args, OWN_TRAIN_FLAGS, "after --")
    require_free(shlex.split(args.evaluate_args), OWN_EVALUATE_FLAGS, "in --evaluate_args")
    if args.sweep:
        name = args.name or f"sweep_{args.sweep}"
        return name, sweep_stages(args, name)
    name = args.name or ("baseline" if args.baselines else "synergy")
    return name, preset_stages(args, name)


def run(args: argparse.Namespace) -> dict:
    """Run the stages, or print them. A failure leaves with its exit status."""
    name, stages = build_stages(args)
    if args.dry_run:
        for number, stage in enumerate(stages, start=1):
            say(f"[{number}/{len(stages)}] {stage.title}: {stage.state()}")
            say(f"    {shown_command(stage.command)}")
        return {}
    log_dir = args.log_dir or Path("logs") / f"pipeline-{name}"
    status = Pipeline(name, stages, log_dir).run(args.on_success)
    if status:
        raise SystemExit(status)
    return {}


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

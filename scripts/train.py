#!/usr/bin/env python3
r"""Distil a causal protein language model into a smaller GPT-2.

Examples:
  python scripts/train.py --preset hf-tiny --use_uncertainty_weighting --use_calibration_smoothing
  python scripts/train.py --teacher_model data/small_teacher --data data/proteins \
      --n_layer 2 --n_head 4 --n_embd 160 --output_dir models/demo
  python scripts/train.py --preset hf-tiny --recipe recommended
  python scripts/train.py --preset small --dry_run
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common import settings as s
from src.common.cli import (
    LAYOUT_HELP,
    HelpFormatter,
    add_data_flags,
    folder,
    natural,
    positive_float,
    positive_int,
    run_script,
    say,
    share,
    take_defaults,
    workers,
)

DEFAULTS = s.TrainSettings()
LOSS = s.LossSettings()
OPTIONS = ("resume", "report_to", "cache_dir", "teacher_cache", "skip_teacher_check")
"""Flags that are passed on as they are."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument_group("what to distil").add_argument
    add("--teacher_model", help=f"directory or hub id (default: {s.DEFAULT_TEACHER})")
    add_data_flags(
        add,
        "hub data set, directory of parts, or files: FASTA, text, CSV, Excel, parquet and others",
    )
    add("--train_size_prop", type=share, help="share of the training proteins")
    add(
        "--data_seed",
        type=natural,
        help="seed that chooses the proteins which --train_size_prop keeps",
    )
    add(
        "--tokenizer",
        help="train from random weights with this tokenizer and no teacher (with --alpha 1)",
    )
    add("--layout", help=LAYOUT_HELP)
    add("--max_length", type=positive_int, help="tokens; longer proteins are cut")

    add = parser.add_argument_group("student").add_argument
    add("--preset", choices=sorted(s.PRESETS), help="a named shape with its learning rate")
    add("--n_layer", type=positive_int, help="blocks (default: 4, or the preset's)")
    add("--n_head", type=positive_int, help="attention heads (default: 4, or the preset's)")
    add("--n_embd", type=positive_int, help="width (default: 256, or the preset's)")
    add(
        "--init_from",
        help="start from this model, cut to the student's shape if one is given; "
        "'teacher': from the teacher, cut",
    )
    add("--dropout", type=float, default=0.0, help="probability, everywhere in the student")

    add = parser.add_argument_group("loss").add_argument
    add(
        "--recipe",
        choices=sorted(s.RECIPES),
        help="several flags at once; those given beside it win. "
        + "; ".join(f"{name}: {shown(flags)}" for name, flags in s.RECIPES.items()),
    )
    add("--temperature", type=positive_float, help="T of the soft loss")
    add("--alpha", type=float, help="share of the hard loss")
    add("--use_uncertainty_weighting", action="store_true", help="weight by teacher entropy")
    add("--use_calibration_smoothing", action="store_true", help="smooth the teacher's targets")
    add("--smoothing_factor", type=float, help="largest share of the uniform")
    add(
        "--weighting",
        choices=s.WEIGHTINGS,
        help="kind of weights (with --use_uncertainty_weighting)",
    )
    add(
        "--smoothing",
        choices=s.SMOOTHINGS,
        help="kind of smoothing (with --use_calibration_smoothing)",
    )
    add(
        "--divergence",
        choices=s.DIVERGENCES,
        help="divergence of the soft loss",
    )
    add("--divergence_weight", type=float, help="beta of jsd, skew of skew_kl")
    add("--loss_impl", choices=s.LOSS_IMPLEMENTATIONS, help="fused saves memory")

    add = parser.add_argument_group("training").add_argument
    add(
        "--optimizer",
        choices=s.OPTIMIZERS,
        help="muon: for the matrices inside the blocks, AdamW for the rest",
    )
    add(
        "--other_learning_rate",
        type=positive_float,
        help="with muon: rate of embeddings, norms and biases (default: --learning_rate)",
    )
    add("--learning_rate", type=positive_float, help="(default: 1e-3, or the preset's)")
    add("--lr_schedule", choices=s.SCHEDULES, help="after warm-up")
    add("--warmup_steps", type=natural, help="(default: 5 %% of the steps, at most 500)")
    add("--weight_decay", type=float, help="of AdamW")
    add("--max_grad_norm", type=positive_float, help="gradients are clipped to it")
    add(
        "--skip_loss_spikes",
        type=positive_float,
        help="skip steps whose loss is above this multiple of the running median",
    )
    add("--batch_size", type=positive_int, help="rows on a device")
    add("--gradient_accumulation_steps", type=positive_int, help="batches a step")
    add("--num_train_epochs", type=positive_float, help="passes over the data")
    add("--max_steps", type=int, help="stop there, whatever the epochs; -1: not")
    add(
        "--early_stopping",
        nargs="?",
        const=3,
        type=positive_int,
        metavar="PATIENCE",
        help="stop after so many validations (3) without improvement, and keep the best weights",
    )
    add(
        "--batching",
        choices=s.BATCHINGS,
        help="bucketed: rows of similar length; packed: full rows, no padding; padded: random rows",
    )
    add("--precision", choices=s.PRECISIONS, help="bf16 on a GPU, else fp32")
    add(
        "--seed",
        type=natural,
        help="seed of the initial weights and of the data order",
    )
    add("--compile", action="store_true", help="run the student through torch.compile")

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", type=Path, help="(default: models/ and a name made of the settings)")
    add("--resume", action="store_true", help="go on with an unfinished run")
    add(
        "--eval_steps",
        type=positive_int,
        help="steps between validations (default: 1 to 10 validations, in 5 %% of the time)",
    )
    add("--save_steps", type=positive_int, help="(default: ten times a run)")
    add("--validation_proteins", type=positive_int, help="watched while training")
    add("--report_to", choices=("none", "wandb", "tensorboard"), default="none", help="tracker")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add(
        "--num_workers",
        type=workers,
        metavar="N",
        default=0,
        help="processes that prepare batches, at most 4 for each CPU",
    )
    add("--cache_dir", type=folder, help="where tokenised proteins are kept")
    add("--teacher_cache", type=Path, help="keep the teacher's hidden states there, run it once")
    add(
        "--shard_teacher",
        action="store_true",
        help="spread the teacher over the processes of torchrun",
    )
    add("--skip_teacher_check", action="store_true", help="do not test the teacher first")
    add("--dry_run", action="store_true", help="print sizes, disk, steps and time, and stop")
    take_defaults(parser, LOSS, DEFAULTS, but=("teacher_model", "learning_rate"))
    return parser


def shown(flags: Mapping[str, Any]) -> str:
    """Return flags as they would be typed."""
    return " ".join(f"--{k}" if v is True else f"--{k} {v}" for k, v in flags.items())


def build_settings(args: argparse.Namespace) -> s.TrainSettings:
    """Return the settings of the run that the arguments ask for."""
    preset = s.PRESETS.get(args.preset) if args.preset else None
    shape = preset.student if preset else DEFAULTS.shape
    shaped = args.preset or any((args.n_layer, args.n_head, args.n_embd))
    if args.init_from == s.OF_TEACHER:
        args.init_from = args.teacher_model or s.DEFAULT_TEACHER
    elif args.init_from and not shaped:
        from src.models.loading import gpt2_shape

        shape = gpt2_shape(args.init_from)
    student = None
    if shape is not None:
        student = s.StudentSettings(
            **{k: getattr(args, k) or getattr(shape, k) for k in ("n_layer", "n_head", "n_embd")},
            dropout=args.dropout,
        )
    elif args.dropout:
        raise ValueError(f"--dropout: only of a GPT-2, which {args.init_from} is not")
    rate = args.learning_rate or (preset.learning_rate if preset else DEFAULTS.learning_rate)
    loss = s.LossSettings(**{k: getattr(args, k) for k in vars(LOSS)})
    # With alpha 1 no teacher is used; the tokenizer comes from --init_from.
    teacher = args.teacher_model or (args.init_from if loss.alpha == 1 else None)
    own = set(vars(DEFAULTS)) & set(vars(args)) - {"learning_rate", "teacher_model"}
    return s.TrainSettings(
        student=student,
        loss=loss,
        learning_rate=rate,
        teacher_model=None if args.tokenizer else teacher or s.DEFAULT_TEACHER,
        cached_teacher=args.teacher_cache is not None,
        **{k: getattr(args, k) for k in own},
    )


def run(args: argparse.Namespace) -> dict:
    """Train, or only plan. Returns the run's record, or the plan."""
    settings = build_settings(args)
    output_dir = args.output_dir or Path("models") / s.default_run_name(settings)
    if args.dry_run:
        from src.training.dry_run import plan

        cache = args.teacher_cache
        return plan(settings, output_dir, args.preset, args.cache_dir, say, args.device, cache)
    from src.training.stages import train

    return train(
        settings,
        output_dir,
        **{name: getattr(args, name) for name in OPTIONS},
        shard_teacher=args.shard_teacher,
        device_name=args.device,
        workers=args.num_workers,
        compile_model=args.compile,
    )


def with_recipe(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.ArgumentParser:
    """Make the values of ``--recipe`` the parser's defaults, so that every flag given wins."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--recipe", nargs="?")
    parser.set_defaults(**s.RECIPES.get(first.parse_known_args(argv)[0].recipe, {}))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    typed = sys.argv[1:] if argv is None else argv
    return run_script(run, lambda: with_recipe(build_parser(), typed), typed)


if __name__ == "__main__":
    sys.exit(main())

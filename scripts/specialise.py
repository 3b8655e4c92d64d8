#!/usr/bin/env python3
r"""From a family of proteins to an adapted model, a small specialist, ranked candidates and a page.

The family is split by identity clusters, the model is adapted to it, proteins are sampled from the
adapted model, useless ones are dropped and the others ranked. With the shape of a student a small
specialist is distilled from the adapted model. Everything is judged on held-out members beside the
unadapted model, one trained from random weights, and a profile HMM. The same command goes on with
a stopped run. Needs requirements-family.txt: MMseqs2, and peft for --lora.

Examples:
  python scripts/specialise.py --family family.fasta --output_dir my_family
  python scripts/specialise.py --family family.fasta --model data/small_teacher \
      --n_layer 4 --n_head 4 --n_embd 128 --tune --output_dir my_family
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common import settings as s
from src.common.cli import (
    LAYOUT_HELP,
    HelpFormatter,
    folder,
    natural,
    positive_float,
    positive_int,
    run_script,
    share,
)

SHAPE = ("n_layer", "n_head", "n_embd")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument_group("what").add_argument
    add(
        "--family",
        type=Path,
        required=True,
        help="FASTA or another file of at least 10 members, or a directory with the parts train, "
        "validation and perhaps test, taken as it is",
    )
    add("--model", default=s.BUNDLED_TEACHER, help="to adapt: directory or hub id")
    example = "'3.2.1.17<sep><start>{residues}<end>'"
    add("--layout", help=f"{LAYOUT_HELP}; a family's tag is written in its place: {example}")
    add("--output_dir", type=Path, required=True, help="directory of everything that is made")
    add("--profile", type=Path, help="HMM file that recognises the family (default: one is built)")

    add = parser.add_argument_group("split").add_argument
    add(
        "--test_identity",
        type=share,
        default=0.6,
        help="held-out members are below this identity to training members",
    )
    add("--allow_mixed", action="store_true", help="go on where members look unrelated")

    add = parser.add_argument_group("adaptation").add_argument
    add(
        "--learning_rate",
        type=positive_float,
        help="of the adaptation (default: 1.5e-3 for a model as small as the bundled one, 5e-5 for "
        "ProtGPT2, between for others; with --lora 3e-3)",
    )
    add(
        "--lora",
        nargs="?",
        const=16,
        type=positive_int,
        metavar="RANK",
        help="for a large model: train low-rank additions (16) and merge them at the end; no "
        "random weights are trained for comparison",
    )
    add("--tune", action="store_true", help="try a third and three times each learning rate too")
    add("--epochs", type=positive_int, default=20, help="at most, or 200 steps if more")
    add("--batch_size", type=positive_int, default=8, help="members of a step")
    add("--skip_random", action="store_true", help="do not train random weights to compare")

    add = parser.add_argument_group("specialist (none without a shape)").add_argument
    add("--student_preset", choices=sorted(s.PRESETS), help="a named shape")
    add("--n_layer", type=positive_int, help="blocks")
    add("--n_head", type=positive_int, help="attention heads")
    add("--n_embd", type=positive_int, help="width")

    add = parser.add_argument_group("candidates").add_argument
    add("--num_candidates", type=positive_int, default=1000, help="proteins sampled")
    add(
        "--temperature",
        type=positive_float,
        help="of sampling (default: 1, or lower where a pilot shows that little would be kept)",
    )
    add("--top_p", type=share, default=1.0, help="sample among the tokens with this share")
    add(
        "--max_identity",
        type=share,
        default=0.9,
        help="candidates with a higher identity to a training member are dropped",
    )

    add = parser.add_argument_group("run").add_argument
    add("--seed", type=natural, default=0, help="of the split, the training and the sampling")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--cache_dir", type=folder, help="where tokenised proteins are kept")
    return parser


def student_shape(args: argparse.Namespace) -> s.StudentSettings | None:
    """Return the specialist's shape; None: none is wanted.

    Raises:
        ValueError: the shape is incomplete.
    """
    preset = s.PRESETS[args.student_preset].student if args.student_preset else None
    given = {name: getattr(args, name) for name in SHAPE if getattr(args, name)}
    if preset is not None:
        return replace(preset, **given)
    if given and len(given) < len(SHAPE):
        raise ValueError(f"a specialist needs {', '.join(f'--{name}' for name in SHAPE)}")
    return s.StudentSettings(**given) if given else None


def run(args: argparse.Namespace) -> dict:
    """Do everything that is not finished. Returns the judgement."""
    specialist = student_shape(args)
    from src.experiments import specialist as sp
    from src.experiments.candidates import CandidateSettings
    from src.experiments.family_run import FamilyRun, run_family
    from src.proteins.family_split import FamilySettings

    fit = {"epochs": args.epochs, "batch_size": args.batch_size, "seed": args.seed}
    whole, small = (sp.parameters_of(args.model, shape) for shape in (None, specialist))
    adaptation = replace(sp.LORA if args.lora else sp.suited(sp.ADAPTATION, whole), **fit)
    if args.learning_rate:
        adaptation = replace(adaptation, learning_rates=(args.learning_rate,))
    random = replace(sp.suited(sp.FROM_RANDOM, whole), **fit)
    distillation = replace(sp.suited(sp.DISTILLATION, small), seed=args.seed)
    if args.tune:
        adaptation, random, distillation = map(sp.tuned, (adaptation, random, distillation))
    return run_family(
        FamilyRun(
            family=args.family,
            model=args.model,
            output_dir=args.output_dir,
            specialist=specialist,
            split=FamilySettings(args.test_identity, seed=args.seed),
            adaptation=adaptation,
            lora_rank=args.lora,
            random=random,
            distillation=distillation,
            candidates=CandidateSettings(
                num_candidates=args.num_candidates,
                temperature=args.temperature,
                top_p=args.top_p,
                max_identity=args.max_identity,
                seed=args.seed,
            ),
            scratch=not (args.skip_random or args.lora),
            profile=args.profile,
            layout=args.layout,
            allow_mixed=args.allow_mixed,
            device=args.device,
            cache_dir=args.cache_dir,
        )
    )


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

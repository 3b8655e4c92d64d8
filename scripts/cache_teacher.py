#!/usr/bin/env python3
r"""Run a teacher over the proteins once and keep its hidden states for any number of students.

scripts/train.py --teacher_cache does the same at its start. Data, share, length and precision must
be those of the training runs. A stopped capture continues at the shard it was writing; in an
existing cache all files are checked and broken ones captured again.

Example:
  python scripts/cache_teacher.py --teacher_model data/small_teacher --data data/proteins \
      --train_size_prop 1.0 --teacher_cache caches
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common import settings as s
from src.common.cli import (
    LAYOUT_HELP,
    HelpFormatter,
    add_data_flags,
    folder,
    natural,
    positive_int,
    run_script,
    share,
    take_defaults,
)

DEFAULTS = s.TrainSettings()


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--teacher_cache", type=Path, required=True, help="directory that holds the caches")
    add("--teacher_model", help="directory or hub id of the teacher")
    add_data_flags(add, "as for scripts/train.py")
    add("--train_size_prop", type=share, help="share of the training proteins")
    add("--data_seed", type=natural, help="chooses that share")
    add("--layout", help=LAYOUT_HELP)
    add("--max_length", type=positive_int, help="tokens; longer proteins are cut")
    add("--validation_proteins", type=positive_int, help="watched while training")
    add("--precision", choices=s.PRECISIONS, help="bf16 on a GPU, else fp32")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add(
        "--shard_teacher",
        action="store_true",
        help="spread a teacher that no device holds over the processes of torchrun",
    )
    add("--cache_dir", type=folder, help="where tokenised proteins are kept")
    take_defaults(parser, DEFAULTS)
    return parser


def run(args: argparse.Namespace) -> dict:
    """Capture what is missing or broken, and return the directory of each part's cache."""
    names = set(vars(DEFAULTS)) & set(vars(args))
    settings = s.TrainSettings(**{name: getattr(args, name) for name in names})

    from src.common import processes
    from src.common.cli import quiet_libraries
    from src.training.ingredients import capture_parts, gather

    quiet_libraries()
    processes.join(args.device)
    inputs = gather(settings, args.device, args.cache_dir, args.shard_teacher)
    caches = capture_parts(inputs, args.teacher_cache, processes.say, thorough=True)
    for line in inputs.parts["train"].report.lines():
        processes.say(line)
    for name, cache in caches.items():
        processes.say(f"{name}: {len(inputs.parts[name]):,} proteins in {cache.folder}")
    return {name: str(cache.folder) for name, cache in caches.items()}


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

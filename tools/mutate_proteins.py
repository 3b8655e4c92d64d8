#!/usr/bin/env python3
"""Add mutated copies to training proteins, to distil from a teacher with its distributions alone.

The other parts are copied as they are.

Example:
  python tools/mutate_proteins.py --data data/proteins --output models/mutated
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common.cli import HelpFormatter, natural, positive_int, run_script, say, share


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="directory of parts: train.fasta.gz and others")
    add("--output", type=Path, required=True, help="directory to make")
    add("--copies", type=positive_int, default=1, help="of each protein")
    add("--least", type=share, default=0.05, help="share of residues substituted in a copy, from")
    add("--most", type=share, default=0.5, help="to")
    add("--seed", type=natural, default=0, help="of the substitutions")
    return parser


def run(args: argparse.Namespace) -> dict:
    """Write the parts. Returns how many training proteins there are now."""
    import shutil

    import numpy as np

    from src.proteins.fasta import FastaRecord, write_fasta
    from src.proteins.sources import read_distinct_names
    from src.proteins.split_files import require_free
    from src.proteins.substitutions import mutated_copies

    if args.least > args.most:
        raise ValueError(f"--least {args.least} is above --most {args.most}")
    train = args.data / "train.fasta.gz"
    if not train.is_file():
        raise ValueError(f"--data {args.data}: there is no train.fasta.gz")
    require_free(args.output)
    proteins, _ = read_distinct_names(train, keep_ambiguous=True)
    records = [FastaRecord(protein.name, protein.residues) for protein in proteins]
    rng = np.random.default_rng(args.seed)
    for number in range(1, args.copies + 1):
        copies = mutated_copies([p.residues for p in proteins], args.least, args.most, rng)
        records += [
            FastaRecord(f"{protein.name}_mutated{number}", copy)
            for protein, copy in zip(proteins, copies, strict=True)
        ]
    write_fasta(args.output / train.name, records)
    for path in args.data.glob("*.fasta.gz"):
        if path != train:
            shutil.copyfile(path, args.output / path.name)
    say(f"{len(records):,} training proteins, {len(proteins):,} of them natural: {args.output}")
    return {"proteins": len(records)}


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
r"""Embed proteins: hidden states of a chosen layer, for each protein or for each residue.

A residue gets the hidden state of the token that holds it; a protein the mean over its residues and
the state of its last one. A run that was stopped goes on where it was. Started by torchrun, the
processes share the proteins.

Examples:
  python scripts/embed.py --model models/demo --input proteins.fasta --output embeddings.parquet
  python scripts/embed.py --model models/demo --input proteins.fasta --layer 2 --per_residue \
      --output residues.npz
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common.cli import LAYOUT_HELP, HelpFormatter, positive_int, run_script
from src.common.files import check_outputs, names_full_disk
from src.common.processes import say


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument_group("what to embed").add_argument
    add("--model", required=True, help="directory or hub id")
    add("--input", type=Path, required=True, help="FASTA or another file of proteins")
    add("--layout", help=LAYOUT_HELP)
    add("--sequence_column", help="column of the residues in a table (default: a usual name)")
    add(
        "--layer",
        type=int,
        default=-1,
        help="0: input of the first block; n: output of the n-th, the last after the final norm",
    )
    add("--per_residue", action="store_true", help="a vector for each residue, not mean and last")

    add = parser.add_argument_group("how").add_argument
    add("--batch_size", type=positive_int, default=64, help="proteins of a batch, at most")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")

    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, required=True, help=".parquet or .npz")
    add("--overwrite", action="store_true", help="replace the file")
    return parser


def run(args: argparse.Namespace) -> dict:
    """Embed and write. Returns how many proteins were embedded and left out."""
    from src.common import processes

    check_outputs(args.output, overwrite=args.overwrite, inputs=[args.input])
    from src.evaluation import embeddings as e

    if args.output.suffix not in e.FORMATS:
        raise ValueError(f"--output {args.output}: must end in .parquet or .npz")
    from src.common.cli import quiet_libraries
    from src.common.devices import choose_device
    from src.common.files import sha256_file
    from src.models.loading import NOT_TAKEN, ProteinModel, model_fingerprint
    from src.proteins.sources import read_distinct_names

    quiet_libraries()
    processes.join(args.device)
    loaded = ProteinModel.load(args.model, choose_device(args.device), args.layout, say)
    every, report = read_distinct_names(
        args.input,
        keep_ambiguous=True,
        tokenizer=loaded.tokenizer,
        sequence_column=args.sequence_column,
    )
    for line in report.lines():
        say(line)
    _, fits = loaded.rows([protein.residues for protein in every])
    fitting = [protein for protein, fit in zip(every, fits, strict=True) if fit]
    if lost := len(every) - len(fitting):
        first = every[int(fits.argmin())].name
        say(f"{lost:,} proteins, the first is {first}, {NOT_TAKEN}: they are left out")
    if not fitting:
        raise ValueError(f"--input {args.input}: all proteins {NOT_TAKEN}")
    settings = e.EmbeddingSettings(args.layer, args.per_residue, args.batch_size)
    identity = {
        "model": model_fingerprint(loaded.model),
        "input": sha256_file(args.input),
        "layout": loaded.layout.template,
    }
    with names_full_disk(args.output, "make space, or name another --output"):
        e.write_embeddings(args.output, loaded, fitting, settings, identity, say)
    say(f"{len(fitting):,} proteins embedded; written: {args.output}")
    return {"proteins": len(fitting), "left_out": lost}


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

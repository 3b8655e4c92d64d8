#!/usr/bin/env python3
"""Train a byte-pair tokenizer on proteins in ProtGPT2's layout, for a model of its own.

Example:
  python tools/train_tokenizer.py --data split --vocab_size 512 --output tokenizer
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
    add("--data", required=True, help="FASTA[.gz], text, CSV, parquet or directory of parts")
    add("--output", type=Path, required=True, help="directory to make")
    add("--vocab_size", type=positive_int, default=512, help="tokens in all")
    add("--max_proteins", type=positive_int, default=50_000, help="the first so many are read")
    add("--max_length", type=positive_int, default=512, help="longest input of the model, tokens")
    return parser


def run(args: argparse.Namespace) -> dict:
    """Train and write the tokenizer. Returns its size and the proteins read."""
    from itertools import islice

    from src.proteins.sources import has_split, read_proteins
    from src.proteins.split_files import require_free
    from src.proteins.tokenizer import train_tokenizer

    require_free(args.output)
    split = "train" if has_split(args.data, "train") else None
    proteins = [
        p.residues for p in islice(read_proteins(args.data, split=split), args.max_proteins)
    ]
    tokenizer = train_tokenizer(proteins, args.vocab_size, args.max_length)
    tokenizer.save_pretrained(args.output)
    say(f"{len(tokenizer):,} tokens from {len(proteins):,} proteins, written to {args.output}")
    return {"vocab_size": len(tokenizer), "proteins": len(proteins)}


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

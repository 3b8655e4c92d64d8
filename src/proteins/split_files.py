"""Reads, writes and checks splits of proteins on disk.

A split is a directory with ``PART.fasta.gz`` for each part, ``clusters.tsv.gz`` and ``split.json``:
settings, counts, hashes and the leakage report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from src.common.cli import printable
from src.common.files import (
    atomic_folder,
    atomic_write,
    is_plain_name,
    read_json,
    remove_temporaries_of,
    write_json,
    write_text,
)
from src.proteins.fasta import FastaRecord, fasta_text
from src.proteins.homology import CLUSTERS_HEADER, read_clusters
from src.proteins.reading import ReadReport
from src.proteins.sources import DUPLICATE, read_distinct_names, read_proteins
from src.proteins.splits import Split, leakages, sample_train, split_hash

SPLIT_FILE = "split.json"
CLUSTERS_FILE = "clusters.tsv.gz"
SCHEMA_VERSION = 1
FAMILY_KEY = "family"
"""Key of a protein's family in a FASTA header: ``>name family=PF00001``."""
PART_COUNTS = ("proteins", "residues", "clusters")
LEAKAGE_COUNTS = ("proteins", "identity_30", "identity_50", "any_hit")


def read_named(
    source: str | Path, sequence_column: str | None = None
) -> tuple[dict[str, str], ReadReport]:
    """Return the residues for each name, in the order of the file, and the report of reading.

    Different proteins of one name get different ones
    (:func:`src.proteins.sources.read_distinct_names`).

    Raises:
        ValueError: the source is broken.
    """
    listed, report = read_distinct_names(source, sequence_column=sequence_column)
    proteins = {protein.name: protein.residues for protein in listed}
    repeated = report.kept - len(proteins)
    if repeated:
        report.drop(DUPLICATE, "the same name and residues", repeated)
        report.kept = len(proteins)
        report.residues = sum(map(len, proteins.values()))
    return proteins, report


def require_free(folder: Path) -> None:
    """Raise ``ValueError`` if ``folder`` is a file, or a directory that is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: is there already and not empty: choose another --output")


def _describe_parts(
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


def _hash_of(proteins: Mapping[str, str], parts: Mapping[str, Sequence[str]]) -> str:
    return split_hash({part: [proteins[n] for n in names] for part, names in parts.items()})


def write_split(
    folder: Path,
    proteins: Mapping[str, str],
    split: Split,
    settings: Any,
    train_proteins: int | None = None,
    source: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a split's parts, record and clusters into a new directory, and return the record.

    Args:
        folder: missing or empty; appears complete or not at all.
        proteins: residues for each name.
        split: from :func:`src.proteins.splits.split_by_homology`, or
            :func:`src.proteins.families.split_within_families`.
        settings: of that function.
        train_proteins: sample the training part down (:func:`src.proteins.splits.sample_train`);
            the leakage of the sample is then reported beside that of the whole part.
        source: what the proteins were read from, for the record.

    Raises:
        ValueError: ``folder`` is not free, or MMseqs2 fails.
    """
    require_free(folder)
    parts = dict(split.parts)
    keys = ("leakage", "left_out", "drawn", "all_clusters", "families", "others")
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "settings": {**asdict(settings), "train_proteins": train_proteins},
        "source": dict(source or {}),
        **{key: split.report[key] for key in keys if key in split.report},
    }
    if split.families:
        record["within_families"] = True
    if train_proteins is not None and train_proteins < len(parts["train"]):
        record["full_train"] = {
            **_describe_parts(proteins, {"train": parts["train"]}, split.clusters)["train"],
            "leakage": split.report["leakage"],
        }
        parts["train"] = sample_train(proteins, parts, train_proteins, settings)
        record["leakage"] = leakages(proteins, parts, settings)
    record["parts"] = _describe_parts(proteins, parts, split.clusters)
    record["split_hash"] = _hash_of(proteins, parts)

    remove_temporaries_of(folder)
    with atomic_folder(folder) as work:
        for part, names in parts.items():
            with atomic_write(work / f"{part}.fasta.gz") as handle:
                handle.writelines(_fasta_entry(n, proteins[n], split) for n in names)
        members = sorted({name for names in parts.values() for name in names})
        rows = ["\t".join(CLUSTERS_HEADER)] + [f"{n}\t{split.clusters[n]}" for n in members]
        write_text(work / CLUSTERS_FILE, "".join(f"{row}\n" for row in rows))
        write_json(work / SPLIT_FILE, record)
        check_split(work)
    return record


def _fasta_entry(name: str, residues: str, split: Split) -> str:
    family = split.clusters[name]
    fields = {FAMILY_KEY: family} if family in split.families else {}
    return fasta_text(FastaRecord(name, residues, fields))


def read_split(folder: Path) -> dict[str, Any]:
    """Return a split's record, its form checked.

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
    full = record.get("full_train", {})
    within = record.get("within_families", False)
    left_out = record.get("left_out", {})
    problem: Any = (
        _counts_problem("parts", record.get("parts"), PART_COUNTS)
        or (not record["parts"] and "parts names none")
        or _counts_problem("leakage", record.get("leakage"), LEAKAGE_COUNTS)
        or (not isinstance(full, dict) and "full_train is no object")
        or ("leakage" in full and _counts_problem("leakage", full["leakage"], LEAKAGE_COUNTS))
        or (not isinstance(record.get("split_hash"), str) and "split_hash is no text")
        or (not isinstance(left_out, dict) and "left_out is no object")
        or (not all(map(_is_count, left_out.values())) and "left_out has no whole numbers")
        or (not isinstance(within, bool) and "within_families is neither true nor false")
    )
    if problem:
        raise ValueError(f"{path}: not the record of a split ({printable(problem)})")
    return record


def _counts_problem(title: str, groups: Any, keys: Sequence[str]) -> str | None:
    """Return why a value does not map plain names to whole numbers under all keys, or None."""
    if not isinstance(groups, dict):
        return f"{title} is no object"
    for name, counts in groups.items():
        if not is_plain_name(name):
            return f"{title} names {name!r:.40}"
        if not isinstance(counts, dict) or not all(_is_count(counts.get(key)) for key in keys):
            return f"the counts of {name:.40} in {title} are no whole numbers"
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def check_split(folder: Path) -> dict[str, Any]:
    """Compare a split's files with its record, and return the record.

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
        for name, residues, *_ in read_proteins(folder / f"{part}.fasta.gz"):
            if name in proteins:
                raise ValueError(f"{folder}: {name} is there twice")
            proteins[name] = residues
            parts[part].append(name)
    if set(clusters) != set(proteins):
        raise ValueError(f"{folder / CLUSTERS_FILE}: does not name the proteins of the parts")
    described = _describe_parts(proteins, parts, clusters)
    for part, expected in record["parts"].items():
        if described[part] != expected:
            raise ValueError(f"{folder}: the part {part} is not what {SPLIT_FILE} says")
    if _hash_of(proteins, parts) != record["split_hash"]:
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
    """Return lines for the user: the size of each part, then the leakage of each held-out part."""
    groups = "families" if record.get("within_families") else "clusters"
    lines = [
        f"{part}: {entry['proteins']:,} proteins, {entry['residues']:,} residues, "
        f"{entry['clusters']:,} {groups}"
        for part, entry in record["parts"].items()
    ]
    lines += [
        f"left out: {count:,} proteins ({printable(reason)})"
        for reason, count in record.get("left_out", {}).items()
        if count
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

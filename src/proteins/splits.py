"""Splits proteins into train, validation and test so that no test protein has a relative in train.

In random splits relatives land on both sides, so a model looks better than it is on families it
has never seen. Here whole homology clusters go to one side, and held-out proteins for which a
search still finds a relative in train are left out. Files: :mod:`src.proteins.split_files`.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from src.common.cli import unheard
from src.proteins.homology import SearchSettings, alignments, best_identities, homology_clusters

IN_FAMILY = "test_in_family"


@dataclass(frozen=True)
class SplitSettings(SearchSettings):
    """How proteins are divided. Identities and coverages are shares in (0, 1]."""

    seed: int = 0
    leak_identity: float = 0.3
    validation_proteins: int = 1000
    test_proteins: int = 2500
    in_family_proteins: int = 0
    spare_factor: float = 2.0
    """Clusters drawn for each protein wanted, at least 1; some are lost to the search."""


@dataclass
class Split:
    """Names of each part, the cluster of each name, and the leakage report."""

    parts: dict[str, list[str]]
    clusters: dict[str, str]
    report: dict = field(default_factory=dict)
    families: frozenset[str] = frozenset()
    """The clusters that are families, which are in train and in the held-out parts alike."""


def split_by_homology(
    proteins: Mapping[str, str],
    settings: SplitSettings,
    clusters: Mapping[str, str] | None = None,
    announce: Callable[[str], None] = unheard,
) -> Split:
    """Divide proteins into train, validation and test by homology cluster.

    Clusters, computed when not given, are drawn at random by ``settings.seed``. One protein of each
    cluster drawn for validation or test is taken, so that every held-out protein is a family of its
    own. A held-out protein is left out if it has a relative at ``leak_identity`` or more in train;
    so is a validation protein with one in test. In-family proteins are one member each of training
    clusters; they are taken out of train and form a part of their own.

    Raises:
        ValueError: there are too few clusters, a protein has no cluster, or MMseqs2 is missing or
            fails.
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
    drawn = _draw(proteins, settings, clusters)
    announce(
        f"searching {len(drawn.test) + len(drawn.validation):,} held-out proteins in "
        f"{len(drawn.train):,}"
    )
    parts, left_out = _without_relatives(proteins, settings, drawn)
    with_repeats = {part: [proteins[n] for n in names] for part, names in parts.items()}
    distinct = without_repeats(proteins, parts)
    for part, names in parts.items():
        left_out[f"{part}: sequence already there"] = len(names) - len(distinct[part])
    announce("searching for leaks once more, for the report")
    report = {
        "drawn": {
            "train_proteins": len(drawn.train),
            "train_hash": split_hash({"train": with_repeats["train"]}),
            "split_hash": split_hash(with_repeats),
        },
        "all_clusters": len({clusters[name] for name in proteins}),
        "left_out": dict(left_out),
        "leakage": leakages(proteins, distinct, settings),
    }
    return Split(distinct, dict(clusters), report)


class _Drawn(NamedTuple):
    """Names drawn for each part, before the search for relatives."""

    train: list[str]
    test: list[str]
    validation: list[str]
    in_family: list[str]


def _draw(
    proteins: Mapping[str, str], settings: SplitSettings, clusters: Mapping[str, str]
) -> _Drawn:
    """Draw clusters for each part. Raises ``ValueError`` if there are too few."""
    members: dict[str, list[str]] = defaultdict(list)
    for name in sorted(proteins):
        members[clusters[name]].append(name)
    order = sorted(members)
    rng = random.Random(settings.seed)
    rng.shuffle(order)
    pools: list[list[str]] = []
    start = 0
    for count in (settings.test_proteins, settings.validation_proteins):
        taken = order[start : start + round(count * settings.spare_factor)]
        start += len(taken)
        pools.append([rng.choice(members[cluster]) for cluster in taken])
    training_clusters = order[start:]
    if not training_clusters:
        raise ValueError(
            f"{len(members)} homology clusters are too few for "
            f"{settings.test_proteins + settings.validation_proteins} held-out proteins: lower "
            "--test_proteins and --validation_proteins"
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
    test, validation = pools
    return _Drawn(train, test, validation, in_family)


def _without_relatives(
    proteins: Mapping[str, str], settings: SplitSettings, drawn: _Drawn
) -> tuple[dict[str, list[str]], Counter[str]]:
    """Return the parts without held-out proteins that have relatives, and counts of those."""
    left_out: Counter[str] = Counter()

    def clean(names: list[str], identities: Mapping[str, float], reason: str) -> list[str]:
        kept = [n for n in names if identities.get(n, 0.0) < settings.leak_identity]
        left_out[reason] = len(names) - len(kept)
        return kept

    in_train = best_identities(proteins, drawn.test + drawn.validation, drawn.train, settings)
    test = clean(drawn.test, in_train, "test: relative in train")[: settings.test_proteins]
    validation = clean(drawn.validation, in_train, "validation: relative in train")
    in_test = best_identities(proteins, validation, test, settings)
    validation = clean(validation, in_test, "validation: relative in test")
    parts = {
        "train": drawn.train,
        "test": test,
        "validation": validation[: settings.validation_proteins],
    }
    if settings.in_family_proteins:
        parts[IN_FAMILY] = drawn.in_family
    return parts, left_out


def leakage_counts(best: Mapping[str, float], names: Sequence[str]) -> dict[str, int]:
    """Count proteins by the highest identity of those with a hit: any, at ≥ 30 % and ≥ 50 %."""
    identities = [best[name] for name in names if name in best]
    return {
        "proteins": len(names),
        "any_hit": len(identities),
        "identity_30": sum(identity >= 0.3 for identity in identities),
        "identity_50": sum(identity >= 0.5 for identity in identities),
    }


def leakage(
    proteins: Mapping[str, str],
    held_out: Sequence[str],
    train: Sequence[str],
    settings: SearchSettings,
    least_coverage: float = 0.0,
) -> dict[str, int]:
    """Return the :func:`leakage_counts` of alignments with train over that share of a protein."""
    best = best_identities(proteins, held_out, train, settings, least_coverage)
    return leakage_counts(best, held_out)


def leakages(
    proteins: Mapping[str, str],
    parts: Mapping[str, Sequence[str]],
    settings: SearchSettings,
    least_coverage: float = 0.0,
) -> dict[str, dict[str, int]]:
    """Return the :func:`leakage` of each held-out part."""
    return {
        part: leakage(proteins, names, parts["train"], settings, least_coverage)
        for part, names in parts.items()
        if part != "train"
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
    """Return the ``count`` names with the lowest seeded hash, in their order.

    A smaller sample is part of a larger one. Names are hashed, not sequences as in
    ``src.proteins.hashes.chosen``, so that a share of a sample is still a fair share.
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
    """Return at most ``count`` training proteins without relatives among the held-out ones.

    The sample is searched again, because E-values fall with its size: proteins with a hit at
    ``leak_identity`` or more in validation or test are removed until there is none.
    """
    train = sample_names(parts["train"], count, settings.seed)
    held_out = [*parts["validation"], *parts["test"]]
    while True:
        hits = alignments(proteins, held_out, train, settings)
        similar = {hit.target for hit in hits if hit.identity >= settings.leak_identity}
        if not similar:
            return train
        train = [name for name in train if name not in similar]


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

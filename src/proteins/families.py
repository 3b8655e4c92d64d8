"""Splits proteins within their families: held-out members are new, their families are known.

A split by homology (:mod:`src.proteins.splits`) measures a model on proteins without any relative
in training. Here every family is in training and whole clusters of its members are held out, which
measures how well the model has learnt the families themselves.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from src.proteins.readers import guarded_lines
from src.proteins.report import ReadReport
from src.proteins.splits import (
    FAMILY_KEY,
    Split,
    SplitSettings,
    covering_identities,
    homology_clusters,
)

NEW_FAMILIES = "test_new"


@dataclass(frozen=True)
class FamilySplitSettings:
    """How members of families are held out. Identities and coverages are shares in [0, 1]."""

    seed: int = 0
    identity: float = 0.5
    coverage: float = 0.5
    validation_per_family: int = 6
    test_per_family: int = 12
    largest_share: float = 0.3
    """Share of a family's members that is kept out of train at most."""
    held_out_per_cluster: int = 4
    """Members of one cluster that are in validation or test at most."""
    train_per_cluster: int = 60
    """Members of one cluster that are in train at most: close relatives teach little new."""
    spare_factor: float = 1.5
    """Members drawn for each one wanted; some are lost to the search for relatives."""

    def __post_init__(self) -> None:
        """Check every setting. Raises ``ValueError``."""
        for name in ("identity", "coverage", "largest_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"--{name} must be in (0, 1], got {getattr(self, name)}")
        for name in ("validation_per_family", "test_per_family"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}")
        for name in ("held_out_per_cluster", "train_per_cluster"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")


def read_families(path: str | Path, names: Mapping[str, str]) -> dict[str, str]:
    """Return the family of each protein of a FASTA file, from ``family=NAME`` in its header.

    Args:
        path: FASTA, gzipped or not.
        names: the proteins that need one, by name.

    Raises:
        ValueError: a protein has no family in its header.
    """
    families: dict[str, str] = {}
    for _number, line in guarded_lines(Path(path), ReadReport()):
        if line.startswith(">"):
            name, *words = line[1:].split() or [""]
            fields = dict(word.split("=", 1) for word in words if "=" in word)
            if FAMILY_KEY in fields:
                families[name] = fields[FAMILY_KEY]
    missing = next((name for name in names if name not in families), None)
    if missing is not None:
        raise ValueError(f"{path}: {missing} has no 'family=NAME' in its header")
    return {name: families[name] for name in names}


def most_diverse_families(
    families: Mapping[str, str], clusters: Mapping[str, str], count: int, most: int = 10
) -> list[str]:
    """Return the ``count`` families with the most members, counting ``most`` of a cluster at most.

    A family of many members that are all alike gives few held-out members.

    Args:
        families: family for each name.
        clusters: cluster for each name, from :func:`identity_clusters`.
        count: how many to return, most diverse first.
        most: members counted of one cluster.
    """
    members = Counter((families[name], clusters[name]) for name in families)
    sizes: Counter[str] = Counter()
    for (family, _cluster), size in members.items():
        sizes[family] += min(most, size)
    return sorted(sizes, key=lambda family: (-sizes[family], family))[:count]


def identity_clusters(proteins: Mapping[str, str], settings: FamilySplitSettings) -> dict[str, str]:
    """Return the cluster of each protein: connected components at the settings' identity.

    Raises:
        ValueError: MMseqs2 is missing or fails.
    """
    return homology_clusters(proteins, _search_settings(settings), connected=True)


def split_within_families(
    proteins: Mapping[str, str],
    families: Mapping[str, str],
    settings: FamilySplitSettings,
    announce: Callable[[str], None] = lambda line: None,
) -> Split:
    """Divide the members of each family into train, validation and test by identity clusters.

    Clusters are connected components at ``identity`` over ``coverage`` of both proteins. They are
    drawn in proportion to their size, as if members were drawn, and no member of a drawn cluster is
    in train: a family whose members are all alike may give none. A held-out protein is left out if
    a local alignment over ``coverage`` of its length reaches ``identity`` to a training protein,
    or that of a test protein to a validation protein.

    Args:
        proteins: residues for each name.
        families: family for each name.
        settings: sizes, seed and thresholds.
        announce: called with one line for each stage.

    Returns:
        The parts, the family of each protein as its cluster, and the leakage report.

    Raises:
        ValueError: MMseqs2 is missing or fails.
    """
    search = _search_settings(settings)
    announce(f"clustering {len(proteins):,} proteins at {settings.identity:.0%}")
    clusters = identity_clusters(proteins, settings)
    drawn, unused = _drawn_parts(proteins, families, clusters, settings)
    announce(
        f"searching {len(drawn['test']) + len(drawn['validation']):,} held-out proteins "
        f"in {len(drawn['train']):,}"
    )
    left_out: Counter[str] = Counter({"more members of one cluster than wanted": unused})
    parts: dict[str, list[str]] = {"train": drawn["train"]}
    against = list(drawn["train"])
    for part, count in (
        ("validation", settings.validation_per_family),
        ("test", settings.test_per_family),
    ):
        best = covering_identities(proteins, drawn[part], against, search)
        clean = [n for n in drawn[part] if best.get(n, 0.0) < settings.identity]
        left_out[f"{part}: relative in train or validation"] = len(drawn[part]) - len(clean)
        parts[part] = _at_most(clean, families, count)
        against += parts[part]
    announce("searching for leaks once more, for the report")
    report = {
        "left_out": dict(left_out),
        "all_clusters": len(set(clusters.values())),
        "leakage": {
            part: family_leakage(proteins, parts[part], parts["train"], search)
            for part in ("validation", "test")
        },
        "families": {part: len({families[n] for n in names}) for part, names in parts.items()},
    }
    return Split(parts, dict(families), report, within_families=True)


def _search_settings(settings: FamilySplitSettings) -> SplitSettings:
    return SplitSettings(
        seed=settings.seed,
        cluster_identity=settings.identity,
        cluster_coverage=settings.coverage,
        leak_identity=settings.identity,
    )


def _drawn_parts(
    proteins: Mapping[str, str],
    families: Mapping[str, str],
    clusters: Mapping[str, str],
    settings: FamilySplitSettings,
) -> tuple[dict[str, list[str]], int]:
    """Draw clusters of each family for validation and test, and leave the rest to train.

    Returns:
        The members drawn for each part, and how many members of drawn clusters are in no part.
    """
    members: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(proteins):
        members[families[name]][clusters[name]].append(name)
    rng = random.Random(settings.seed)
    drawn: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    unused = 0
    for family in sorted(members):
        groups = [members[family][key] for key in sorted(members[family])]
        room = settings.largest_share * sum(map(len, groups))
        wanted = {
            "validation": round(settings.validation_per_family * settings.spare_factor),
            "test": round(settings.test_per_family * settings.spare_factor),
        }
        # Weighted sampling without replacement (Efraimidis and Spirakis 2006): the cluster of a
        # random member comes first.
        keys = [rng.random() ** (1 / len(group)) for group in groups]
        for index in sorted(range(len(groups)), key=lambda i: -keys[i]):
            group = rng.sample(groups[index], len(groups[index]))
            part = next((part for part, count in wanted.items() if count > 0), None)
            if part is None or len(group) > room:
                part, most = "train", settings.train_per_cluster
            else:
                most = min(settings.held_out_per_cluster, wanted[part])
                room -= len(group)
                wanted[part] -= min(most, len(group))
            drawn[part] += group[:most]
            unused += max(0, len(group) - most)
    rng.shuffle(drawn["train"])
    return drawn, unused


def add_new_families(
    split: Split,
    proteins: Mapping[str, str],
    new: Mapping[str, str],
    families: Mapping[str, str],
    settings: FamilySplitSettings,
) -> dict[str, str]:
    """Add a part ``test_new`` to a split: all proteins of families that are in no other part.

    Args:
        split: from :func:`split_within_families`; changed in place.
        proteins: residues for each name of the split.
        new: residues for each name of the new families.
        families: family for each name in ``new``.
        settings: what the split was made with.

    Returns:
        Residues for each name of both.

    Raises:
        ValueError: a name or a family is in the split already.
    """
    known = set(split.clusters.values())
    for name in new:
        if name in proteins or families[name] in known:
            what = name if name in proteins else f"the family {families[name]}"
            raise ValueError(f"--new_families: {what} is among the proteins of --data, too")
    together = {**proteins, **new}
    split.parts[NEW_FAMILIES] = list(new)
    split.clusters.update(families)
    split.report["families"][NEW_FAMILIES] = len(set(families.values()))
    split.report["leakage"][NEW_FAMILIES] = family_leakage(
        together, list(new), split.parts["train"], _search_settings(settings)
    )
    return together


def _at_most(names: Sequence[str], families: Mapping[str, str], count: int) -> list[str]:
    """Return the first ``count`` names of each family."""
    taken: Counter[str] = Counter()
    chosen = []
    for name in names:
        if taken[families[name]] < count:
            taken[families[name]] += 1
            chosen.append(name)
    return chosen


def family_leakage(
    proteins: Mapping[str, str],
    held_out: Sequence[str],
    train: Sequence[str],
    settings: SplitSettings,
) -> dict[str, int]:
    """Count held-out proteins by their highest identity to train over half their length."""
    best = covering_identities(proteins, held_out, train, settings)
    return {
        "proteins": len(held_out),
        "any_hit": len(best),
        "identity_30": sum(identity >= 0.3 for identity in best.values()),
        "identity_50": sum(identity >= 0.5 for identity in best.values()),
    }

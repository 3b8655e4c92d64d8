"""Splits proteins within their families: held-out members are new, their families are known.

A split by homology (:mod:`src.proteins.splits`) asks what a model knows of proteins without any relative in
training. Here every family is in training, and whole clusters of its members are held out: this
asks what the model has learnt of the families themselves.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from src.proteins.splits import (
    Split,
    SplitSettings,
    covering_identities,
    homology_clusters,
    split_hash,
)

FAMILY_KEY = "family"
NEW_FAMILIES = "test_new"


@dataclass(frozen=True)
class FamilySplitSettings:
    """How members of families are held out. Identities and coverages are shares in [0, 1]."""

    seed: int = 0
    identity: float = 0.5
    coverage: float = 0.5
    validation_per_family: int = 6
    test_per_family: int = 16
    largest_share: float = 0.2
    """Of a family's members: at most so many are held out."""
    spare_factor: float = 1.5
    """Members drawn for each wanted: some are lost to the search for relatives."""

    def __post_init__(self) -> None:
        """Check every setting. Raises ``ValueError``."""
        for name in ("identity", "coverage", "largest_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"--{name} must be in (0, 1], got {getattr(self, name)}")
        for name in ("validation_per_family", "test_per_family"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}")


def read_families(path: str | Path, names: Mapping[str, str]) -> dict[str, str]:
    """Return the family of each protein of a FASTA file, from ``family=NAME`` in its header.

    Args:
        path: FASTA, gzipped or not.
        names: the proteins that need one, by name.

    Raises:
        ValueError: a protein has no family in its header.
    """
    from src.proteins.sources import ReadReport, guarded_lines

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


def largest_families(families: Mapping[str, str], count: int) -> list[str]:
    """Return the names of the ``count`` families with the most members, largest first."""
    sizes = Counter(families.values())
    return sorted(sizes, key=lambda family: (-sizes[family], family))[:count]


def split_within_families(
    proteins: Mapping[str, str],
    families: Mapping[str, str],
    settings: FamilySplitSettings,
    announce: Callable[[str], None] = lambda line: None,
) -> Split:
    """Divide the members of each family into train, validation and test by identity clusters.

    Clusters (connected components at ``identity`` over ``coverage`` of both) are drawn at random,
    small ones first within a draw of equal chance; whole clusters are held out, so that a family
    whose members are all alike may give none. A held-out protein with a local alignment at
    ``identity`` over ``coverage`` of its own length to a training protein, or of a test protein to
    a validation protein, is left out.

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
    search = SplitSettings(
        seed=settings.seed,
        cluster_identity=settings.identity,
        cluster_coverage=settings.coverage,
        leak_identity=settings.identity,
    )
    announce(f"clustering {len(proteins):,} proteins at {settings.identity:.0%}")
    clusters = homology_clusters(proteins, search, connected=True)
    members: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(proteins):
        members[families[name]][clusters[name]].append(name)

    rng = random.Random(settings.seed)
    drawn: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    wanted = {"test": settings.test_per_family, "validation": settings.validation_per_family}
    for family in sorted(members):
        groups = [members[family][key] for key in sorted(members[family])]
        rng.shuffle(groups)
        size = sum(map(len, groups))
        room = {
            part: min(
                round(count * settings.spare_factor),
                int(size * settings.largest_share * count / max(1, sum(wanted.values()))),
            )
            for part, count in wanted.items()
        }
        for group in groups:
            fits = [part for part in wanted if len(group) <= room[part]]
            part = fits[0] if fits else "train"
            drawn[part] += group
            if fits:
                room[part] -= len(group)
    rng.shuffle(drawn["train"])

    announce(
        f"searching {len(drawn['test']) + len(drawn['validation']):,} held-out proteins "
        f"in {len(drawn['train']):,}"
    )
    left_out: Counter[str] = Counter()
    kept: dict[str, list[str]] = {"train": drawn["train"]}
    against = list(drawn["train"])
    for part in ("validation", "test"):
        found = covering_identities(proteins, drawn[part], against, search)
        clean = [n for n in drawn[part] if found.get(n, 0.0) < settings.identity]
        left_out[f"{part}: relative in train or validation"] = len(drawn[part]) - len(clean)
        kept[part] = _at_most(clean, families, wanted[part])
        against += kept[part]
    announce("searching for leaks once more, for the report")
    report = {
        "settings": asdict(settings),
        "left_out": dict(left_out),
        "all_clusters": len(set(clusters.values())),
        "leakage": {
            part: family_leakage(proteins, kept[part], kept["train"], search)
            for part in ("validation", "test")
        },
        "families": {part: len({families[n] for n in names}) for part, names in kept.items()},
        "split_hash": split_hash({p: [proteins[n] for n in ns] for p, ns in kept.items()}),
    }
    return Split(kept, dict(families), report)


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

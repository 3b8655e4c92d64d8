"""Reads one family of proteins and splits it for adaptation: train, validation and test members.

Whole identity clusters are held out, so that a test member is new to the model and not a near copy
of what it was trained on. A family may be as small as ten proteins; :attr:`FamilySplit.notes` says
what cannot be judged then.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from src.common.cli import unheard
from src.proteins.homology import Hit, SearchSettings, alignments
from src.proteins.split_files import read_named
from src.proteins.splits import Split, leakage_counts

LEAST_MEMBERS = 10
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1
MOST_TEST, MOST_VALIDATION = 200, 100
VALIDATION_CLUSTER = 1.5
TEST_CLUSTERS = (0.5, 1.5)
"""A held-out cluster is at most this share of what its part is to have. Two clusters in the test
give an interval; the second share is tried if no cluster is as small as the first."""
GROUP_SHARE = 0.1
LEAST_GROUP = 3
"""A second group of relatives of so many members, and this share of all, is a second family."""
ROUGH = 5
"""Test members below which their figures are called rough."""


@dataclass(frozen=True)
class FamilySettings:
    """How a family is split: identity and coverage of the clusters, and the seed of the draw."""

    test_identity: float = 0.6
    coverage: float = 0.5
    seed: int = 0


@dataclass
class FamilySplit:
    """A split, the settings it was made with, and lines on what it cannot show."""

    split: Split
    settings: FamilySettings
    notes: list[str] = field(default_factory=list)


def read_family(
    path: str | Path,
    fits: Callable[[Sequence[str]], np.ndarray],
    limit: str,
    announce: Callable[[str], None] = unheard,
) -> dict[str, str]:
    """Return the distinct members of a family that a model takes, by name.

    Args:
        path: one file of proteins (:mod:`src.proteins.sources`).
        fits: returns of each protein whether the model takes it, ``(P,)`` bool.
        limit: what the model takes, for the message.
        announce: called with a line for each kind of protein left out.

    Raises:
        ValueError: the file is broken, or holds fewer than ten different proteins that fit.
    """
    if Path(path).is_dir():
        raise ValueError(f"--family {path}: is a directory without train and validation parts")
    proteins, report = read_named(path)
    for line in report.lines():
        announce(line)
    distinct: dict[str, str] = {}
    for name, residues in proteins.items():
        distinct.setdefault(residues, name)
    members = {name: residues for residues, name in distinct.items()}
    kept = dict(compress(members.items(), fits(list(members.values()))))
    longer = len(members) - len(kept)
    if longer:
        first = next(name for name in members if name not in kept)
        announce(f"{longer:,} of {len(members):,} proteins are left out, {first} first: {limit}")
    if len(kept) < LEAST_MEMBERS:
        counts = f"{len(proteins):,} proteins, {len(members):,} of them distinct"
        counts += f", {len(kept):,} of these short enough ({limit})" if longer else ""
        raise ValueError(
            f"--family {path}: {counts}: at least {LEAST_MEMBERS} members are needed to adapt to a "
            "family and to judge it" + ("; name a --model that takes more" if longer else "")
        )
    return kept


def family_hits_of(members: Mapping[str, str]) -> list[Hit]:
    """Return the hits of an all-against-all search of the members (E-value 0.001).

    Raises:
        ValueError: MMseqs2 is missing or fails.
    """
    names = list(members)
    return alignments(members, names, names, SearchSettings())


def connected(names: Sequence[str], hits: Sequence[Hit]) -> list[list[str]]:
    """Return the connected components of the members under the hits, the largest first."""
    place = {name: i for i, name in enumerate(names)}
    pairs = np.array([[place[h.query], place[h.target]] for h in hits], dtype=int).reshape(-1, 2)
    graph = sparse.coo_matrix((np.ones(len(pairs)), pairs.T), shape=(len(names), len(names)))
    _, labels = csgraph.connected_components(graph, directed=False)
    groups = [
        [names[int(i)] for i in np.flatnonzero(labels == label)] for label in np.unique(labels)
    ]
    return sorted(groups, key=len, reverse=True)


def require_one_family(
    path: str | Path, members: Mapping[str, str], hits: Sequence[Hit]
) -> list[str]:
    """Return the members without a detectable relative in the largest group.

    Raises:
        ValueError: a second group is as large as a family of its own.
    """
    groups = connected(list(members), hits)
    large = [g for g in groups if len(g) >= max(LEAST_GROUP, GROUP_SHARE * len(members))]
    if len(large) != 1:
        shown = ", ".join(f"{len(g):,} members from {g[0]} on" for g in large[:4])
        if not large:
            raise ValueError(
                f"--family {path}: hardly any member has a detectable relative among the others: "
                "this is no family; pass --allow_mixed to go on"
            )
        raise ValueError(
            f"--family {path}: {len(large)} groups without a detectable relative in another "
            f"({shown}): give one family at a time, or pass --allow_mixed"
        )
    return [name for group in groups if group is not large[0] for name in group]


def split_family(
    members: Mapping[str, str], hits: Sequence[Hit], settings: FamilySettings | None = None
) -> FamilySplit:
    """Split a family's members by identity clusters: about 70 % train, 10 % validation, 20 % test.

    ``hits`` are of :func:`family_hits_of`. Clusters are connected components of alignments of at
    least ``test_identity`` over ``coverage`` of one of both members. Each goes to one part, so no
    held-out member has such an alignment with a training member, unless the notes say so. They are
    drawn in proportion to their size, as if members were drawn (Efraimidis and Spirakis 2006).
    """
    settings = settings or FamilySettings()
    close = [
        h for h in hits if h.identity >= settings.test_identity and h.coverage >= settings.coverage
    ]
    groups = connected(sorted(members), close)
    rng = random.Random(settings.seed)
    keys = [rng.random() ** (1 / len(group)) for group in groups]
    groups = [groups[i] for i in sorted(range(len(groups)), key=lambda i: -keys[i])]
    count = len(members)
    wanted = {
        "test": min(MOST_TEST, max(2, round(TEST_SHARE * count))),
        "validation": min(MOST_VALIDATION, max(2, round(VALIDATION_SHARE * count))),
    }
    parts: dict[str, list[str]] = {}
    for share in TEST_CLUSTERS:
        parts = _drawn(groups, wanted, {"test": share, "validation": VALIDATION_CLUSTER})
        if parts["test"]:
            break
    rng.shuffle(parts["train"])
    notes = []
    drawn_at_random = not parts["validation"]
    if drawn_at_random:
        size = wanted["validation"]
        parts["validation"], parts["train"] = parts["train"][:size], parts["train"][size:]
        notes.append(
            "no identity cluster was small enough to be set aside for validation: its members were "
            "drawn at random and have close relatives in train, so early stopping comes late"
        )
    clusters = {name: group[0] for group in groups for name in group}
    tested = parts["test"]
    notes += test_notes(len(tested), len({clusters[n] for n in tested}), settings.test_identity)
    if not tested:
        del parts["test"]
    report = {"all_clusters": len(groups), "leakage": _leakage(parts, hits, settings)}
    shared = frozenset(clusters[n] for n in parts["validation"]) if drawn_at_random else frozenset()
    return FamilySplit(Split(parts, clusters, report, shared), settings, notes)


def _drawn(
    groups: Sequence[Sequence[str]], wanted: Mapping[str, int], shares: Mapping[str, float]
) -> dict[str, list[str]]:
    """Give each cluster in turn to the held-out part that lacks most, or to train."""
    parts: dict[str, list[str]] = {"train": [], **{part: [] for part in wanted}}
    for group in groups:
        part = min(wanted, key=lambda name: len(parts[name]) / wanted[name])
        lacks = len(parts[part]) < wanted[part]
        small = len(group) <= max(1, shares[part] * wanted[part])
        parts[part if lacks and small else "train"] += group
    return parts


def _leakage(
    parts: Mapping[str, Sequence[str]], hits: Sequence[Hit], settings: FamilySettings
) -> dict[str, dict[str, int]]:
    """Count held-out members by their highest identity to train over ``coverage`` of themselves."""
    train = set(parts["train"])
    best: dict[str, float] = {}
    for hit in hits:
        if hit.target in train and hit.coverage >= settings.coverage:
            best[hit.query] = max(best.get(hit.query, 0.0), hit.identity)
    return {part: leakage_counts(best, names) for part, names in parts.items() if part != "train"}


def test_notes(proteins: int, clusters: int, test_identity: float) -> list[str]:
    """Return lines on what so few test members cannot show."""
    if not proteins:
        return [
            f"no cluster of members at {test_identity:.0%} identity was small enough to be held "
            "out for a test, so nothing can be judged on held-out members: raise --test_identity"
        ]
    if clusters < 2:
        return [f"the {proteins} test members form one cluster: there are no intervals"]
    if proteins < ROUGH:
        return [f"only {proteins} test members: their figures are rough"]
    return []

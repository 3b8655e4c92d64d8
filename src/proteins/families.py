"""Splits proteins within their families: held-out members are new, their families are known.

A split by homology (:mod:`src.proteins.splits`) measures a model on proteins without any relative
in training. Here every family is in training, and some members are held out together with their
close relatives, which measures how well the model has learnt the families themselves.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from src.common.cli import listed, unheard
from src.common.files import gzipped, write_text
from src.proteins.homology import alignments
from src.proteins.readers import guarded_lines
from src.proteins.reading import ReadReport
from src.proteins.relatives import open_profiles, profile_key, profile_scores
from src.proteins.split_files import FAMILY_KEY
from src.proteins.splits import Split, SplitSettings, leakages

NEW_FAMILIES = "test_new"


@dataclass(frozen=True)
class FamilySplitSettings:
    """How members of families are held out. Identities, coverages and shares are in (0, 1]."""

    seed: int = 0
    identity: float = 0.5
    coverage: float = 0.5
    validation_per_family: int = 6
    test_per_family: int = 12
    least_test: int = 3
    """A family that gives fewer test proteins, or fewer than all wanted, is left out."""
    largest_share: float = 0.4
    """Share of a family that is kept out of train at most: held-out members and their relatives."""
    largest_neighbourhood: float = 0.2
    """Share of a family that one held-out member and its relatives make up at most."""
    candidates_per_family: int = 72
    """Members drawn to hold out; most have too many relatives, or relatives held out already."""


def read_families(path: str | Path, names: Mapping[str, str]) -> dict[str, str]:
    """Return the families of ``names`` in a FASTA file, gzipped or not: ``family=NAME`` in headers.

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
        raise ValueError(
            f"{path}: {missing} has no 'family=NAME' in its header, or a name that another has too"
        )
    return {name: families[name] for name in names}


def described_families(
    proteins: Mapping[str, str],
    families: Mapping[str, str],
    scores: Mapping[str, float],
    least_score: float,
    least_length: float = 60,
) -> list[str]:
    """Return the families that their profiles describe well, the best first.

    The log-odds score of a protein against its family's profile says how much the family's
    conservation tells about its residues: about what a model can learn that has seen only members.

    Args:
        proteins: residues for each name.
        families: family for each name.
        scores: log-odds in nats for each name (:func:`src.proteins.relatives.profile_scores`).
        least_score: nats per residue, over all members.
        least_length: mean length of the members.
    """
    per_residue = {}
    for family, names in _members(proteins, families).items():
        residues = sum(len(proteins[name]) for name in names)
        if residues >= least_length * len(names):
            per_residue[family] = sum(scores[name] for name in names) / residues
    chosen = [family for family, score in per_residue.items() if score >= least_score]
    return sorted(chosen, key=lambda family: (-per_residue[family], family))


def _members(names: Iterable[str], families: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names of each family, in the order given."""
    members: dict[str, list[str]] = defaultdict(list)
    for name in names:
        members[families[name]].append(name)
    return members


class ProfileSearch:
    """Searches proteins with the profiles of a file (HMM), each protein once."""

    def __init__(self, profiles: Path) -> None:
        self.profiles = profiles
        self._found: dict[str, dict[str, float]] = {}

    def scores(self, proteins: Sequence[str]) -> dict[str, np.ndarray]:
        """Return what :func:`src.proteins.relatives.profile_scores` returns, and raise the same."""
        new = [p for p in dict.fromkeys(proteins) if p not in self._found]
        self._found |= {p: {} for p in new}
        for key, values in (profile_scores(new, self.profiles) if new else {}).items():
            for place in np.flatnonzero(values):
                self._found[new[place]][key] = float(values[place])
        keys = dict.fromkeys(key for p in proteins for key in self._found[p])
        return {k: np.array([self._found[p].get(k, 0.0) for p in proteins]) for k in keys}

    def best(self, proteins: Mapping[str, str]) -> dict[str, float]:
        """Return each protein's highest log-odds score under any profile, nats; 0 without a hit."""
        scores = self.scores(list(proteins.values()))
        best = np.max([*scores.values(), np.zeros(len(proteins))], axis=0)
        return dict(zip(proteins, best.tolist(), strict=True))


def split_within_families(
    proteins: Mapping[str, str],
    families: Mapping[str, str],
    settings: FamilySplitSettings,
    announce: Callable[[str], None] = unheard,
) -> Split:
    """Hold out members of each family, and keep their relatives out of train.

    Members are drawn by chance. A relative of a protein has a local alignment with it over
    ``coverage`` of the drawn protein at ``identity`` or more. A drawn member is held out, and its
    relatives are in no part, unless it is a relative of a held-out member or would cost too much
    of the family. The first of each family are in test, the next in validation, the rest of the
    family is in train.

    Returns:
        The parts, the family of each protein as its cluster, and the leakage report.

    Raises:
        ValueError: MMseqs2 is missing or fails, or no family has members to hold out.
    """
    search = _search_settings(settings)
    rng = random.Random(settings.seed)
    members = _members(sorted(proteins), families)
    drawn = {
        family: rng.sample(members[family], len(members[family]))[: settings.candidates_per_family]
        for family in sorted(members)
    }
    queries = [name for names in drawn.values() for name in names]
    announce(f"searching the relatives of {len(queries):,} proteins among {len(proteins):,}")
    relatives: dict[str, set[str]] = defaultdict(set)
    # Of a large family all relatives count: the others would stay in train.
    most = max(1000, *(len(names) for names in members.values()))
    for hit in alignments(proteins, queries, list(proteins), search, most):
        if hit.identity >= settings.identity and hit.coverage >= settings.coverage:
            relatives[hit.query].add(hit.target)
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    left_out: Counter[str] = Counter()
    kept_out: set[str] = set()
    lost: list[str] = []
    for family, names in drawn.items():
        test, validation, near = _held_out(names, relatives, len(members[family]), settings)
        if len(test) < min(settings.least_test, settings.test_per_family):
            left_out["in a family with too few members to hold out"] += len(members[family])
            lost.append(family)
            continue
        parts["test"] += test
        parts["validation"] += validation
        parts["train"] += members[family]
        kept_out |= near
    if not parts["train"]:
        raise ValueError(
            "no family has members whose relatives can be kept out of train: lower "
            "--least_score, or give families with more, and more diverse, members"
        )
    if lost:
        announce(
            f"{len(lost):,} families are left out whole, because their members are too few or too "
            f"much alike to hold some out: {listed(lost)}"
        )
    parts["train"] = [name for name in parts["train"] if name not in kept_out]
    held_out = len(parts["test"]) + len(parts["validation"])
    left_out["relative of a held-out protein"] = len(kept_out) - held_out
    rng.shuffle(parts["train"])
    report = {
        "left_out": dict(left_out),
        "families": {part: len({families[n] for n in names}) for part, names in parts.items()},
    }
    return Split(parts, dict(families), report, frozenset(families.values()))


def _held_out(
    drawn: Sequence[str],
    relatives: Mapping[str, set[str]],
    members: int,
    settings: FamilySplitSettings,
) -> tuple[list[str], list[str], set[str]]:
    """Return a family's test and validation members, and all that must not be in train."""
    wanted = settings.test_per_family + settings.validation_per_family
    near: set[str] = set()
    held: list[str] = []
    for name in drawn:
        more = ({name} | relatives.get(name, set())) - near
        if (
            len(held) < wanted
            and name not in near
            and not relatives.get(name, set()) & set(held)
            and len(more) <= settings.largest_neighbourhood * members
            and len(near) + len(more) <= settings.largest_share * members
        ):
            near |= more
            held.append(name)
    count = round(len(held) * settings.test_per_family / wanted) if wanted else 0
    return held[:count], held[count:], near


def _search_settings(settings: FamilySplitSettings) -> SplitSettings:
    return SplitSettings(
        seed=settings.seed,
        cluster_identity=settings.identity,
        cluster_coverage=settings.coverage,
        leak_identity=settings.identity,
    )


def add_new_families(
    split: Split,
    proteins: Mapping[str, str],
    new: Mapping[str, str],
    families: Mapping[str, str],
) -> dict[str, str]:
    """Add a part ``test_new`` to a split: all proteins of families that are in no other part.

    The split, from :func:`split_within_families`, is changed in place.

    Returns:
        Residues for each name of both.

    Raises:
        ValueError: a name or a family is in the split already.
    """
    known = split.families
    for name in new:
        if name in proteins or families[name] in known:
            what = name if name in proteins else f"the family {families[name]}"
            raise ValueError(f"--new_families: {what} is among the proteins of --data, too")
    together = {**proteins, **new}
    split.parts[NEW_FAMILIES] = list(new)
    split.clusters.update(families)
    split.families |= set(families.values())
    split.report["families"][NEW_FAMILIES] = len(set(families.values()))
    return together


def add_other_proteins(
    split: Split,
    proteins: Mapping[str, str],
    others: Mapping[str, str],
    count: int,
    settings: FamilySplitSettings,
) -> dict[str, str]:
    """Add proteins of no family of the split to train, without relatives of held-out proteins.

    The split, from :func:`split_within_families`, is changed in place. None of the ``proteins``
    known so far is added.

    Returns:
        Residues for each name of all.

    Raises:
        ValueError: MMseqs2 fails, or ``others`` has too few proteins.
    """
    rng = random.Random(settings.seed)
    sequences = set(proteins.values())
    names = [n for n in others if n not in proteins and others[n] not in sequences]
    drawn = rng.sample(names, min(len(names), count + count // 4))
    together = {**proteins, **{name: others[name] for name in drawn}}
    held_out = [
        n for part, part_names in split.parts.items() if part != "train" for n in part_names
    ]
    related = {
        hit.query for hit in alignments(together, drawn, held_out, _search_settings(settings))
    }
    added = [name for name in drawn if name not in related][:count]
    if len(added) < count:
        raise ValueError(f"--others: {len(added):,} proteins can be added, not {count:,}")
    split.parts["train"] += added
    rng.shuffle(split.parts["train"])
    split.clusters.update({name: name for name in added})
    split.report["others"] = {"added": len(added), "left_out_as_relatives": len(related)}
    return {name: residues for name, residues in together.items() if name in split.clusters}


def report_leakage(
    split: Split, proteins: Mapping[str, str], settings: FamilySplitSettings
) -> None:
    """Put the leakage of every held-out part into a split's report, once all parts are complete.

    Alignments over ``coverage`` of the held-out protein count.
    """
    search = _search_settings(settings)
    split.report["leakage"] = leakages(proteins, split.parts, search, settings.coverage)


def write_profiles(
    folder: Path, proteins: Mapping[str, str], split: Split, search: ProfileSearch
) -> int:
    """Write the profiles of a split's families, and a table of the families, into its directory.

    The directory must exist. A family's profile is the one with the highest sum of scores over its
    members. The table ``families.tsv`` has, for each family, its proteins in each part, its
    profile (``-`` where none hits a member), and the mean log-odds score in nats per residue.
    ``families.hmm.gz`` has the profiles as they were.

    Returns:
        The number of profiles written.

    Raises:
        ValueError: pyhmmer is missing, or the profiles are no HMM file.
    """
    part_of = {name: part for part, names in split.parts.items() for name in names}
    names = [name for name in part_of if split.clusters[name] in split.families]
    scores = search.scores([proteins[name] for name in names])
    rows: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(names):
        rows[split.clusters[name]].append(row)
    kept: set[str] = set()
    lines = ["\t".join(["family", *split.parts, "profile", "score_per_residue"])]
    for family in sorted(rows):
        sums = {key: float(values[rows[family]].sum()) for key, values in scores.items()}
        key = max(sums, key=lambda k: sums[k], default="-")
        score = sums.get(key, 0.0)
        key = key if score > 0 else "-"
        kept.add(key)
        counts = Counter(part_of[names[row]] for row in rows[family])
        residues = sum(len(proteins[names[row]]) for row in rows[family])
        fields = [
            family,
            *(counts[part] for part in split.parts),
            key,
            f"{score / residues:.3f}",
        ]
        lines.append("\t".join(map(str, fields)))
    write_text(folder / "families.tsv", "\n".join(lines) + "\n")
    with (
        open_profiles(search.profiles) as file,
        (folder / "families.hmm.gz").open("wb") as raw,
        gzipped(raw) as packed,
    ):
        for profile in file:
            if profile_key(profile) in kept:
                profile.write(packed)
    return len(kept - {"-"})

"""Samples proteins of a family from an adapted model, drops the useless ones and ranks the rest."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from src.common.cli import say
from src.common.files import atomic_write
from src.evaluation.composition import low_complexity_share, repeat_share
from src.evaluation.filters import (
    LOW_COMPLEXITY,
    MOST_LOW_COMPLEXITY,
    MOST_REPEATS,
    NO_HIT,
    REPEATED,
    SEEN,
    TOO_CLOSE,
    WHY,
)
from src.evaluation.generation import GenerationSettings, sample_proteins
from src.evaluation.sampler import fitted_length
from src.evaluation.scoring import score_proteins
from src.evaluation.sequence_quality import DescriptionSettings, describe_all
from src.models.loading import ProteinModel
from src.proteins.fasta import FastaRecord, write_fasta
from src.proteins.profiles import profile_bits, read_profiles
from src.proteins.relatives import family_hits, nearest_identities
from src.proteins.sources import Protein

TEMPERATURES = (1.0, 0.85, 0.7, 0.55)
"""Tried in this order where no temperature is given. At 1 the samples are those that the model has
learnt, and the most diverse; a weak model's are then too far from the family."""
PILOT = 64
"""Proteins sampled at each temperature that is tried."""
PILOT_KEPT = 0.5
"""The first temperature at which this share of the pilot is kept is taken, else the best one, and
of equal ones the lowest."""
LENGTH_FACTOR = 1.5
"""Longer samples than this many times the longest member are discarded."""
ATTEMPTS = 4
"""Proteins begun for each one wanted, at most."""
DESCRIBED = 200
"""Proteins of a set that are described: the first samples, and the best candidates."""
KEPT, SAMPLED = "kept", "sampled"
SHARES = {
    REPEATED: (repeat_share, MOST_REPEATS),
    LOW_COMPLEXITY: (low_complexity_share, MOST_LOW_COMPLEXITY),
}
"""For each reason: the share of residues, and the limit where no member has more."""


@dataclass(frozen=True)
class CandidateSettings:
    """How candidates are sampled and chosen.

    Attributes:
        num_candidates: proteins sampled, before any is dropped.
        temperature: of the sampling; 1 samples what the model has learnt, less keeps closer to
            its likeliest proteins. None: chosen by a pilot (:func:`choose_temperature`).
        top_p: sample among the likeliest tokens that hold this share of the probability.
        max_identity: share of a candidate's residues that are identical in its nearest training
            member, above which it is a near copy.
        seed: of the sampling.
        batch_size: proteins sampled at a time.
    """

    num_candidates: int = 1000
    temperature: float | None = None
    top_p: float = 1.0
    max_identity: float = 0.9
    seed: int = 0
    batch_size: int = 128


def sample_family(
    model: str | Path,
    settings: CandidateSettings,
    longest: int,
    device: Any = "cpu",
    announce: Callable[[str], None] = say,
) -> dict[str, Any]:
    """Sample whole proteins, every token by its probability, and score them.

    ``longest`` is the number of residues of the family's longest member.

    Returns:
        ``samples``, ``nll`` ``(P,)`` in nats, ``counts`` of attempts and ``proteins_per_second``.
    """
    loaded = ProteinModel.load(model, device)
    wanted = GenerationSettings(
        num_sequences=settings.num_candidates,
        max_length=round(LENGTH_FACTOR * longest),
        top_k=0,
        top_p=settings.top_p,
        repetition_penalty=1.0,
        temperature=settings.temperature or TEMPERATURES[0],
        seed=settings.seed,
        batch_size=settings.batch_size,
        max_attempts=ATTEMPTS * settings.num_candidates,
    )
    wanted = fitted_length(*loaded, wanted)
    result = sample_proteins(*loaded, wanted, announce=announce)
    if len(result.proteins) < settings.num_candidates:
        announce(
            f"only {len(result.proteins):,} of {settings.num_candidates:,} proteins were ended "
            f"within {result.tally.attempts:,} attempts ({result.tally.reasons})"
        )
    samples = result.sequences
    return {
        "samples": samples,
        "nll": score_proteins(*loaded, samples).nll,
        "counts": result.counts,
        "proteins_per_second": len(samples) / result.seconds,
    }


def choose_temperature(
    settings: CandidateSettings,
    sample: Callable[[CandidateSettings], Mapping[str, Any]],
    judge: Callable[[Mapping[str, Any]], Mapping[str, Sequence[Any]]],
) -> tuple[float, dict[str, float]]:
    """Return the temperature to sample at, and the share of a pilot that was kept at each tried.

    ``sample`` draws a pilot (:func:`sample_family`), ``judge`` returns its table (:func:`assess`).
    """
    kept: dict[float, float] = {}
    for temperature in TEMPERATURES:
        pilot = replace(settings, num_candidates=PILOT, temperature=temperature)
        drawn = sample(pilot)
        count = drop_counts(judge(drawn))[KEPT] if drawn["samples"] else 0
        kept[temperature] = count / PILOT
        if kept[temperature] >= PILOT_KEPT:
            break
    return max(kept, key=lambda t: (kept[t], -t)), {f"{t:g}": share for t, share in kept.items()}


def limits_of(members: Sequence[str]) -> dict[str, float]:
    """Return the share of repeats and of low complexity above which a candidate is dropped.

    They are those of :mod:`src.evaluation.filters`, or the largest of the family's own members.
    """
    return {
        reason: max(most, *(share(member) for member in members))
        for reason, (share, most) in SHARES.items()
    }


def assess(
    samples: Sequence[str],
    nll: np.ndarray,
    train: Sequence[Protein],
    profile: Path,
    max_identity: float,
) -> dict[str, Any]:
    """Return the columns of the table of candidates; the best kept one has rank 1.

    A sample is dropped for the first reason of :data:`src.evaluation.filters.WHY` that applies.
    Kept ones are ranked by the mean of two ranks: by nats per residue under the model and by bits
    per residue of the profile, so that neither a short nor a long protein is preferred.

    Args:
        samples: residues of each.
        nll: ``(P,)`` of each under the model, in nats.
        train: the training members.
        profile: HMM file of the family.
        max_identity: see :class:`CandidateSettings`.
    """
    members = [protein.residues for protein in train]
    limits = limits_of(members)
    nearest = nearest_identities(samples, members)
    hit = family_hits(samples, profile)["hit"]
    bits = profile_bits(read_profiles(profile), samples)
    shares = {
        reason: np.array([share(s) for s in samples]) for reason, (share, _) in SHARES.items()
    }
    lengths = np.array([len(s) for s in samples])
    first: dict[str, int] = {}
    repeated = np.array([first.setdefault(s, i) != i for i, s in enumerate(samples)])
    faults = {
        SEEN: repeated,
        TOO_CLOSE: nearest["identity"] > max_identity,
        **{reason: shares[reason] > limits[reason] for reason in SHARES},
        NO_HIT: ~hit,
    }
    dropped = ["" for _ in samples]
    for reason in reversed(WHY):
        dropped = [reason if bad else d for bad, d in zip(faults[reason], dropped, strict=True)]
    kept = np.array([d == "" for d in dropped])
    nats = nll / lengths
    rank = np.zeros(len(samples), dtype=int)
    if kept.any():
        score = np.nan_to_num(bits, nan=-np.inf) / lengths
        both = stats.rankdata(nats[kept]) + stats.rankdata(-score[kept])
        rank[kept] = stats.rankdata(both, method="ordinal").astype(int)
    return {
        "name": [f"candidate_{i:05d}" for i in range(1, len(samples) + 1)],
        "rank": [int(r) or None for r in rank],
        "dropped": dropped,
        "residues": lengths.tolist(),
        "nats_per_residue": [float(v) for v in nats],
        "profile_bits": [float(v) if np.isfinite(v) else None for v in bits],
        "profile_hit": hit.tolist(),
        "nearest_identity": nearest["identity"].tolist(),
        "nearest_member": [train[int(i)].name if i >= 0 else "" for i in nearest["target"]],
        "repeat_share": shares[REPEATED].tolist(),
        "low_complexity_share": shares[LOW_COMPLEXITY].tolist(),
        "sequence": list(samples),
    }


def ranked(table: Mapping[str, Sequence[Any]]) -> list[int]:
    """Return the rows of the kept candidates, the best first."""
    rows = [i for i, rank in enumerate(table["rank"]) if rank]
    return sorted(rows, key=lambda i: table["rank"][i])


def write_candidates(folder: Path, table: Mapping[str, Sequence[Any]]) -> None:
    """Write ``candidates.csv``, every sample and why it was dropped, and the kept ones as FASTA.

    Ranked candidates come first in the table, and alone in ``candidates.fasta``.
    """
    best = ranked(table)
    others = [i for i, rank in enumerate(table["rank"]) if not rank]
    with atomic_write(folder / "candidates.csv") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(table)
        for i in best + others:
            writer.writerow([_cell(column[i]) for column in table.values()])
    shown = ("rank", "nats_per_residue", "profile_bits", "nearest_identity", "nearest_member")
    records = [
        FastaRecord(table["name"][i], table["sequence"][i], {k: table[k][i] for k in shown})
        for i in best
    ]
    write_fasta(folder / "candidates.fasta", records)


def read_table(path: Path) -> dict[str, list[str]]:
    """Return the columns of ``candidates.csv`` as text."""
    with path.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    return {name: [row[name] for row in rows] for name in rows[0]}


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else value


def drop_counts(table: Mapping[str, Sequence[Any]]) -> dict[str, int]:
    """Return how many samples were kept, and dropped for each reason."""
    counts = {KEPT: sum(d == "" for d in table["dropped"])}
    return counts | {r: n for r in WHY if (n := sum(d == r for d in table["dropped"]))}


def drop_lines(counts: Mapping[str, int]) -> list[str]:
    """Return how many samples were kept and dropped, by reason and why it is one."""
    return [f"{counts[KEPT]:,} of {sum(counts.values()):,} samples are kept"] + [
        f"  {counts[reason]:,} dropped: {reason} ({why})"
        for reason, why in WHY.items()
        if reason in counts
    ]


def describe_candidates(
    table: Mapping[str, Sequence[Any]],
    natural: Sequence[str],
    train: Sequence[str],
    profile: Path,
    score: Callable[[Sequence[str]], np.ndarray],
    seed: int = 0,
) -> dict[str, Any]:
    """Describe the samples and the best kept ones beside natural and shuffled members.

    ``natural`` are held-out members, or training members where none is held out; identity is that
    to ``train``; ``score`` gives nats of proteins under the adapted model.

    Returns:
        Records of :func:`src.evaluation.sequence_quality.describe` by set.
    """
    sets = {
        SAMPLED: list(table["sequence"][:DESCRIBED]),
        KEPT: [table["sequence"][i] for i in ranked(table)[:DESCRIBED]],
    }
    settings = DescriptionSettings(thorough=True, profiles=profile, bootstrap=1000, seed=seed)
    return describe_all(
        {name: proteins for name, proteins in sets.items() if proteins},
        natural,
        settings,
        train=train,
        score=score,
    )

"""Compares short peptides exactly, which MMseqs2 does not see.

Its prefilter needs two similar k-mers, which takes about 14 residues, and an alignment of fewer
than 30 hardly reaches an E-value of 10⁻³ among a million residues.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import binom

from src.common.cli import progress

SHORT = 30
"""Residues below which a protein is compared exactly."""
LEAST_TWIN = 5
"""Residues from which peptides of one length with one difference are relatives, whatever chance."""


def peptide_hits(
    proteins: Mapping[str, str], queries: Sequence[str], targets: Sequence[str], evalue: float
) -> list[tuple[str, str, float, float]]:
    """Return the pairs of a query and a target, one of them short, that are alike without gaps.

    The shorter of a pair is laid along the longer at every place, also over its ends. Places with
    so many equal residues count that fewer than ``evalue`` are expected among all by chance
    (binomial, from the residues' frequencies); so do twins, peptides of one length of at least
    ``LEAST_TWIN`` residues with at most one difference.

    Returns:
        Query, target, share of the shorter one's residues that are equal, and share of the query
        that is compared.
    """
    similar = []
    short_queries = [name for name in queries if len(proteins[name]) < SHORT]
    short_targets = [name for name in targets if len(proteins[name]) < SHORT]
    for shorts, others, swapped in (
        (short_queries, list(targets), False),
        (short_targets, [n for n in queries if len(proteins[n]) >= SHORT], True),
    ):
        if not shorts or not others:
            continue
        for short, other, identity in _along(proteins, shorts, others, evalue):
            query, target = (other, short) if swapped else (short, other)
            compared = min(1.0, len(proteins[short]) / len(proteins[query]))
            similar.append((query, target, identity, compared))
    return similar


def _along(
    proteins: Mapping[str, str], shorts: Sequence[str], others: Sequence[str], evalue: float
) -> list[tuple[str, str, float]]:
    """Return each short peptide with each other protein that is like it, and the best identity."""
    gap = b"\0" * SHORT
    text = np.frombuffer(gap + gap.join(proteins[n].encode() for n in others) + gap, np.uint8)
    lengths = np.array([len(proteins[name]) for name in others])
    starts = SHORT + np.concatenate([[0], np.cumsum(lengths + SHORT)[:-1]])
    residues = int(lengths.sum())
    mixed = np.frombuffer("".join(proteins[n] for n in shorts).encode(), np.uint8)
    frequencies = [np.bincount(a, minlength=256)[1:] for a in (text, mixed)]
    chance = float(np.prod([f / f.sum() for f in frequencies], axis=0).sum())
    similar = []
    items = progress(shorts, len(shorts), "comparing peptides", "peptides")
    for name in items if len(shorts) * residues > 1e9 else shorts:
        peptide = np.frombuffer(proteins[name].encode(), np.uint8)
        size = len(peptide)
        equal = np.zeros(len(text) - size + 1, np.uint8)
        for place, letter in enumerate(peptide):
            equal += text[place : place + len(equal)] == letter
        counts = np.arange(size + 1)
        expected = residues * binom.sf(counts - 1, size, chance)
        least = int(np.searchsorted(-expected, -evalue))  # the first count that is rare enough
        places = np.flatnonzero(equal >= min(least, max(1, size - 1)))
        which = np.clip(np.searchsorted(starts, places + size // 2, side="right") - 1, 0, None)
        best: dict[int, int] = {}
        for place, index in zip(places.tolist(), which.tolist(), strict=True):
            count = int(equal[place])
            twin = place == starts[index] and size == lengths[index] and size >= LEAST_TWIN
            if count >= least or (twin and count >= size - 1):
                best[index] = max(best.get(index, 0), count)
        similar += [(name, others[index], count / size) for index, count in best.items()]
    return similar

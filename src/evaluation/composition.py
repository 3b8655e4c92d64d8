"""Measures single protein sequences: amino-acid composition, repeats, low complexity."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np
from scipy import special

from src.proteins.layouts import STANDARD_RESIDUES

LOW_COMPLEXITY_WINDOW = 12
LOW_COMPLEXITY_BITS = 2.2
"""Window and entropy of SEG's first pass (Wootton & Federhen 1993, Computers & Chemistry 17:149)"""
LONG_RUN = 6
"""Residues of one kind in a row that count as a repeat."""
LONGEST_UNIT = 30
"""Residues of the longest unit looked for in tandem repeats."""
LEAST_COPIES = 3
LEAST_REPEAT = LONG_RUN
"""A repeat is at least three copies of its unit and at least six residues."""
PSEUDOCOUNT = 0.5


def residue_counts(proteins: Iterable[str]) -> np.ndarray:
    """Count the 20 standard residues, ``(20,)`` in the order of ``STANDARD_RESIDUES``."""
    counts = np.zeros(len(STANDARD_RESIDUES), dtype=np.int64)
    for residues in proteins:
        counts += [residues.count(letter) for letter in STANDARD_RESIDUES]
    return counts


def repeat_share(residues: str) -> float:
    """Return the share of residues in tandem repeats.

    A tandem repeat is a stretch that equals itself shifted by its unit of 1 to 30 residues, at
    least three copies and six residues long: QQQQQQ, GSGSGS, ADEADEADE. 0 of an empty protein.
    """
    letters = np.frombuffer(residues.encode("ascii"), np.uint8)
    covered = np.zeros(len(letters) + 1, dtype=np.int64)
    for unit in range(1, min(LONGEST_UNIT, len(letters) // LEAST_COPIES) + 1):
        same = np.concatenate([[0], letters[unit:] == letters[:-unit], [0]]).astype(np.int8)
        edges = np.flatnonzero(np.diff(same))
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            if stop - start + unit >= max(LEAST_COPIES * unit, LEAST_REPEAT):
                covered[start] += 1
                covered[stop + unit] -= 1
    return float((covered.cumsum()[:-1] > 0).mean()) if len(letters) else 0.0


def composition_kl(generated: np.ndarray, natural: np.ndarray) -> np.ndarray:
    """Return KL(generated‖natural) of two amino-acid compositions, in nats.

    Args:
        generated: ``(..., 20)`` counts; half a count is added to each residue (Jeffreys), so that
            a residue never generated adds a finite amount.
        natural: ``(20,)`` counts, smoothed alike.

    Returns:
        ``(...)``. A sample of N residues of the natural composition itself scores about 19 / (2 N).
    """
    p = _shares(np.asarray(generated, dtype=np.float64))
    q = _shares(np.asarray(natural, dtype=np.float64))
    return special.rel_entr(p, q).sum(-1)


def _shares(counts: np.ndarray) -> np.ndarray:
    smoothed = counts + PSEUDOCOUNT
    return smoothed / smoothed.sum(-1, keepdims=True)


def low_complexity_share(residues: str) -> float:
    """Return the share of residues in a window of 12 with an entropy of at most 2.2 bits.

    The first pass of SEG (Wootton & Federhen 1993). Proteins shorter than the window are one
    window. Returns a share in [0, 1].
    """
    letters = np.frombuffer(residues.encode("ascii"), np.uint8)
    if not len(letters):
        return 0.0
    width = min(LOW_COMPLEXITY_WINDOW, len(letters))
    one_hot = letters[:, None] == np.unique(letters)  # (L, kinds)
    running = np.vstack([np.zeros(one_hot.shape[1], np.int64), one_hot.cumsum(0)])
    share = (running[width:] - running[:-width]) / width  # (windows, kinds)
    bits = special.entr(share).sum(-1) / math.log(2)
    low = (bits <= LOW_COMPLEXITY_BITS).astype(np.int64)
    # A residue is covered when any of the windows that hold it is low.
    starts = np.concatenate([[0], low.cumsum()])
    position = np.arange(len(letters))
    first = np.maximum(0, position - width + 1)
    last = np.minimum(len(low), position + 1)
    return float((starts[last] > starts[first]).mean())


def longest_run(residues: str) -> int:
    """Return the length of the longest stretch of one residue; 0 of an empty protein."""
    return max((sum(1 for _ in run) for _, run in itertools.groupby(residues)), default=0)


def distinct_share(proteins: Iterable[str]) -> float:
    """Return distinct words of four residues over all of them (distinct-4); 0 without any.

    Falls as more is generated: compare sets of the same size.
    """
    words = [p[i : i + 4] for p in proteins for i in range(len(p) - 3)]
    return len(set(words)) / len(words) if words else 0.0

"""Copies of proteins in which residues are replaced by similar ones.

A teacher knows its training proteins by heart, and proteins like them not. On mutated copies it
says what it says of proteins that it has not seen, so that a student that learns from its
distributions alone can learn that, too (Beyer et al. 2022, arXiv:2106.05237, on augmentation in
distillation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from src.proteins.layouts import STANDARD_RESIDUES

ALPHABET = np.frombuffer(STANDARD_RESIDUES.encode(), dtype=np.uint8)


def substitution_probabilities(frequencies: np.ndarray) -> np.ndarray:
    """Return P(b | a), ``(20, 20)``, of the residue b that a substituted residue a becomes.

    P(b | a) ∝ f_b · 2^(S_ab / 2) for b ≠ a, where S is BLOSUM62, whose scores are twice the binary
    logarithm of q_ab / (f_a f_b) (Henikoff & Henikoff 1992, doi:10.1073/pnas.89.22.10915).

    Args:
        frequencies: ``(20,)`` f, in the order of ``STANDARD_RESIDUES``.
    """
    from Bio.Align import substitution_matrices

    matrix: Any = substitution_matrices.load("BLOSUM62")
    scores = np.array([[matrix[a][b] for b in STANDARD_RESIDUES] for a in STANDARD_RESIDUES])
    weights = frequencies * 2.0 ** (scores / 2)
    np.fill_diagonal(weights, 0)
    return weights / weights.sum(1, keepdims=True)


def mutated_copies(
    proteins: Sequence[str], least: float, most: float, rng: np.random.Generator
) -> list[str]:
    """Return a copy of each protein; each residue is substituted with the probability of its copy.

    That is uniform between ``least`` and ``most``. Residues beside the 20 standard ones stay. The
    frequencies of :func:`substitution_probabilities` are those of the proteins.
    """
    joined = np.frombuffer("".join(proteins).encode(), dtype=np.uint8)
    counts = (joined[:, None] == ALPHABET).sum(0)
    cumulative = substitution_probabilities(counts / counts.sum()).cumsum(1)
    place = np.full(256, -1)
    place[ALPHABET] = np.arange(len(ALPHABET))
    copies = []
    for protein in proteins:
        letters = np.frombuffer(protein.encode(), dtype=np.uint8).copy()
        rate = rng.uniform(least, most)
        where = np.flatnonzero((rng.random(len(letters)) < rate) & (place[letters] >= 0))
        rows = cumulative[place[letters[where]]]
        below = rows <= rng.random((len(where), 1)) * rows[:, -1:]
        letters[where] = ALPHABET[below.sum(1)]
        copies.append(letters.tobytes().decode())
    return copies

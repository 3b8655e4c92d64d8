"""Proteins as numbers: duplicates, nested shares and those set aside, whatever their order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def sequence_hash(residues: str) -> int:
    """Return 64 bits of BLAKE2b of a protein's residues, as an unsigned number.

    Two of n different proteins collide with probability n² / 2⁶⁵: 6 in 100,000 for UniRef50.
    """
    return int.from_bytes(hashlib.blake2b(residues.encode(), digest_size=8).digest(), "little")


def chosen(hashes: np.ndarray, proportion: float, seed: int = 0) -> np.ndarray:
    """Return which proteins belong to a share, ``(proteins,)`` bool, by a seeded hash.

    With the same seed a smaller share is a subset of a larger one; the order of the proteins does
    not matter, and equal sequences are chosen together. Different seeds choose independently.

    Args:
        hashes: ``(proteins,)`` from :func:`sequence_hash`.
        proportion: the share, in (0, 1].
        seed: of the choice.

    Raises:
        ValueError: the share is outside (0, 1].
    """
    if not 0 < proportion <= 1:
        raise ValueError(f"--train_size_prop must be above 0 and at most 1, got {proportion}")
    hashes = np.asarray(hashes, dtype=np.uint64)
    if proportion == 1:
        return np.ones(len(hashes), dtype=bool)
    salt = _mixed(np.array([seed % 2**64], dtype=np.uint64))
    return _mixed(hashes ^ salt) < np.uint64(int(proportion * 2.0**64))


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return a bijective scramble of 64-bit numbers (SplitMix64: Steele et al. 2014, OOPSLA)."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class SeenHashes:
    """A growing set of 64-bit hashes that takes 8 bytes a hash; a Python set takes about 60.

    Sorted runs are merged when the last is as long as the one before, so n hashes need O(log n)
    runs and O(n log n) work.
    """

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add hashes and return which are new, ``(n,)`` bool; of repeats only the first is."""
        distinct, first = np.unique(hashes, return_index=True)
        known = np.zeros(len(distinct), dtype=bool)
        for run in self.runs:
            place = np.minimum(np.searchsorted(run, distinct), len(run) - 1)
            known |= run[place] == distinct
        new = np.zeros(len(hashes), dtype=bool)
        new[first[~known]] = True
        if not known.all():
            self.runs.append(distinct[~known])
        while len(self.runs) > 1 and len(self.runs[-1]) >= len(self.runs[-2]):
            last = self.runs.pop()
            merged = np.concatenate([self.runs.pop(), last])
            merged.sort(kind="stable")
            self.runs.append(merged)
        return new


def hashes_of(texts: Sequence[str]) -> np.ndarray:
    """Return :func:`sequence_hash` of each text, ``(texts,)`` uint64."""
    return np.array([sequence_hash(text) for text in texts], dtype=np.uint64)


def held_out(hashes: np.ndarray, share: float, seed: int, most: int) -> np.ndarray:
    """Return which proteins are set aside, ``(proteins,)`` bool: a share, but enough to measure on.

    They are those of :func:`chosen`, of few proteins the next ones in its order, so that there are
    at least one of four proteins and two of ten, and of many the first ``most`` in its order, so
    that none is kept from training which nothing is measured on.
    """
    aside = chosen(hashes, share, seed)
    least = 2 if len(hashes) >= 10 else int(len(hashes) >= 4)
    count = min(max(int(aside.sum()), least), most)
    if aside.sum() != count:
        rank = _mixed(np.asarray(hashes, np.uint64) ^ _mixed(np.array([seed], np.uint64)))
        aside[:] = False
        aside[np.argsort(rank, kind="stable")[:count]] = True
    return aside

"""Profile hidden Markov models of one family: built from its members, searched, used as a density.

HMMER 3 through pyhmmer (Eddy 2011, PLoS Computational Biology 7:e1002195; Larralde and Zeller 2023,
btad214).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from src.common.files import atomic_write
from src.proteins.relatives import (
    check_profiles,
    open_profiles,
    word_sets,
)

ROUNDS = 3
"""Times that the members are aligned to the profile of their last alignment."""
EFFECTIVE_NUMBERS = ("entropy", "clust", "none")
"""How HMMER counts members: by a target entropy, which finds distant relatives best (its default);
clusters at 62 % identity; every member. The more count, the closer the profile keeps to them."""


def require_pyhmmer() -> Any:
    """Return the package. Raises ``ValueError`` if it is missing."""
    try:
        return import_module("pyhmmer")
    except ImportError:
        raise ValueError("the family's profile needs pyhmmer: pip install pyhmmer") from None


def align_family(members: Sequence[str]) -> Any:
    """Return an alignment of a family's members, made with HMMER alone.

    The member whose words are most common among the others gives a first profile; all members are
    aligned to it, the alignment gives the next profile, and so on. Returns a
    ``pyhmmer.easel.DigitalMSA``.
    """
    pyhmmer = require_pyhmmer()
    alphabet = pyhmmer.easel.Alphabet.amino()
    background = pyhmmer.plan7.Background(alphabet)
    digital = [
        pyhmmer.easel.TextSequence(name=str(i), sequence=m).digitize(alphabet)
        for i, m in enumerate(members)
    ]
    block = pyhmmer.easel.DigitalSequenceBlock(alphabet, digital)
    words = word_sets(members)
    sizes = np.asarray(words.sum(1)).ravel()
    common = words @ np.asarray(words.sum(0)).ravel() / np.maximum(1, sizes)
    profile, _, _ = pyhmmer.plan7.Builder(alphabet).build(digital[int(common.argmax())], background)
    alignment = None
    for _ in range(ROUNDS):
        alignment = pyhmmer.hmmalign(profile, block, trim=False).digitize(alphabet)
        alignment.name = "family"
        profile, _, _ = pyhmmer.plan7.Builder(alphabet).build_msa(alignment, background)
    return alignment


def profile_of(alignment: Any, name: str, effective_number: str = "entropy") -> Any:
    """Return the profile (``pyhmmer.plan7.HMM``) of an alignment (:func:`align_family`).

    ``effective_number`` is one of :data:`EFFECTIVE_NUMBERS`.
    """
    pyhmmer = require_pyhmmer()
    alphabet = alignment.alphabet
    builder = pyhmmer.plan7.Builder(alphabet, effective_number=effective_number)
    profile, _, _ = builder.build_msa(alignment, pyhmmer.plan7.Background(alphabet))
    profile.name = name
    return profile


def write_profiles(path: str | Path, profiles: Sequence[Any]) -> None:
    """Write profiles as a HMMER 3 file, atomically."""
    with atomic_write(path, "wb") as handle:
        for profile in profiles:
            profile.write(handle)


def read_profiles(path: str | Path) -> list[Any]:
    """Return the profiles of an HMM file. Raises ``ValueError`` where there are none."""
    check_profiles(path)
    with open_profiles(path) as file:
        return list(file)


def profile_bits(profiles: Sequence[Any], proteins: Sequence[str]) -> np.ndarray:
    """Return the best Forward score of each protein among profiles, ``(P,)`` in bits.

    Scores are those without HMMER's correction for composition, with its filters off. NaN: no
    profile has a domain in the protein.
    """
    pyhmmer = require_pyhmmer()
    alphabet = pyhmmer.easel.Alphabet.amino()
    digital = [
        pyhmmer.easel.TextSequence(name=str(i), sequence=p).digitize(alphabet)
        for i, p in enumerate(proteins)
        if p
    ]
    block = pyhmmer.easel.DigitalSequenceBlock(alphabet, digital)
    off = {
        "F1": 1.0,
        "F2": 1.0,
        "F3": 1.0,
        "bias_filter": False,
        "null2": False,
        "E": 1e12,
        "domE": 1e12,
        "Z": 1,
    }
    pipeline = pyhmmer.plan7.Pipeline(alphabet, **off)
    bits = np.full(len(proteins), np.nan)
    for profile in profiles:
        for hit in pipeline.search_hmm(profile, block) if len(block) else ():
            place = int(hit.name)
            bits[place] = np.fmax(bits[place], hit.pre_score)
        pipeline.clear()
    return bits


def background_nll(proteins: Sequence[str]) -> np.ndarray:
    """Return -log p of each protein under HMMER's null model, ``(P,)`` in nats.

    Residue frequencies of Swiss-Prot, and a geometric length whose mean is the protein's own L:
    -Σ log f(x) - L log(L/(L+1)) + log(L+1). Letters without a frequency count as the mean of all.
    """
    pyhmmer = require_pyhmmer()
    alphabet = pyhmmer.easel.Alphabet.amino()
    frequencies = np.array(pyhmmer.plan7.Background(alphabet).residue_frequencies)
    costs = {
        letter: -math.log(frequencies[alphabet.symbols.index(letter)])
        for letter in alphabet.symbols[: len(frequencies)]
    }
    usual = float(-(frequencies * np.log(frequencies)).sum())
    lengths = np.array([len(p) for p in proteins], dtype=np.float64)
    residues = np.array([sum(costs.get(letter, usual) for letter in p) for p in proteins])
    return residues + lengths * np.log1p(1 / np.maximum(1, lengths)) + np.log1p(lengths)


def profile_nll(profile: Any, proteins: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return -log p of each protein under a profile in nats, ``(P,)``, and which it recognised.

    The score in bits is log2 p(protein | profile) / p(protein | null), so the profile's own
    likelihood is that of the null model (:func:`background_nll`) less the score. A protein without
    a domain of the profile gets the null model's. HMMER adjusts both models to the length of the
    protein, which a language model has to predict: an advantage of a few nats for a protein.
    """
    bits = profile_bits([profile], proteins)
    known = np.isfinite(bits)
    return background_nll(proteins) - np.where(known, bits, 0.0) * math.log(2), known


def best_density(alignment: Any, validation: Sequence[str]) -> tuple[Any, str, dict[str, float]]:
    """Return the profile whose effective number gives the validation members the least NLL.

    Returns:
        The profile, the choice, and nats per residue of each choice.
    """
    residues = sum(map(len, validation))
    nats: dict[str, float] = {}
    profiles = {}
    for choice in EFFECTIVE_NUMBERS:
        profiles[choice] = profile_of(alignment, "family", choice)
        nats[choice] = float(profile_nll(profiles[choice], validation)[0].sum() / residues)
    best = min(nats, key=lambda choice: nats[choice])
    return profiles[best], best, nats

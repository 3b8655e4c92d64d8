"""Profiles as densities, against a Forward algorithm in float64 that shares no code with HMMER."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

pytest.importorskip("pyhmmer")

from src.proteins import profiles as p

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


def mutants(ancestor: str, count: int, rate: float, seed: int) -> list[str]:
    """Return copies with substitutions, and a few deletions and insertions."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        letters = [rng.choice(RESIDUES) if rng.random() < rate else c for c in ancestor]
        place = rng.randrange(5, len(letters) - 5)
        letters[place : place + rng.randrange(3)] = rng.choices(RESIDUES, k=rng.randrange(3))
        made.append("".join(letters))
    return made


@pytest.fixture(scope="module")
def family():
    rng = random.Random(3)
    ancestor = "".join(rng.choices(RESIDUES, k=70))
    return mutants(ancestor, 20, 0.3, 1), mutants(ancestor, 8, 0.3, 2)


@pytest.fixture(scope="module")
def alignment(family):
    return p.align_family(family[0])


def forward_nats(profile, protein: str) -> float:
    """Return HMMER's multihit local Forward score in nats, by the textbook recursion.

    Eddy 2008, PLoS Computational Biology 4:e1000069, figure 1; log odds to the background.
    """
    import pyhmmer

    alphabet = profile.alphabet
    letters = alphabet.symbols
    background = np.array(pyhmmer.plan7.Background(alphabet).residue_frequencies, np.float64)
    match = np.array(profile.match_emissions, np.float64)[:, :20] / background[:20]  # (M+1, 20)
    mm, mi, md, im, ii, dm, dd = np.array(profile.transition_probabilities, np.float64).T
    count, length = profile.M, len(protein)
    occupancy = np.zeros(count + 1)
    occupancy[1] = mi[0] + mm[0]
    for k in range(2, count + 1):
        before = occupancy[k - 1]
        occupancy[k] = before * (mm[k - 1] + mi[k - 1]) + (1 - before) * dm[k - 1]
    entry = occupancy / sum(occupancy[k] * (count - k + 1) for k in range(1, count + 1))
    move = 3 / (length + 3)
    loop = 1 - move
    at, ins, gone = (np.zeros((length + 1, count + 1)) for _ in range(3))
    N, B, J, C = (np.zeros(length + 1) for _ in range(4))
    N[0], B[0] = 1.0, move
    for i, letter in enumerate(protein, start=1):
        odds = match[:, letters.index(letter)]
        for k in range(1, count + 1):
            inner = at[i - 1, k - 1] * mm[k - 1] * (k > 1)
            inner += (ins[i - 1, k - 1] * im[k - 1] + gone[i - 1, k - 1] * dm[k - 1]) * (k > 1)
            at[i, k] = odds[k] * (inner + B[i - 1] * entry[k])
            if k < count:
                ins[i, k] = at[i - 1, k] * mi[k] + ins[i - 1, k] * ii[k]
            gone[i, k] = (at[i, k - 1] * md[k - 1] + gone[i, k - 1] * dd[k - 1]) * (k > 1)
        ended = (at[i] + gone[i]).sum()
        J[i] = J[i - 1] * loop + ended / 2
        C[i] = C[i - 1] * loop + ended / 2
        N[i] = N[i - 1] * loop
        B[i] = (N[i] + J[i]) * move
    return math.log(C[length] * move)


@pytest.mark.parametrize("choice", p.EFFECTIVE_NUMBERS)
def test_a_profile_is_the_density_of_the_forward_algorithm(family, alignment, choice):
    import pyhmmer

    profile = p.profile_of(alignment, "family", choice)
    frequencies = np.array(pyhmmer.plan7.Background(profile.alphabet).residue_frequencies)
    found, known = p.profile_nll(profile, family[1])
    assert known.all()
    for value, protein in zip(found, family[1], strict=True):
        letters = [profile.alphabet.symbols.index(c) for c in protein]
        expected = -forward_nats(profile, protein) - np.log(frequencies[letters]).sum()
        assert value == pytest.approx(expected, abs=0.05)


def test_the_background_by_hand():
    import pyhmmer

    alphabet = pyhmmer.easel.Alphabet.amino()
    f = np.array(pyhmmer.plan7.Background(alphabet).residue_frequencies)
    a, w = (f[alphabet.symbols.index(c)] for c in "AW")
    expected = -2 * math.log(a) - math.log(w) - 3 * math.log(3 / 4) - math.log(1 / 4)
    assert p.background_nll(["AAW"])[0] == pytest.approx(expected)


def test_relatives_are_recognised_and_shuffled_ones_are_not(family, alignment):
    from src.proteins.layouts import shuffled

    profile = p.profile_of(alignment, "family")
    members = family[1]
    controls = [shuffled(m) for m in members]
    assert (p.profile_bits([profile], members) > 20).all()
    assert (np.nan_to_num(p.profile_bits([profile], controls)) < 10).all()
    nats, known = p.profile_nll(profile, ["ACDEFGHIKL" * 6])
    assert not known[0]
    assert nats[0] == p.background_nll(["ACDEFGHIKL" * 6])[0]


def test_the_best_density_is_that_of_the_validation_members(family, alignment):
    profile, choice, nats = p.best_density(alignment, family[1])
    assert choice == min(nats, key=lambda name: nats[name])
    assert set(nats) == set(p.EFFECTIVE_NUMBERS)
    total = p.profile_nll(profile, family[1])[0].sum() / sum(map(len, family[1]))
    assert total == pytest.approx(nats[choice])


def test_profiles_survive_their_file(family, alignment, tmp_path):
    profile = p.profile_of(alignment, "family")
    p.write_profiles(tmp_path / "f.hmm", [profile])
    (again,) = p.read_profiles(tmp_path / "f.hmm")
    before, after = (p.profile_bits([one], family[1]) for one in (profile, again))
    np.testing.assert_allclose(before, after, atol=0.05)

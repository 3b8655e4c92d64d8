"""Nearest relatives and known families, on constructed cases."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest

from src.evaluation import sequence_quality as quality
from src.proteins import relatives
from src.proteins.layouts import shuffled


def mutated(residues: str, share: float, seed: int = 0) -> str:
    """Return a protein with a share of its residues replaced by others."""
    rng = random.Random(seed)
    letters = list(residues)
    for place in rng.sample(range(len(letters)), round(share * len(letters))):
        letters[place] = rng.choice("ACDEFGHIKLMNPQRSTVWY".replace(letters[place], ""))
    return "".join(letters)


def test_words():
    words = relatives.word_sets(["AAAA", "ACDE", "AC", "AXCDE"])
    assert words.shape == (4, 8000)
    assert np.asarray(words.sum(1)).ravel().tolist() == [1, 2, 0, 1]
    assert words[0, 0] == 1  # AAA
    assert words[1, 0 + 1 * 20 + 2 * 400] == 1  # ACD
    assert words[3, 1 + 2 * 20 + 3 * 400] == 1  # CDE, and none that holds X
    assert relatives.word_sets([]).shape == (0, 8000)


def test_relatives_are_grouped_and_strangers_are_not():
    rng = random.Random(0)
    first, second, third = ("".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=300)) for _ in range(3))
    given = [first, second, mutated(first, 0.1), third, first[:40], mutated(first, 0.5), "MK", ""]
    assert relatives.relatives_of(given).tolist() == [0, 1, 0, 2, 0, 3, 4, 5]
    chain = [first, mutated(first, 0.2, 1), mutated(mutated(first, 0.2, 1), 0.2, 2)]
    assert relatives.relatives_of(chain).tolist() == [0, 0, 0]


def test_alignments_by_hand():
    aligner = relatives.local_aligner()
    protein = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"
    assert relatives.aligned(aligner, protein, protein) == (33, 33, 33)
    # Three residues left out of a long match: three columns of gap.
    shorter = protein[:16] + protein[19:]
    assert relatives.aligned(aligner, shorter, protein) == (30, 33, 30)
    assert relatives.aligned(aligner, protein, shorter) == (30, 33, 33)
    assert relatives.aligned(aligner, "WWWWWW", "PPPPPP") == (0, 0, 0)
    assert relatives.aligned(aligner, "MKUOJTAYIAK", "MKUOJTAYIAK")[0] == 11
    # BLASTP's penalties: a gap of one costs 12.
    assert aligner.score("WWWWW", "WWWWW") - aligner.score("WWWWW", "WWAWWW") == 12


def test_nearest_identities_are_those_constructed(random_proteins):
    train = random_proteins(200, 80, 120, seed=5)
    queries = [train[7], mutated(train[30], 0.3), train[50][20:70], "", "WY"]
    found = relatives.nearest_identities(queries, train)
    assert found["target"][:4].tolist() == [7, 30, 50, -1]
    assert found["identity"][0] == 1
    assert found["identity"][1] == pytest.approx(0.7, abs=0.03)
    assert found["identity"][2] == found["coverage"][2] == 1
    assert found["identity"][3] == 0
    # Half of the query is a training protein, half is new: the identity says so.
    chimera = train[9][:50] + random_proteins(1, 50, 50, seed=77)[0]
    half = relatives.nearest_identities([chimera], train)
    assert half["identity"][0] == pytest.approx(0.5, abs=0.1)
    assert half["local_identity"][0] > 0.7
    assert half["target"][0] == 9


@pytest.mark.parametrize(("name", "threshold"), [("plain", 1e-3), ("gathering", "gathering")])
def test_families(profiles, random_proteins, name, threshold):
    protein, folder = profiles
    related = [mutated(protein, 0.3, seed) for seed in range(3)]
    others = random_proteins(4, 60, 100, seed=10)
    found = relatives.family_hits([*related, *others, ""], folder / f"{name}.hmm")
    assert found.pop("hit").tolist() == [True] * 3 + [False] * 5
    assert found.pop("names") == ["family"] * 3 + [None] * 5
    assert found == {"families": 1, "profiles": 1, "threshold": threshold}
    control = relatives.family_hits([shuffled(p) for p in related], folder / f"{name}.hmm")
    assert not control["hit"].any()
    assert not len(relatives.family_hits([], folder / f"{name}.hmm")["hit"])


def test_expectations_count_profiles_and_not_proteins(profiles, random_proteins, monkeypatch):
    protein, folder = profiles
    query = mutated(protein[:45], 0.3)
    single = (folder / "plain.hmm").read_bytes()
    (folder / "many.hmm").write_bytes(single * 30)

    def weakest(others, name):
        """Return the smallest power of ten that the query's E-value stays below."""
        for power in range(-40, 2):
            proteins = [query, *others]
            monkeypatch.setattr(relatives, "EVALUE", 10.0**power)
            if relatives.family_hits(proteins, folder / name)["hit"].any():
                return power
        return None

    alone = weakest([], "plain.hmm")
    assert alone is not None
    assert weakest(random_proteins(30, 60, 90, seed=14), "plain.hmm") == alone
    assert weakest([], "many.hmm") in (alone + 1, alone + 2)


def test_files_without_profiles_are_refused(tmp_path):
    pytest.importorskip("pyhmmer")
    with pytest.raises(ValueError, match="there is no such HMM file"):
        relatives.family_hits(["MK"], tmp_path / "missing.hmm")
    for content in ("", ">a\nMKTAYIAK\n"):
        (tmp_path / "bad.hmm").write_text(content)
        with pytest.raises(ValueError, match=r"bad\.hmm"):
            relatives.family_hits(["MK"], tmp_path / "bad.hmm")


def test_without_pyhmmer_there_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyhmmer", None)
    with pytest.raises(ValueError, match="pip install pyhmmer"):
        relatives.check_profiles(tmp_path / "x.hmm")


def test_families_of_a_description(random_proteins, profiles):
    protein, folder = profiles
    settings = quality.DescriptionSettings(True, folder / "plain.hmm", bootstrap=100)
    found = quality.describe([protein, *random_proteins(3, 60, 90), ""], [protein], settings)
    assert found["families"] == {"hit_share": 0.2, "families": 1, "profiles": 1, "threshold": 1e-3}
    low, high = found["intervals"]["families.hit_share"]
    assert 0 <= low < 0.2 < high
    with pytest.raises(ValueError, match="--generation_metrics"):
        quality.DescriptionSettings(False, folder / "plain.hmm")
    with pytest.raises(ValueError, match="no such HMM file"):
        quality.DescriptionSettings(True, folder / "missing.hmm")

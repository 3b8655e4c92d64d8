"""Lengths, repeats, diversity, novelty and families of sets of proteins, on constructed cases."""

from __future__ import annotations

import random

import numpy as np
import pytest

from src import metrics
from src import sequence_quality as quality


def mutated(residues: str, share: float, seed: int = 0) -> str:
    """Return a protein with a share of its residues replaced by others."""
    rng = random.Random(seed)
    letters = list(residues)
    for place in rng.sample(range(len(letters)), round(share * len(letters))):
        letters[place] = rng.choice("ACDEFGHIKLMNPQRSTVWY".replace(letters[place], ""))
    return "".join(letters)


def test_lengths_composition_and_validity():
    proteins = ["AAAA", "CC", "CCCCCC"]
    found = quality.length_statistics(proteins)
    assert found["mean"] == 4
    assert (found["min"], found["median"], found["max"]) == (2, 4, 6)
    assert found["sd"] == pytest.approx(np.std([2, 4, 6]))
    assert set(quality.length_statistics([]).values()) == {None}
    shares = quality.composition(proteins)
    assert (shares["A"], shares["C"], shares["W"]) == (4 / 12, 8 / 12, 0)
    assert quality.valid_share(["MK", "", "MX", "WW"]) == 0.5
    assert quality.valid_share([]) is None


@pytest.mark.parametrize(
    ("residues", "share"),
    [
        ("", 0),
        ("MKTAYIAK", 0),
        ("QQQQQ", 0),  # five
        ("QQQQQQ", 1),
        ("MKTAQQQQQQVL", 0.5),
        ("GSGSGS", 1),
        ("GSGS", 0),
        ("ADEADE", 0),  # two copies
        ("ADEADEADE", 1),
        ("ADEADEADEWYWC", 9 / 13),
        ("WYQQQQQQGSGSGSWY", 12 / 16),  # two repeats that touch
        ("MKTAYIAKQRQ" * 3, 1),
    ],
)
def test_tandem_repeats(residues, share):
    assert quality.repeat_share(residues) == pytest.approx(share)


def test_repetitiveness_against_its_parts(random_proteins):
    proteins = [*random_proteins(10, 30, 90), "Q" * 40]
    found = quality.repetitiveness(proteins)
    total = sum(map(len, proteins))
    assert found["long_run_share"] == pytest.approx(1 / 11)
    assert found["longest_run"] == pytest.approx(
        np.mean([metrics.longest_run(p) for p in proteins])
    )
    assert found["tandem_repeat_share"] == pytest.approx(40 / total)
    low = sum(metrics.low_complexity_share(p) * len(p) for p in proteins) / total
    assert found["low_complexity_share"] == pytest.approx(low)
    assert set(quality.repetitiveness([]).values()) == {None}


def test_words():
    words = quality.word_sets(["AAAA", "ACDE", "AC", "AXCDE"])
    assert words.shape == (4, 8000)
    assert np.asarray(words.sum(1)).ravel().tolist() == [1, 2, 0, 1]
    assert words[0, 0] == 1  # AAA
    assert words[1, 0 + 1 * 20 + 2 * 400] == 1  # ACD
    assert words[3, 1 + 2 * 20 + 3 * 400] == 1  # CDE, and none that holds X
    assert quality.word_sets([]).shape == (0, 8000)


def test_diversity_against_a_plain_loop(random_proteins):
    proteins = random_proteins(12, 20, 60, seed=4)
    proteins[3] = mutated(proteins[0], 0.2)
    found = quality.diversity(proteins)
    distances = []
    for i, a in enumerate(proteins):
        for b in proteins[:i]:
            left, right = ({s[k : k + 3] for k in range(len(s) - 2)} for s in (a, b))
            distances.append(1 - len(left & right) / len(left | right))
    assert found["word_distance"] == pytest.approx(np.mean(distances), rel=1e-6)
    assert found["pairs"] == 66
    assert found["distinct_share"] == 1
    assert 0 < found["pairwise_identity"] < 0.3
    assert quality.diversity(proteins, pairs=9)["pairs"] == 9
    assert quality.diversity(proteins, pairs=9) == quality.diversity(proteins, pairs=9)


def test_diversity_of_copies_and_of_nothing(random_proteins):
    copies = quality.diversity(random_proteins(1, 50, 50) * 5)
    assert copies["word_distance"] == pytest.approx(0)
    assert copies["pairwise_identity"] == pytest.approx(1)
    assert copies["distinct_share"] == 0.2
    for few in ([], ["MK"], ["", ""]):
        assert quality.diversity(few)["word_distance"] is None


def test_pairs_are_drawn_once_each(random_proteins, monkeypatch):
    seen = []

    def spy(aligner, query, target):
        seen.append(frozenset((query, target)))
        return 0, 1, 1

    monkeypatch.setattr(quality, "aligned", spy)
    quality.diversity(random_proteins(30, 20, 40), pairs=10_000)
    assert len(seen) == len(set(seen)) == 30 * 29 // 2
    assert all(len(pair) == 2 for pair in seen)


def test_alignments_by_hand():
    aligner = quality.local_aligner()
    protein = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"
    assert quality.aligned(aligner, protein, protein) == (33, 33, 33)
    # Three residues left out of a long match: three columns of gap.
    shorter = protein[:16] + protein[19:]
    assert quality.aligned(aligner, shorter, protein) == (30, 33, 30)
    assert quality.aligned(aligner, protein, shorter) == (30, 33, 33)
    assert quality.aligned(aligner, "WWWWWW", "PPPPPP") == (0, 0, 0)
    assert quality.aligned(aligner, "MKUOJTAYIAK", "MKUOJTAYIAK")[0] == 11
    # BLASTP's penalties: a gap of one costs 12.
    assert aligner.score("WWWWW", "WWWWW") - aligner.score("WWWWW", "WWAWWW") == 12


def test_nearest_identities_are_those_constructed(random_proteins):
    train = random_proteins(200, 80, 120, seed=5)
    queries = [train[7], mutated(train[30], 0.3), train[50][20:70], "", "WY"]
    found = quality.nearest_identities(queries, train)
    assert found["target"][:4].tolist() == [7, 30, 50, -1]
    assert found["identity"][0] == 1
    assert found["identity"][1] == pytest.approx(0.7, abs=0.03)
    assert found["identity"][2] == found["coverage"][2] == 1
    assert found["identity"][3] == 0
    # Half of the query is a training protein, half is new: the identity says so.
    chimera = train[9][:50] + random_proteins(1, 50, 50, seed=77)[0]
    half = quality.nearest_identities([chimera], train)
    assert half["identity"][0] == pytest.approx(0.5, abs=0.1)
    assert half["local_identity"][0] > 0.7
    assert half["target"][0] == 9


def test_novelty_of_copies_strangers_and_nothing(random_proteins):
    train = random_proteins(100, 60, 90, seed=6)
    copies = quality.novelty(train[:5], train)
    assert copies["nearest_identity"]["min"] == 1
    assert copies["share_over"] == {"0.3": 1, "0.5": 1, "0.9": 1}
    assert copies["copied_share"] == 1
    strangers = quality.novelty(random_proteins(5, 60, 90, seed=8), train)
    assert strangers["nearest_identity"]["max"] < 0.3
    assert strangers["share_over"]["0.3"] == 0
    assert quality.novelty([], train)["nearest_identity"] is None
    assert quality.novelty(train, [])["nearest_identity"] is None


@pytest.fixture
def profiles(tmp_path, random_proteins):
    """Write an HMM file of one family, without and with gathering thresholds."""
    pyhmmer = pytest.importorskip("pyhmmer")
    protein = random_proteins(1, 90, 90, seed=9)[0]
    alphabet = pyhmmer.easel.Alphabet.amino()
    sequence = quality._named_sequence("family", protein).digitize(alphabet)
    builder = pyhmmer.plan7.Builder(alphabet)
    hmm, _, _ = builder.build(sequence, pyhmmer.plan7.Background(alphabet))
    with (tmp_path / "plain.hmm").open("wb") as handle:
        hmm.write(handle)
    hmm.cutoffs.gathering = 25.0, 25.0
    with (tmp_path / "gathering.hmm").open("wb") as handle:
        hmm.write(handle)
    return protein, tmp_path


@pytest.mark.parametrize(("name", "threshold"), [("plain", 1e-3), ("gathering", "gathering")])
def test_families(profiles, random_proteins, name, threshold):
    protein, folder = profiles
    relatives = [mutated(protein, 0.3, seed) for seed in range(3)]
    others = random_proteins(4, 60, 100, seed=10)
    found = quality.family_hits([*relatives, *others, ""], folder / f"{name}.hmm")
    assert found == {"hit_share": 3 / 8, "families": 1, "profiles": 1, "threshold": threshold}
    control = quality.family_hits(quality.shuffled(relatives), folder / f"{name}.hmm")
    assert control["hit_share"] == 0
    assert quality.family_hits([], folder / f"{name}.hmm")["hit_share"] is None


def test_expectations_count_profiles_and_not_proteins(profiles, random_proteins):
    protein, folder = profiles
    query = mutated(protein[:45], 0.3)
    single = (folder / "plain.hmm").read_bytes()
    (folder / "many.hmm").write_bytes(single * 30)

    def weakest(others, name):
        """Return the smallest power of ten that the query's E-value stays below."""
        for power in range(-40, 2):
            proteins = [query, *others]
            if quality.family_hits(proteins, folder / name, 10.0**power)["hit_share"]:
                return power
        return None

    alone = weakest([], "plain.hmm")
    assert alone is not None
    assert weakest(random_proteins(30, 60, 90, seed=14), "plain.hmm") == alone
    assert weakest([], "many.hmm") in (alone + 1, alone + 2)


def test_files_without_profiles_are_refused(tmp_path):
    pytest.importorskip("pyhmmer")
    with pytest.raises(ValueError, match="there is no such HMM file"):
        quality.family_hits(["MK"], tmp_path / "missing.hmm")
    for content in ("", ">a\nMKTAYIAK\n"):
        (tmp_path / "bad.hmm").write_text(content)
        with pytest.raises(ValueError, match=r"bad\.hmm"):
            quality.family_hits(["MK"], tmp_path / "bad.hmm")


def test_one_record_with_controls(random_proteins):
    natural, train = random_proteins(40, 30, 60, seed=11), random_proteins(30, 30, 60, seed=12)
    generated = {"student": [*train[:3], "", "Q" * 30], "teacher": natural[:5]}
    found = quality.describe_with_controls(generated, natural, train)
    assert list(found) == ["student", "teacher", "natural", "shuffled"]
    student = found["student"]
    assert (student["sequences"], student["valid_share"]) == (5, 0.8)
    assert student["novelty"]["copied_share"] == 0.75
    assert student["repetitiveness"]["long_run_share"] == 0.25
    assert found["natural"]["sequences"] == found["shuffled"]["sequences"] == 5
    assert found["natural"]["composition"] == found["shuffled"]["composition"]
    assert student["kl_from_natural"] > found["natural"]["kl_from_natural"]
    assert "families" not in student
    assert quality.describe([], natural)["length"]["mean"] is None


def test_shuffling_keeps_composition(random_proteins):
    proteins = random_proteins(3, 40, 60)
    mixed = quality.shuffled(proteins, 1)
    assert mixed != proteins
    assert [sorted(p) for p in mixed] == [sorted(p) for p in proteins]
    assert mixed == quality.shuffled(proteins, 1) != quality.shuffled(proteins, 2)

"""The one description of sets of proteins, on constructed cases."""

from __future__ import annotations

import json

import numpy as np
import pytest

from src.evaluation import composition
from src.evaluation import sequence_quality as quality
from src.evaluation.filters import REPEATED, TOO_CLOSE, Filters, has_repeats
from src.evaluation.results import lookup
from src.proteins.layouts import shuffled
from src.proteins.relatives import nearest_identities
from tests.test_relatives import mutated

PLAIN = quality.DescriptionSettings(bootstrap=0)


def test_lengths_composition_and_validity():
    proteins = ["AAAA", "CC", "CCCCCC"]
    found = quality.length_statistics(proteins)
    assert found["mean"] == 4
    assert (found["min"], found["median"], found["max"]) == (2, 4, 6)
    assert found["sd"] == pytest.approx(np.std([2, 4, 6]))
    assert set(quality.length_statistics([]).values()) == {None}
    shares = quality.composition_shares(proteins)
    assert (shares["A"], shares["C"], shares["W"]) == (4 / 12, 8 / 12, 0)
    assert quality.describe(["MK", "", "MX", "WW"], ["MK"], PLAIN)["valid_share"] == 0.5


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
    assert composition.repeat_share(residues) == pytest.approx(share)


def test_repetitiveness_against_its_parts(random_proteins):
    proteins = [*random_proteins(10, 30, 90), "Q" * 40]
    found = quality.describe(proteins, proteins, PLAIN)["repetitiveness"]
    total = sum(map(len, proteins))
    assert found["long_run_share"] == pytest.approx(1 / 11)
    assert found["longest_run"] == pytest.approx(
        np.mean([composition.longest_run(p) for p in proteins])
    )
    assert found["tandem_repeat_share"] == pytest.approx(40 / total)
    low = sum(composition.low_complexity_share(p) * len(p) for p in proteins) / total
    assert found["low_complexity_share"] == pytest.approx(low)


def test_diversity_against_a_plain_loop(random_proteins):
    proteins = random_proteins(12, 20, 60, seed=4)
    proteins[3] = mutated(proteins[0], 0.2)
    found = quality.diversity(proteins)
    distances = np.zeros((12, 12))
    for i, a in enumerate(proteins):
        for j, b in enumerate(proteins):
            left, right = ({s[k : k + 3] for k in range(len(s) - 2)} for s in (a, b))
            distances[i, j] = 1 - len(left & right) / len(left | right)
    pairs = distances[np.triu_indices(12, 1)]
    assert found["word_distance"].estimate == pytest.approx(pairs.mean(), rel=1e-6)
    without = []
    for i in range(12):
        kept = np.delete(np.arange(12), i)
        without.append(distances[np.ix_(kept, kept)][np.triu_indices(11, 1)].mean())
    error = np.sqrt(11 / 12 * np.sum((np.array(without) - np.mean(without)) ** 2))
    assert found["word_distance"].standard_error == pytest.approx(error, rel=1e-6)
    assert 0 < found["pairwise_identity"].low < found["pairwise_identity"].estimate < 0.3
    assert quality.diversity(proteins, pairs=9) == quality.diversity(proteins, pairs=9)


def test_the_interval_of_a_mean_over_pairs_is_that_of_a_mean():
    """The pair's figure (x_i + x_j)/2 has the mean of x as its mean over pairs."""
    x = np.random.default_rng(0).normal(size=40)
    pairs = (x[:, None] + x) / 2
    np.fill_diagonal(pairs, 0)
    found = quality.pair_mean(pairs.sum(1), np.full(40, 39.0), pairs.sum() / 2, 780)
    assert found.estimate == pytest.approx(x.mean())
    assert found.standard_error == pytest.approx(x.std(ddof=1) / np.sqrt(40))
    assert np.isnan(quality.pair_mean(np.ones(2), np.ones(2), 1.0, 1).low)


def test_diversity_leaves_out_whole_clusters(random_proteins):
    proteins = random_proteins(12, 20, 60, seed=4)
    proteins[3], proteins[7] = mutated(proteins[0], 0.1), mutated(proteins[0], 0.1)
    clusters = ["a", "b", "c", "a", "d", "e", "b", "a", "f", "g", "h", "i"]
    found = quality.diversity(proteins, clusters=clusters)
    plain = quality.diversity(proteins)
    for name, estimate in found.items():
        assert estimate.estimate == pytest.approx(plain[name].estimate)
        without = []
        for label in "abcdefghi":
            kept = [p for p, c in zip(proteins, clusters, strict=True) if c != label]
            without.append(quality.diversity(kept)[name].estimate)
        error = np.sqrt(8 / 9 * np.sum((np.array(without) - np.mean(without)) ** 2))
        assert estimate.standard_error == pytest.approx(error, rel=1e-6), name
    settings = quality.DescriptionSettings(thorough=True, bootstrap=0)
    described = quality.describe(["", *proteins], proteins, settings, clusters=["z", *clusters])
    low, high = described["intervals"]["diversity.word_distance"]
    assert (low, high) == (found["word_distance"].low, found["word_distance"].high)
    again = quality.diversity(proteins, clusters=range(12))
    assert again["word_distance"].low == pytest.approx(plain["word_distance"].low)


def test_diversity_of_copies_and_of_nothing(random_proteins):
    copies = quality.diversity(random_proteins(1, 50, 50) * 5)
    assert copies["word_distance"].estimate == pytest.approx(0)
    assert copies["pairwise_identity"].estimate == pytest.approx(1)
    thorough = quality.DescriptionSettings(thorough=True, bootstrap=0)
    for few in ([], ["MK"], ["", ""]):
        assert "diversity" not in quality.describe(few, ["MK"], thorough)


def test_pairs_are_drawn_once_each(random_proteins, monkeypatch):
    seen = []

    def spy(aligner, query, target):
        seen.append(frozenset((query, target)))
        return 0, 1, 1

    monkeypatch.setattr(quality, "aligned", spy)
    quality.diversity(random_proteins(30, 20, 40), pairs=10_000)
    assert len(seen) == len(set(seen)) == 30 * 29 // 2
    assert all(len(pair) == 2 for pair in seen)


def test_novelty_of_copies_strangers_and_nothing(random_proteins):
    train = random_proteins(100, 60, 90, seed=6)
    thorough = quality.DescriptionSettings(thorough=True, bootstrap=50)

    def novelty(proteins, against):
        return quality.describe(proteins, train, thorough, train=against)["novelty"]

    copies = novelty([*train[:5], ""], train)
    assert copies["nearest_identity"]["min"] == copies["nearest_identity"]["mean"] == 1
    assert copies["share_over_30"] == copies["share_over_90"] == copies["copied_share"] == 1
    assert copies["train_proteins"] == 100
    strangers = novelty(random_proteins(5, 60, 90, seed=8), train)
    assert strangers["nearest_identity"]["max"] < 0.3
    assert strangers["share_over_30"] == 0
    assert novelty([], train)["nearest_identity"]["mean"] is None
    assert novelty(train[:2], [])["nearest_identity"]["max"] == 0


def test_a_description_by_hand(random_proteins):
    natural = random_proteins(100, seed=1)
    settings = quality.DescriptionSettings(bootstrap=200)
    nll = np.array([100.0, np.nan, 50.0, 8.0])
    poor = quality.describe(["A" * 50, "A" * 50, "", "MKXV"], natural, settings, nll=nll)
    assert poor["sequences"] == 4
    assert poor["valid_share"] == 0.5
    assert poor["length"]["mean"] == pytest.approx(104 / 3)
    assert poor["distinct_share"] == pytest.approx(2 / 3)
    assert poor["repetitiveness"]["long_run_share"] == pytest.approx(2 / 3)
    assert poor["teacher_perplexity_per_residue"] == pytest.approx(np.exp(158 / 54))
    assert poor["kl_from_natural"] > 1
    fine = quality.describe(random_proteins(50, seed=2), natural, settings)
    assert 0 <= fine["kl_from_natural"] < 0.02
    for record in (poor, fine):
        for name, interval in record["intervals"].items():
            value = lookup(record, name)
            assert interval is None or interval[0] <= value <= interval[1], name
        json.dumps(record, allow_nan=False)
    assert fine["intervals"]["kl_from_natural"][1] > fine["kl_from_natural"]
    nothing = quality.describe([], natural, settings)
    assert nothing["length"]["mean"] is nothing["kl_from_natural"] is None
    assert quality.describe(["", ""], natural, settings)["valid_share"] == 0


def test_none_of_forty_is_not_known_to_be_none(random_proteins):
    proteins = random_proteins(40, 60, 60)
    settings = quality.DescriptionSettings(bootstrap=50)
    found = quality.describe(proteins, proteins, settings)["intervals"]
    assert found["repetitiveness.long_run_share"] == pytest.approx([0, 0.0876], abs=1e-4)
    assert found["valid_share"] == pytest.approx([1 - 0.0876, 1], abs=1e-4)
    assert found["length.mean"] is None  # all have one length: nothing is known of the spread
    clusters = [i // 4 for i in range(40)]
    few = quality.describe(proteins, proteins, settings, clusters=clusters)["intervals"]
    assert few["valid_share"][0] == pytest.approx(0.7225, abs=1e-4)  # ten, not forty


def test_intervals_cover_the_truth(random_proteins):
    """Samples of a known distribution: the share of proteins that begin with a run of six."""
    pool = [("QQQQQQ" if i % 4 == 0 else "") + p for i, p in enumerate(random_proteins(400))]
    rng = np.random.default_rng(0)
    settings = quality.DescriptionSettings(bootstrap=200)
    hits = 0
    for _ in range(60):
        drawn = [pool[i] for i in rng.integers(0, 400, 60)]
        interval = quality.describe(drawn, pool[:20], settings)["intervals"]
        low, high = interval["repetitiveness.long_run_share"]
        hits += low <= 0.25 <= high
    assert 50 <= hits <= 60


def test_records_with_controls(random_proteins):
    natural, train = random_proteins(40, 30, 60, seed=11), random_proteins(30, 30, 60, seed=12)
    generated = {"student": [*train[:3], "", "Q" * 30], "teacher": natural[:5]}
    thorough = quality.DescriptionSettings(thorough=True, bootstrap=50)
    found = quality.describe_all(
        generated,
        natural,
        thorough,
        train=train,
        score=lambda proteins: np.array([float(len(p)) for p in proteins]),
        clusters=["one"] * 40,
    )
    assert list(found) == ["student", "teacher", "natural", "shuffled"]
    student = found["student"]
    assert (student["sequences"], student["valid_share"]) == (5, 0.8)
    assert student["novelty"]["copied_share"] == 0.75
    assert student["repetitiveness"]["long_run_share"] == 0.25
    assert student["teacher_perplexity_per_residue"] == pytest.approx(np.e)
    assert found["natural"]["sequences"] == found["shuffled"]["sequences"] == 5
    assert found["natural"]["composition"] == found["shuffled"]["composition"]
    # One cluster says nothing about the spread of clusters.
    assert found["natural"]["intervals"]["kl_from_natural"] is None
    assert student["intervals"]["kl_from_natural"] is not None
    assert student["kl_from_natural"] > found["natural"]["kl_from_natural"]
    assert "families" not in student
    assert set(quality.describe_all(generated, natural, PLAIN)) == {"student", "teacher", "natural"}


def test_shuffling_keeps_residues_and_depends_on_the_seed_alone():
    assert sorted(shuffled("ACDEFGHIKL", 1)) == list("ACDEFGHIKL")
    assert shuffled("ACDEFGHIKL", 1) == shuffled("ACDEFGHIKL", 1)
    assert shuffled("ACDEFGHIKL", 1) != shuffled("ACDEFGHIKL", 2)


# What a sampled protein must be: without repeats, unlike known ones


def test_repeats_are_those_of_the_description(random_proteins):
    plain = random_proteins(1, 100, 100)[0]
    assert not has_repeats(plain)
    assert not has_repeats(plain + "QQQQQQ")  # 6 %
    assert has_repeats(plain + "GSGSGSGSGSGSGSGS")  # 14 %
    filters = Filters(drop_repeats=True)
    assert filters.reason(plain) is None
    assert filters.reason("GS" * 20) == REPEATED
    assert Filters().reason("GS" * 20) is None


def test_identity_is_that_of_the_nearest_search(random_proteins):
    known = random_proteins(30, 80, 120, seed=1)
    queries = [known[3][10:60] + "W" * 10, known[7], *random_proteins(3, 50, 60, seed=9)]
    identity = nearest_identities(queries, known)["identity"]
    assert identity[0] > 0.8
    assert identity[1] == 1
    for level in (0.3, 0.9, 1.0):
        filters = Filters(max_identity=level, against=known)
        found = [filters.reason(query) for query in queries]
        assert found == [TOO_CLOSE if value > level else None for value in identity]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_identity": 0.5}, "--max_identity and --against go together"),
        ({"against": ["MKT"]}, "--max_identity and --against go together"),
        ({"max_identity": 1.5, "against": ["MKT"]}, "--max_identity must be in"),
    ],
)
def test_bad_settings_name_the_flag(options, message):
    with pytest.raises(ValueError, match=message):
        Filters(**options)

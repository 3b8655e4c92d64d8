from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from src.evaluation.statistics import (
    Estimate,
    cluster_bootstrap,
    cluster_codes,
    contrast,
    holm,
    is_equivalent,
    two_way_interval,
)

INTERACTION = {"baseline": 1, "uncertainty": -1, "calibration": -1, "both": 1}


def ratio(sums):
    return {"ratio": sums["x"] / sums["n"]}


def simulate(rng, seeds=5, clusters=120, seed_sd=0.02, cluster_sd=0.2, both_sd=0.1, mean=0.1):
    """Draw figures that differ between seeds, between clusters, and in both together."""
    residues = rng.integers(30, 500, clusters).astype(float)
    effect = (
        mean
        + rng.normal(0, seed_sd, (seeds, 1))
        + rng.standard_t(6, clusters) * cluster_sd
        + rng.normal(0, both_sd, (seeds, clusters))
    )
    return effect * residues, residues


def test_clusters_are_numbered_as_they_come():
    codes, count = cluster_codes(["b", "a", "b", "c"])
    assert codes.tolist() == [0, 1, 0, 2]
    assert count == 3


def test_bootstrap_of_a_mean_agrees_with_theory():
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, 400)
    found = cluster_bootstrap(ratio, {"x": x, "n": np.ones(400)}, np.arange(400), n=4000)["ratio"]
    error = x.std(ddof=1) / 20
    assert found.estimate == pytest.approx(x.mean())
    assert found.standard_error == pytest.approx(error, rel=0.06)
    assert found.low == pytest.approx(x.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(x.mean() + 1.96 * error, abs=0.15 * error)


def test_bootstrap_agrees_with_scipy():
    rng = np.random.default_rng(1)
    x = rng.lognormal(0, 1, 80)
    ours = cluster_bootstrap(ratio, {"x": x, "n": np.ones(80)}, np.arange(80), n=8000)["ratio"]
    theirs = stats.bootstrap((x,), np.mean, n_resamples=8000, method="BCa", rng=rng)
    assert ours.low == pytest.approx(theirs.confidence_interval.low, rel=0.03)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, rel=0.03)


def test_the_bootstrap_covers_with_few_clusters():
    """Of a mean of 8 normal values the interval is about Student's."""
    hits, runs = 0, 300
    for seed in range(runs):
        x = np.random.default_rng([seed, 8]).normal(0.5, 0.3, 8)
        arrays = {"x": x, "n": np.ones(8)}
        found = cluster_bootstrap(ratio, arrays, range(8), n=500, seed=seed)["ratio"]
        hits += found.low <= 0.5 <= found.high
    assert 0.91 <= hits / runs <= 0.98
    assert found.degrees_of_freedom == 7
    assert found.standard_error == pytest.approx(x.std(ddof=1) / math.sqrt(8), rel=0.15)


def test_duplicated_data_leave_clustered_intervals_as_they_are():
    rng = np.random.default_rng(2)
    arrays = {"x": rng.normal(1, 1, 60), "n": rng.integers(1, 5, 60).astype(float)}
    clusters = rng.integers(0, 25, 60)
    twice = {name: np.concatenate([v, v]) for name, v in arrays.items()}
    once = cluster_bootstrap(ratio, arrays, clusters, n=500)["ratio"]
    again = cluster_bootstrap(ratio, twice, np.concatenate([clusters, clusters]), n=500)["ratio"]
    for name in ("estimate", "low", "high", "standard_error"):
        assert getattr(again, name) == pytest.approx(getattr(once, name), rel=1e-12)
    naive = cluster_bootstrap(ratio, twice, np.arange(120), n=500)["ratio"]
    assert naive.standard_error < 0.9 * once.standard_error


def test_chunks_and_wide_arrays_do_not_change_the_draws(monkeypatch):
    rng = np.random.default_rng(3)
    wide = rng.poisson(0.2, (40, 300)).astype(float)

    def statistic(sums):
        return {"peak": sums["wide"].max(-1), "sum": sums["wide"].sum(-1)}

    whole = cluster_bootstrap(statistic, {"wide": wide}, np.arange(40), n=200)
    monkeypatch.setattr("src.evaluation.statistics.CHUNK_CELLS", 40 * 33)
    pieces = cluster_bootstrap(statistic, {"wide": wide}, np.arange(40), n=200)
    for name in whole:
        assert pieces[name].low == pytest.approx(whole[name].low)
        assert pieces[name].high == pytest.approx(whole[name].high)


def test_a_figure_that_noise_only_raises_keeps_its_estimate_inside():
    rng = np.random.default_rng(4)
    x = rng.normal(0, 1, (100, 30))

    def statistic(sums):
        return {"square": (sums["x"] ** 2).sum(-1) / sums["n"] ** 2}

    found = cluster_bootstrap(statistic, {"x": x, "n": np.ones(100)}, np.arange(100), n=500)
    square = found["square"]
    assert 0 <= square.low <= square.estimate <= square.high
    assert square.low < 0.05  # the truth is 0


def test_one_cluster_has_no_interval_and_wrong_input_is_refused():
    arrays = {"x": np.ones(3), "n": np.ones(3)}
    found = cluster_bootstrap(ratio, arrays, ["a", "a", "a"], n=20)["ratio"]
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    with pytest.raises(ValueError, match="3 rows for 2 proteins"):
        cluster_bootstrap(ratio, arrays, ["a", "b"], n=20)
    with pytest.raises(ValueError, match="no proteins"):
        cluster_bootstrap(ratio, {}, [], n=20)
    with pytest.raises(ValueError, match="--bootstrap"):
        cluster_bootstrap(ratio, arrays, ["a", "b", "c"], n=0)


def test_two_way_interval_reduces_to_the_t_test_where_seeds_are_all():
    rng = np.random.default_rng(5)
    residues = np.full(50, 100.0)
    per_seed = rng.normal(0.5, 0.1, 5)
    found = two_way_interval(per_seed[:, None] * residues, residues, np.arange(50))
    expected = stats.t.interval(0.95, 4, per_seed.mean(), per_seed.std(ddof=1) / math.sqrt(5))
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.degrees_of_freedom == pytest.approx(4)
    assert found.p_value == pytest.approx(stats.ttest_1samp(per_seed, 0)[1])


def test_two_way_interval_reduces_to_clusters_where_seeds_agree():
    rng = np.random.default_rng(6)
    x = rng.normal(0.5, 1, 200)
    found = two_way_interval(np.tile(x, (5, 1)), np.ones(200), np.arange(200))
    expected = stats.t.interval(0.95, 199, x.mean(), x.std(ddof=1) / math.sqrt(200))
    assert (found.low, found.high) == pytest.approx(expected)


def test_duplicates_leave_the_two_way_interval_as_it_is():
    numerators, residues = simulate(np.random.default_rng(7))
    clusters = np.arange(len(residues)) // 2
    once = two_way_interval(numerators, residues, clusters)
    twice = two_way_interval(
        np.tile(numerators, 2), np.tile(residues, 2), np.concatenate([clusters, clusters])
    )
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))


def test_interaction_is_the_contrast_of_the_four_arms():
    rng = np.random.default_rng(8)
    residues = rng.integers(50, 400, 90).astype(float)
    shared = rng.normal(2.8, 0.2, (5, 90)) * residues
    effects = {"baseline": 0.0, "uncertainty": 0.1, "calibration": 0.2, "both": 0.05}
    nll = {arm: shared + effect * residues for arm, effect in effects.items()}
    found = contrast(nll, INTERACTION, residues, np.arange(90))
    assert found.estimate == pytest.approx(0.05 - 0.1 - 0.2)
    # What the arms share in a seed and in a protein cancels: nothing is left to be uncertain of.
    assert found.standard_error == pytest.approx(0, abs=1e-9)
    difference = contrast(nll, {"both": 1, "baseline": -1}, residues, np.arange(90))
    assert difference.estimate == pytest.approx(0.05)


def test_wrong_shapes_are_refused():
    residues = np.ones(10)
    for shape, clusters, message in (
        ((1, 10), np.arange(10), "one seed"),
        ((3, 10), np.zeros(10), "one test cluster"),
        ((3, 9), np.arange(10), "expected"),
    ):
        with pytest.raises(ValueError, match=message):
            two_way_interval(np.ones(shape), residues, clusters)
    arms = {"a": np.ones((3, 10)), "b": np.ones((4, 10))}
    with pytest.raises(ValueError, match="no runs of the arm 'both'"):
        contrast(arms, {"both": 1}, residues, np.arange(10))
    with pytest.raises(ValueError, match="different seeds"):
        contrast(arms, {"a": 1, "b": -1}, residues, np.arange(10))


def test_coverage_smoke():
    hits = 0
    for seed in range(120):
        numerators, residues = simulate(np.random.default_rng(seed))
        found = two_way_interval(numerators, residues, np.arange(len(residues)))
        hits += found.low <= 0.1 <= found.high
    assert 0.88 <= hits / 120 <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed_sd", "cluster_sd", "both_sd"),
    [(0.1, 0.01, 0.01), (0.02, 0.2, 0.1), (0.005, 0.3, 0.03), (0.03, 0.3, 0.1)],
)
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_coverage_of_the_two_way_interval(seeds, seed_sd, cluster_sd, both_sd):
    hits = 0
    runs = 3000
    for seed in range(runs):
        rng = np.random.default_rng([seed, seeds])
        numerators, residues = simulate(rng, seeds, 120, seed_sd, cluster_sd, both_sd)
        found = two_way_interval(numerators, residues, np.arange(120))
        hits += found.low <= 0.1 <= found.high
    assert 0.93 <= hits / runs <= 0.97


@pytest.mark.slow
def test_coverage_of_the_bootstrap():
    runs, hits = 1000, 0
    for seed in range(runs):
        rng = np.random.default_rng([seed, 77])
        clusters = np.repeat(np.arange(120), 3)
        shared = rng.normal(0, 0.3, 120)[clusters]
        n = rng.integers(30, 300, 360).astype(float)
        x = (0.5 + shared + rng.normal(0, 0.2, 360)) * n
        plain = cluster_bootstrap(ratio, {"x": x, "n": n}, clusters, n=1000, seed=seed)["ratio"]
        hits += plain.low <= 0.5 <= plain.high
    assert 0.93 <= hits / runs <= 0.97


@pytest.mark.slow
def test_coverage_of_the_interaction_and_false_alarms_of_the_equivalence():
    runs, hits, equivalent = 1000, 0, 0
    for seed in range(runs):
        rng = np.random.default_rng([seed, 99])
        residues = rng.integers(50, 400, 100).astype(float)
        arms = {}
        shared = rng.normal(2.8, 0.3, 100)
        for arm, effect in zip(
            ("baseline", "uncertainty", "calibration", "both"), (0, 0.1, 0.1, 0.22), strict=True
        ):
            own = rng.normal(0, 0.01, (5, 1)) + rng.normal(0, 0.05, (5, 100))
            arms[arm] = (shared + effect + own) * residues
        found = contrast(arms, INTERACTION, residues, np.arange(100))
        hits += found.low <= 0.02 <= found.high
        equivalent += is_equivalent(found, 0.02)
    assert 0.93 <= hits / runs <= 0.97
    assert equivalent / runs <= 0.06  # the truth lies on the margin


def test_equivalence():
    # Two one-sided tests pass exactly when the 90 % interval, here 0.001 ± 1.725 × error, fits.
    for error, equivalent in ((0.005, True), (0.0109, True), (0.0112, False), (0.1, False)):
        near = Estimate(0.001, math.nan, math.nan, error, degrees_of_freedom=20)
        p = stats.t.cdf((0.001 - 0.02) / error, 20)
        assert is_equivalent(near, 0.02) == equivalent == (p < 0.05)
    assert not is_equivalent(Estimate(0.03, math.nan, math.nan, 0.0), 0.02)


def test_holm():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}
    with pytest.raises(ValueError, match="b has no p-value"):
        holm({"a": 0.01, "b": math.nan})


def test_what_is_not_known_has_no_p_value():
    nan = math.nan
    assert math.isnan(Estimate(nan, nan, nan, nan).p_value)
    assert math.isnan(Estimate(0.5, 0.4, 0.6).p_value)
    assert Estimate(0.5, 0.5, 0.5, 0.0).p_value == 0.0
    assert Estimate(0.0, 0.0, 0.0, 0.0).p_value == 1.0

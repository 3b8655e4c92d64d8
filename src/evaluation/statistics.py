"""Intervals, tests and power for proteins that come in families and runs that come in few seeds.

Residues of one protein, and proteins of one homology cluster, resemble each other; treating them as
independent makes intervals too narrow. Everything here resamples or sums whole clusters, and keeps
what was measured on the same protein together (student with teacher, arm with arm).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse, stats

CHUNK_CELLS = 4_000_000
"""Weights (replicates × clusters) that the bootstrap holds at a time: 32 MB."""

LARGEST_BIAS = 0.8
"""Normal quantile of the share of replicates below the estimate (0.8: 79 %) up to which BCa is
used; beyond it, BCa reads its interval from a handful of extreme replicates."""

Sums = Mapping[str, np.ndarray]
Statistic = Callable[[Sums], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; errors and variances are in the unit of the value.

    ``variance_seeds``, ``variance_clusters`` and ``variance_both`` are what seeds, test clusters
    and their interplay add to the variance of the estimate; None where they were not separated.
    """

    estimate: float
    low: float
    high: float
    level: float = 0.95
    standard_error: float = math.nan
    degrees_of_freedom: float = math.inf
    variance_seeds: float | None = None
    variance_clusters: float | None = None
    variance_both: float | None = None

    @property
    def p_value(self) -> float:
        """Two-sided p-value of the hypothesis that the value is 0."""
        if not self.standard_error > 0:
            return 1.0 if self.estimate == 0 else 0.0
        t = abs(self.estimate) / self.standard_error
        return float(2 * stats.t.sf(t, self.degrees_of_freedom))

    def interval(self, level: float) -> tuple[float, float]:
        """Return the t interval of another level."""
        half = stats.t.ppf(0.5 + level / 2, self.degrees_of_freedom) * self.standard_error
        return float(self.estimate - half), float(self.estimate + half)


def cluster_codes(clusters: Sequence[Hashable] | np.ndarray) -> tuple[np.ndarray, int]:
    """Number clusters in the order in which they first appear.

    Args:
        clusters: ``(P,)`` label of each protein's cluster.

    Returns:
        ``(P,)`` codes from 0, and the number of clusters. Numbering by first appearance makes
        a bootstrap of duplicated data draw the same weights as one of the data itself.
    """
    codes: dict[Hashable, int] = {}
    numbered = [codes.setdefault(label, len(codes)) for label in np.asarray(clusters).tolist()]
    return np.array(numbered, dtype=np.int64), len(codes)


def cluster_sums(values: np.ndarray, codes: np.ndarray, count: int) -> np.ndarray:
    """Sum ``(P, ...)`` values over the proteins of each cluster: ``(C, ...)`` in float64."""
    values = np.asarray(values, dtype=np.float64)
    membership = sparse.csr_matrix(
        (np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=(count, len(codes))
    )
    flat = values.reshape(len(codes), -1)
    return (membership @ flat).reshape(count, *values.shape[1:])


def cluster_bootstrap(
    statistic: Statistic,
    arrays: Mapping[str, np.ndarray],
    clusters: Sequence[Hashable] | np.ndarray,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    method: str = "bca",
) -> dict[str, Estimate]:
    """Bootstrap figures that are functions of sums over proteins, resampling whole clusters.

    A replicate draws as many clusters as there are, with replacement (multinomial weights), and
    sums each array with those weights; arrays of one call share the weights, so differences and
    ratios between models are paired.

    Args:
        statistic: maps weighted sums ``(R, ...)`` under the names of ``arrays`` to figures
            ``(R,)``. Must work for any R.
        arrays: per-protein sufficient statistics ``(P, ...)``.
        clusters: ``(P,)`` cluster of each protein.
        n: replicates.
        seed: of the draws.
        level: of the interval.
        method: ``percentile``, or ``bca`` (bias-corrected and accelerated, Efron 1987, JASA
            82:171), whose acceleration comes from leaving out one cluster at a time; where the
            replicates lie almost all on one side of the estimate, percentiles less twice the bias.

    Returns:
        For each figure of ``statistic`` its estimate on all proteins, interval and standard error.
        With fewer than two clusters, or where a figure is not finite, the interval is NaN.

    Raises:
        ValueError: nothing to resample, lengths that differ, or an unknown method.
    """
    if method not in ("percentile", "bca"):
        raise ValueError(f"method must be percentile or bca, got {method!r}")
    if n < 1:
        raise ValueError(f"--bootstrap must be at least 1, got {n}")
    codes, count = cluster_codes(clusters)
    if not count:
        raise ValueError("no proteins to bootstrap")
    for name, values in arrays.items():
        if len(values) != len(codes):
            raise ValueError(f"{name} has {len(values)} rows for {len(codes)} proteins")
    by_cluster = {name: cluster_sums(values, codes, count) for name, values in arrays.items()}
    totals = {name: sums.sum(0, keepdims=True) for name, sums in by_cluster.items()}
    point = {name: float(value[0]) for name, value in statistic(totals).items()}

    rng = np.random.default_rng(seed)
    pieces: list[Mapping[str, np.ndarray]] = []
    step = max(1, CHUNK_CELLS // count)
    for start in range(0, n, step):
        size = min(step, n - start)
        weights = rng.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)
        pieces.append(statistic({k: _weighted(weights, v) for k, v in by_cluster.items()}))
    left_out: list[Mapping[str, np.ndarray]] = []
    if method == "bca" and count > 1:
        for start in range(0, count, step):
            part = slice(start, start + step)
            left_out.append(statistic({k: totals[k] - v[part] for k, v in by_cluster.items()}))

    results = {}
    for name, estimate in point.items():
        replicates = np.concatenate([piece[name] for piece in pieces])
        jackknife = np.concatenate([piece[name] for piece in left_out]) if left_out else None
        low, high = _bootstrap_interval(estimate, replicates, jackknife, level)
        if count < 2:
            low = high = math.nan
        results[name] = Estimate(
            estimate, low, high, level, float(np.std(replicates, ddof=1)) if n > 1 else math.nan
        )
    return results


def plain_estimates(
    statistic: Statistic, arrays: Mapping[str, np.ndarray], level: float = 0.95
) -> dict[str, Estimate]:
    """Return the figures of :func:`cluster_bootstrap` without intervals (NaN).

    Args:
        statistic: as there.
        arrays: per-protein sufficient statistics ``(P, ...)``; P may be 0.
        level: stored with each estimate.
    """
    totals = {k: np.asarray(v, np.float64).sum(0, keepdims=True) for k, v in arrays.items()}
    return {
        name: Estimate(float(value[0]), math.nan, math.nan, level)
        for name, value in statistic(totals).items()
    }


def _weighted(weights: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Return ``(R, C)`` weights times ``(C, ...)`` sums: ``(R, ...)``."""
    flat = sums.reshape(len(sums), -1)
    # Each protein fills few cells of a fine histogram: those are multiplied as sparse matrices.
    wide = flat.shape[1] > 64
    product = (sparse.csr_matrix(flat.T) @ weights.T).T if wide else weights @ flat
    return product.reshape(len(weights), *sums.shape[1:])


def _bootstrap_interval(
    estimate: float, replicates: np.ndarray, jackknife: np.ndarray | None, level: float
) -> tuple[float, float]:
    """Return the percentile interval, corrected for bias and acceleration given a jackknife."""
    if not math.isfinite(estimate) or not np.isfinite(replicates).all():
        return math.nan, math.nan
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if jackknife is not None and np.isfinite(jackknife).all():
        n = len(replicates)
        below = np.sum(replicates < estimate) + 0.5 * np.sum(replicates == estimate)
        # Half a replicate away from 0 and 1, so that a one-sided bootstrap stays finite.
        bias = stats.norm.ppf(np.clip(below / n, 0.5 / n, 1 - 0.5 / n))
        if abs(bias) > LARGEST_BIAS:
            return _shifted_interval(estimate, replicates, tails)
        deviation = jackknife.mean() - jackknife
        spread = np.sum(deviation**2)
        acceleration = np.sum(deviation**3) / (6 * spread**1.5) if spread > 0 else 0.0
        z = bias + stats.norm.ppf(tails)
        tails = stats.norm.cdf(bias + z / (1 - acceleration * z))
    low, high = np.quantile(replicates, tails)
    return float(low), float(high)


def _shifted_interval(
    estimate: float, replicates: np.ndarray, tails: np.ndarray
) -> tuple[float, float]:
    """Return percentiles less twice the bias, drawn out to hold the estimate.

    A figure that noise can only raise (a divergence, an ECE) is higher in replicates than in the
    data by about as much as it is higher in the data than in truth.
    """
    shift = 2 * (float(replicates.mean()) - estimate)
    low, high = np.quantile(replicates, tails) - shift
    if estimate >= 0 and replicates.min() >= 0:
        low = max(low, 0.0)
    return float(min(low, estimate)), float(max(high, estimate))


def contrast(
    nll: Mapping[str, np.ndarray],
    coefficients: Mapping[str, float],
    residues: np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray,
    level: float = 0.95,
) -> Estimate:
    """Estimate Σ_arm c_arm ln(perplexity per residue) over seeds and test clusters.

    Args:
        nll: for each arm ``(S, P)`` nats summed over each protein; row s of every arm is one seed
            (same initial student, same data order), column p one protein.
        coefficients: c of each arm; ``{"both": 1, "baseline": -1}`` is a plain difference.
        residues: ``(P,)`` residues of each protein.
        clusters: ``(P,)`` cluster of each protein.
        level: of the interval.

    Returns:
        The estimate of :func:`two_way_interval`, in nats for each residue.

    Raises:
        ValueError: an arm is missing, shapes differ, or there are fewer than two seeds or clusters.
    """
    missing = [arm for arm in coefficients if arm not in nll]
    if missing:
        raise ValueError(f"no runs of the arm {missing[0]!r}")
    shapes = {np.shape(nll[arm]) for arm in coefficients}
    if len(shapes) != 1:
        raise ValueError(f"the arms have different seeds or proteins: shapes {sorted(shapes)}")
    numerators = np.sum(
        [c * np.asarray(nll[arm], dtype=np.float64) for arm, c in coefficients.items()], axis=0
    )
    return two_way_interval(numerators, residues, clusters, level)


def interaction(
    nll: Mapping[str, np.ndarray],
    residues: np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray,
    level: float = 0.95,
    arms: tuple[str, str, str, str] = ("baseline", "uncertainty", "calibration", "both"),
) -> Estimate:
    """Estimate I = y11 - y10 - y01 + y00 with y = ln(perplexity per residue).

    Args:
        nll: as in :func:`contrast`.
        residues: ``(P,)``.
        clusters: ``(P,)``.
        level: of the interval.
        arms: names of y00, y10, y01 and y11.

    Returns:
        The estimate; below 0 means that the two together are better than their separate effects.
    """
    coefficients = dict(zip(arms, (1.0, -1.0, -1.0, 1.0), strict=True))
    return contrast(nll, coefficients, residues, clusters, level)


def two_way_interval(
    numerators: np.ndarray,
    denominators: np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray,
    level: float = 0.95,
) -> Estimate:
    """Return the mean over seeds of Σ numerators / Σ denominators, with a t interval.

    Seeds and clusters are crossed random effects: every seed is measured on every cluster. The
    variance of the mean is σ²_seed/S + σ²_cluster/C + σ²_both/(SC), estimated as V_S + V_C - V_SC:
    the variance of the seeds' figures divided by S, the linearised variance over clusters of the
    mean over seeds, and the part that both of these contain (two-way clustering; Cameron, Gelbach
    & Miller 2011, J. Business & Economic Statistics 29:238; Owen 2007, Annals of Applied
    Statistics 1:386).

    Why not the percentiles of a bootstrap over seeds: with S = 5 it takes the spread of the seeds
    (S-1)/S too small and uses normal quantiles where t quantiles of four degrees belong, and so
    covers about 85 % instead of 95 % where seeds dominate. Here the quantile is Student's, with
    degrees of freedom after Satterthwaite (1946, Biometrics Bulletin 2:110): S - 1 where seeds
    dominate, C - 1 where clusters do.

    Args:
        numerators: ``(S, P)``.
        denominators: ``(P,)``, the same for all seeds.
        clusters: ``(P,)``.
        level: of the interval.

    Returns:
        The estimate with its components of variance.

    Raises:
        ValueError: fewer than two seeds or clusters, or shapes that differ.
    """
    x, r = _seed_cluster_sums(numerators, denominators, clusters)
    seeds, count = x.shape
    total = r.sum()
    figures = x.sum(1) / total  # (S,)
    estimate = float(figures.mean())
    residual = (x - figures[:, None] * r) / total  # (S, C), each row sums to 0
    shared = residual.mean(0)
    finite = count / (count - 1)
    v_seeds = float(figures.var(ddof=1)) / seeds
    v_clusters = float(finite * np.sum(shared**2))
    v_both = float(finite * np.sum((residual - shared) ** 2)) / (seeds * (seeds - 1))
    # The difference can fall below either part by chance; the larger part is a safe floor.
    variance = max(v_seeds + v_clusters - v_both, v_seeds, v_clusters)
    spread = (
        v_seeds**2 / (seeds - 1)
        + v_clusters**2 / (count - 1)
        + v_both**2 / ((seeds - 1) * (count - 1))
    )
    freedom = variance**2 / spread if spread > 0 else math.inf
    error = math.sqrt(variance)
    half = stats.t.ppf(0.5 + level / 2, freedom) * error
    return Estimate(
        estimate,
        float(estimate - half),
        float(estimate + half),
        level,
        error,
        float(freedom),
        v_seeds,
        v_clusters,
        v_both,
    )


def _seed_cluster_sums(
    numerators: np.ndarray, denominators: np.ndarray, clusters: Sequence[Hashable] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return numerators ``(S, C)`` and denominators ``(C,)`` summed by cluster, checked."""
    numerators = np.asarray(numerators, dtype=np.float64)
    if numerators.ndim != 2 or np.shape(denominators) != numerators.shape[1:]:
        raise ValueError(
            f"expected (seeds, proteins) and (proteins,), got {np.shape(numerators)} "
            f"and {np.shape(denominators)}"
        )
    codes, count = cluster_codes(clusters)
    if len(codes) != numerators.shape[1]:
        raise ValueError(f"{len(codes)} clusters for {numerators.shape[1]} proteins")
    if len(numerators) < 2:
        raise ValueError("one seed says nothing about the spread of seeds: at least 2 are needed")
    if count < 2:
        raise ValueError("one test cluster says nothing about their spread: at least 2 are needed")
    return (
        cluster_sums(numerators.T, codes, count).T,
        cluster_sums(np.asarray(denominators), codes, count),
    )


@dataclass(frozen=True)
class Equivalence:
    """The outcome of two one-sided tests: ``equivalent`` if both ends lie within the margin."""

    equivalent: bool
    p_value: float
    low: float
    high: float
    margin: float


def equivalence(estimate: Estimate, margin: float, alpha: float = 0.05) -> Equivalence:
    """Test whether a figure lies within ±margin of 0 (TOST).

    Two one-sided tests at ``alpha`` are passed exactly when the interval of level 1 - 2 ``alpha``
    lies inside the margin (Schuirmann 1987, J. Pharmacokinetics and Biopharmaceutics 15:657).

    Args:
        estimate: with standard error and degrees of freedom.
        margin: above 0, in the figure's unit.
        alpha: level of each one-sided test.

    Returns:
        The decision, the larger of the two p-values and the interval.

    Raises:
        ValueError: ``margin`` is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"the margin of equivalence must be above 0, got {margin}")
    low, high = estimate.interval(1 - 2 * alpha)
    error = estimate.standard_error
    if error > 0:
        freedom = estimate.degrees_of_freedom
        p = max(
            float(stats.t.sf((estimate.estimate + margin) / error, freedom)),
            float(stats.t.cdf((estimate.estimate - margin) / error, freedom)),
        )
    else:
        p = 0.0 if abs(estimate.estimate) < margin else 1.0
    return Equivalence(-margin < low and high < margin, p, low, high, margin)


def standard_error(seed_sd: float, cluster_error: float, seeds: int) -> tuple[float, float]:
    """Return the standard error expected with some number of seeds, and its degrees of freedom.

    Args:
        seed_sd: standard deviation of the figure between seeds.
        cluster_error: what the test clusters add, whatever the seeds (√ of ``variance_clusters``).
        seeds: at least 2.
    """
    if seeds < 2:
        raise ValueError(f"at least 2 seeds are needed, got {seeds}")
    between = seed_sd**2 / seeds
    variance = between + cluster_error**2
    freedom = variance**2 / (between**2 / (seeds - 1)) if between > 0 else math.inf
    return math.sqrt(variance), freedom


def power(
    effect: float, seed_sd: float, cluster_error: float, seeds: int, alpha: float = 0.05
) -> float:
    """Return the chance that a two-sided test finds a true effect.

    Args:
        effect: true value of the figure.
        seed_sd: standard deviation between seeds.
        cluster_error: standard error that the test clusters add.
        seeds: at least 2.
        alpha: level of the test.

    Returns:
        The power of the t test with Satterthwaite's degrees of freedom (non-central t).
    """
    error, freedom = standard_error(seed_sd, cluster_error, seeds)
    if error == 0:
        return 1.0 if effect else alpha
    bound = stats.t.ppf(1 - alpha / 2, freedom)
    shift = effect / error
    if math.isinf(freedom):
        return float(stats.norm.sf(bound - shift) + stats.norm.cdf(-bound - shift))
    return float(stats.nct.sf(bound, freedom, shift) + stats.nct.cdf(-bound, freedom, shift))


def seeds_for_half_width(
    half_width: float,
    seed_sd: float,
    cluster_error: float,
    level: float = 0.95,
    most: int = 1000,
) -> int | None:
    """Return the fewest seeds whose expected interval is no wider than ±half_width.

    Returns:
        None where ``most`` seeds are not enough, as when the test clusters alone are too few.
    """
    for seeds in range(2, most + 1):
        error, freedom = standard_error(seed_sd, cluster_error, seeds)
        if stats.t.ppf(0.5 + level / 2, freedom) * error <= half_width:
            return seeds
    return None


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct p-values for their number (Holm 1979, Scandinavian J. Statistics 6:65).

    Args:
        p_values: for each hypothesis its p-value.

    Returns:
        Adjusted p-values under the same names: reject those at most α, and at most a share α of
        such families holds any false rejection, however the tests depend on each other.
    """
    order = sorted(p_values, key=lambda name: p_values[name])
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, name in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p_values[name]))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}


@dataclass(frozen=True)
class PairedTest:
    """A one-sided paired comparison: mean difference, its interval, and the p-value."""

    difference: float
    low: float
    high: float
    p_value: float
    pairs: int


def paired_test(differences: np.ndarray, level: float = 0.95) -> PairedTest:
    """Test whether differences are above 0 on average (paired t test, one-sided).

    Args:
        differences: ``(n,)``, one for each independent unit.
        level: of the two-sided interval that goes with it.

    Returns:
        Mean, interval and one-sided p-value; with fewer than two pairs the p-value is 1.
    """
    differences = np.asarray(differences, dtype=np.float64)
    n = len(differences)
    mean = float(differences.mean()) if n else math.nan
    if n < 2:
        return PairedTest(mean, math.nan, math.nan, 1.0, n)
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    if error == 0:
        return PairedTest(mean, mean, mean, 0.0 if mean > 0 else 1.0, n)
    half = float(stats.t.ppf(0.5 + level / 2, n - 1)) * error
    return PairedTest(mean, mean - half, mean + half, float(stats.t.sf(mean / error, n - 1)), n)

"""Intervals, tests and power for proteins that come in families and runs that come in few seeds.

Residues of one protein, and proteins of one homology cluster, resemble each other; treating them as
independent makes intervals too narrow. Everything here resamples or sums whole clusters, and keeps
values of the same protein together (student with teacher, arm with arm). Intervals are of 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse, stats

LEVEL = 0.95
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
CHUNK_CELLS = 4_000_000
"""Numbers of replicates that a bootstrap holds at a time: 32 MB."""

LARGEST_BIAS = 0.8
"""Normal quantile of the share of replicates below the estimate (0.8: 79 %) up to which BCa is
used; beyond it, BCa reads its interval from a handful of extreme replicates."""

Sums = Mapping[str, np.ndarray]
Statistic = Callable[[Sums], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; the error is in the unit of the value."""

    estimate: float
    low: float
    high: float
    standard_error: float = math.nan
    degrees_of_freedom: float = math.inf

    @property
    def p_value(self) -> float:
        """Two-sided p-value of the hypothesis that the value is 0; NaN where it or its error is."""
        if math.isnan(self.estimate) or math.isnan(self.standard_error):
            return math.nan
        if not self.standard_error > 0:
            return 1.0 if self.estimate == 0 else 0.0
        t = abs(self.estimate) / self.standard_error
        return float(2 * stats.t.sf(t, self.degrees_of_freedom))


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


def cluster_weights(count: int, n: int, seed: int, row_cells: int) -> Iterator[np.ndarray]:
    """Yield the weights ``(R, C)`` of ``n`` replicates that draw C clusters with replacement.

    Args:
        count: number of clusters C.
        n: replicates.
        seed: of the draws.
        row_cells: numbers that the caller makes of one replicate, which bounds R.
    """
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK_CELLS // row_cells)
    for start in range(0, n, step):
        size = min(step, n - start)
        yield rng.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)


def cluster_bootstrap(
    statistic: Statistic,
    arrays: Mapping[str, np.ndarray],
    clusters: Sequence[Hashable] | np.ndarray,
    n: int = 2000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Bootstrap functions of sums over proteins, resampling whole clusters.

    A replicate draws as many clusters as there are, with replacement (multinomial weights), and
    sums each array with those weights; arrays of one call share the weights, so differences and
    ratios between models are paired. Intervals are bias-corrected and accelerated (BCa; Efron 1987,
    JASA 82:171); the acceleration comes from leaving out one cluster at a time. Where almost all
    replicates lie on one side of the estimate they are percentiles less twice the bias. Percentiles
    are expanded for the number of clusters (:func:`expanded_quantiles`), and standard errors are
    those of the replicates times √(C/(C - 1)), with C - 1 degrees of freedom.

    Args:
        statistic: maps weighted sums ``(R, ...)`` under the names of ``arrays`` to values
            ``(R,)``. Must work for any R.
        arrays: per-protein sufficient statistics ``(P, ...)``.
        clusters: ``(P,)`` cluster of each protein.
        n: replicates.
        seed: of the draws.

    Returns:
        For each value of ``statistic`` its estimate on all proteins, interval and standard error.
        With fewer than two clusters, or where a value is not finite, the interval is NaN.

    Raises:
        ValueError: nothing to resample, or lengths that differ.
    """
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

    pieces = [
        statistic({k: _weighted(weights, v) for k, v in by_cluster.items()})
        for weights in cluster_weights(count, n, seed, count)
    ]
    left_out: list[Mapping[str, np.ndarray]] = []
    if count > 1:
        step = max(1, CHUNK_CELLS // count)
        for start in range(0, count, step):
            part = slice(start, start + step)
            left_out.append(statistic({k: totals[k] - v[part] for k, v in by_cluster.items()}))

    results = {}
    for name, estimate in point.items():
        replicates = np.concatenate([piece[name] for piece in pieces])
        jackknife = np.concatenate([piece[name] for piece in left_out]) if left_out else None
        low = high = math.nan
        if jackknife is not None:
            low, high = _bootstrap_interval(estimate, replicates, jackknife)
        error, freedom = math.nan, math.inf
        if count > 1 and n > 1:
            error = float(np.std(replicates, ddof=1)) * math.sqrt(count / (count - 1))
            freedom = count - 1
        results[name] = Estimate(estimate, low, high, error, freedom)
    return results


def bootstrap_or_plain(
    statistic: Statistic,
    arrays: Mapping[str, np.ndarray],
    clusters: Sequence[Hashable] | np.ndarray,
    n: int,
    seed: int,
) -> dict[str, Estimate]:
    """Return :func:`cluster_bootstrap`; without replicates or proteins, intervals of NaN."""
    if n and len(clusters):
        return cluster_bootstrap(statistic, arrays, clusters, n, seed)
    totals = {k: np.asarray(v, np.float64).sum(0, keepdims=True) for k, v in arrays.items()}
    return {
        name: Estimate(float(value[0]), math.nan, math.nan)
        for name, value in statistic(totals).items()
    }


def _weighted(weights: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Return ``(R, C)`` weights times ``(C, ...)`` sums: ``(R, ...)``."""
    flat = sums.reshape(len(sums), -1)
    # Each protein fills few cells of a fine histogram: those are multiplied as sparse matrices.
    wide = flat.shape[1] > 64
    product = (sparse.csr_matrix(flat.T) @ weights.T).T if wide else weights @ flat
    return product.reshape(len(weights), *sums.shape[1:])


def expanded_quantiles(count: int) -> np.ndarray:
    """Return the normal quantiles ``(2,)`` that a bootstrap of C clusters reads its ends at.

    ±t(97.5 %, C - 1) √(C/(C - 1)) in place of ±1.96: replicates vary by (C - 1)/C of the variance
    that the estimate has, and their percentiles stand for normal quantiles although the spread
    between clusters is itself estimated. For a mean of values that are about normal the interval is
    then Student's (expanded percentiles; Hesterberg 2015, The American Statistician 69:371).

    Args:
        count: number of clusters C, at least two.
    """
    return stats.t.ppf(TAILS, count - 1) * math.sqrt(count / (count - 1))


def percentiles(replicates: np.ndarray, count: int) -> np.ndarray:
    """Return the ends ``(2,)`` of the expanded percentile interval of replicates ``(R,)``.

    ``count`` are the clusters that they resample, at least two.
    """
    return np.quantile(replicates, stats.norm.cdf(expanded_quantiles(count)))


def _bootstrap_interval(
    estimate: float, replicates: np.ndarray, jackknife: np.ndarray
) -> tuple[float, float]:
    """Return the percentile interval, corrected for bias and acceleration if that is finite."""
    if not math.isfinite(estimate) or not np.isfinite(replicates).all():
        return math.nan, math.nan
    count = len(jackknife)
    if np.isfinite(jackknife).all():
        n = len(replicates)
        below = np.sum(replicates < estimate) + 0.5 * np.sum(replicates == estimate)
        # Half a replicate away from 0 and 1, so that a one-sided bootstrap stays finite.
        bias = stats.norm.ppf(np.clip(below / n, 0.5 / n, 1 - 0.5 / n))
        if abs(bias) > LARGEST_BIAS:
            return _shifted_interval(estimate, replicates, count)
        deviation = jackknife.mean() - jackknife
        spread = np.sum(deviation**2)
        acceleration = np.sum(deviation**3) / (6 * spread**1.5) if spread > 0 else 0.0
        z = bias + expanded_quantiles(count)
        tails = stats.norm.cdf(bias + z / (1 - acceleration * z))
        low, high = np.quantile(replicates, tails)
    else:
        low, high = percentiles(replicates, count)
    return float(low), float(high)


def _shifted_interval(estimate: float, replicates: np.ndarray, count: int) -> tuple[float, float]:
    """Return percentiles less twice the bias, widened to hold the estimate.

    A value that noise can only raise (a divergence, an ECE) is higher in replicates than in the
    data by about as much as it is higher in the data than in truth.
    """
    shift = 2 * (float(replicates.mean()) - estimate)
    low, high = percentiles(replicates, count) - shift
    if estimate >= 0 and replicates.min() >= 0:
        low = max(low, 0.0)
    return float(min(low, estimate)), float(max(high, estimate))


def contrast(
    nll: Mapping[str, np.ndarray],
    coefficients: Mapping[str, float],
    residues: np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray,
) -> Estimate:
    """Estimate Σ_arm c_arm ln(perplexity per residue) over seeds and test clusters.

    Args:
        nll: for each arm ``(S, P)`` nats summed over each protein; row s of every arm is one seed
            (same initial student, same data order), column p one protein.
        coefficients: c of each arm; ``{"both": 1, "baseline": -1}`` is a plain difference.
        residues: ``(P,)`` residues of each protein.
        clusters: ``(P,)`` cluster of each protein.

    Returns:
        The estimate of :func:`two_way_interval`, in nats per residue.

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
    return two_way_interval(numerators, residues, clusters)


def two_way_interval(
    numerators: np.ndarray,
    denominators: np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray,
) -> Estimate:
    """Return the mean over seeds of Σ numerators / Σ denominators, with a t interval.

    Seeds and clusters are crossed random effects: every seed is measured on every cluster. The
    variance of the mean is σ²_seed/S + σ²_cluster/C + σ²_both/(SC), estimated as V_S + V_C - V_SC:
    the variance between seeds divided by S, the linearised variance over clusters of the
    mean over seeds, and the part that both of these contain (two-way clustering; Cameron, Gelbach
    & Miller 2011, J. Business & Economic Statistics 29:238; Owen 2007, Annals of Applied
    Statistics 1:386).

    The quantile is Student's, with degrees of freedom after Satterthwaite (1946, Biometrics
    Bulletin 2:110): S - 1 where seeds dominate, C - 1 where clusters do. Percentiles of a bootstrap
    over five seeds would cover about 85 % instead of 95 % where seeds dominate: their variance is
    too small by (S-1)/S, and they stand for normal quantiles instead of t quantiles.

    Args:
        numerators: ``(S, P)``.
        denominators: ``(P,)``, the same for all seeds.
        clusters: ``(P,)``.

    Returns:
        The estimate with its components of variance.

    Raises:
        ValueError: fewer than two seeds or clusters, or shapes that differ.
    """
    x, r = _seed_cluster_sums(numerators, denominators, clusters)
    seeds, count = x.shape
    total = r.sum()
    by_seed = x.sum(1) / total  # (S,)
    estimate = float(by_seed.mean())
    residual = (x - by_seed[:, None] * r) / total  # (S, C), each row sums to 0
    shared = residual.mean(0)
    finite = count / (count - 1)
    v_seeds = float(by_seed.var(ddof=1)) / seeds
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
    half = stats.t.ppf(TAILS[1], freedom) * error
    low, high = float(estimate - half), float(estimate + half)
    return Estimate(estimate, low, high, error, float(freedom))


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
        raise ValueError("one seed does not show the spread between seeds: at least 2 are needed")
    if count < 2:
        raise ValueError("one test cluster does not show their spread: at least 2 are needed")
    return (
        cluster_sums(numerators.T, codes, count).T,
        cluster_sums(np.asarray(denominators), codes, count),
    )


def mean_interval(values: Sequence[float] | np.ndarray) -> Estimate:
    """Return the mean of independent values with Student's interval.

    Args:
        values: ``(n,)``, one for each independent unit; at least two.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval needs at least 2 values, got {n}")
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf(TAILS[1], n - 1)) * error
    return Estimate(mean, mean - half, mean + half, error, n - 1)


def is_equivalent(estimate: Estimate, margin: float) -> bool:
    """Return whether a value is shown to lie within ±margin of 0 (two one-sided tests, TOST).

    Both tests are passed at level 5 % exactly when the t interval of level 90 % lies inside the
    margin (Schuirmann 1987, J. Pharmacokinetics and Biopharmaceutics 15:657).
    """
    quantile = stats.t.ppf(0.95, estimate.degrees_of_freedom)
    half = quantile * estimate.standard_error
    return bool(-margin < estimate.estimate - half and estimate.estimate + half < margin)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct p-values for their number (Holm 1979, Scandinavian J. Statistics 6:65).

    Returns:
        Adjusted p-values under the same names: reject those at most α, and at most a share α of
        such families holds any false rejection, however the tests depend on each other.

    Raises:
        ValueError: a p-value is NaN: that of the others depends on its rank.
    """
    for name, value in p_values.items():
        if math.isnan(value):
            raise ValueError(f"{name} has no p-value to correct")
    order = sorted(p_values, key=lambda name: p_values[name])
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, name in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p_values[name]))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}

"""Describes sets of generated proteins: lengths, repeats, diversity, novelty, known families.

:func:`describe` returns the metrics of one set by dotted names, with intervals over proteins.
:func:`describe_all` adds two controls to compare them with: natural proteins, and the same
proteins shuffled, which keep length and composition and lose everything else.
"""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from src.common.cli import progress
from src.evaluation import composition
from src.evaluation.metrics import compute_generation_metrics
from src.evaluation.results import put_estimate
from src.evaluation.statistics import LEVEL, TAILS, Estimate, bootstrap_or_plain, cluster_codes
from src.proteins.layouts import STANDARD_RESIDUES, shuffled
from src.proteins.relatives import (
    aligned,
    check_profiles,
    family_hits,
    local_aligner,
    nearest_identities,
    word_sets,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAIRS = 500
"""Pairs, at most, whose identity is aligned for diversity."""
NOVELTY_LEVELS = (0.3, 0.5, 0.9)
NOVELTY_PROTEINS = 100_000
"""Training proteins, at most, among which relatives of generated ones are searched."""
OF_ALL = ("valid_share", "families.hit_share")
SHARES = (
    *OF_ALL,
    "repetitiveness.long_run_share",
    *(f"novelty.share_over_{level * 100:.0f}" for level in NOVELTY_LEVELS),
    "novelty.copied_share",
)
"""Metrics that are shares of proteins: of all (``OF_ALL``), or else of those with residues."""
EXAMPLES = 5
"""Generated proteins of each model that a results file shows."""
THOROUGH_SAMPLES = 200
"""Proteins that each model generates for a thorough description, by default."""


def length_statistics(proteins: Sequence[str]) -> dict[str, float | None]:
    """Return mean, standard deviation, extremes and quartiles of the lengths, in residues."""
    lengths = np.array([len(p) for p in proteins], dtype=np.float64)
    mean, sd = (float(lengths.mean()), float(lengths.std())) if len(lengths) else (None, None)
    return {"mean": mean, "sd": sd, **_quartiles(lengths)}


def composition_shares(proteins: Iterable[str]) -> dict[str, float]:
    """Return the share of each of the 20 residues; zeros where there is none."""
    counts = composition.residue_counts(proteins)
    shares = (counts / max(1, counts.sum())).tolist()
    return dict(zip(STANDARD_RESIDUES, shares, strict=True))


def diversity(
    proteins: Sequence[str],
    pairs: int = PAIRS,
    seed: int = 0,
    clusters: Sequence[Any] | None = None,
) -> dict[str, Estimate]:
    """Return how much proteins differ from each other.

    Args:
        proteins: residues of each, at least two.
        pairs: pairs to align, at most; drawn without replacement where there are more.
        seed: of the draw.
        clusters: ``(P,)`` of related proteins, for the intervals; None: each is its own.

    Returns:
        ``word_distance``, the mean over all pairs of one less the Jaccard similarity of their sets
        of words of three residues; ``pairwise_identity``, the mean over ``pairs`` of identical
        residues in the best local alignment, as a share of the shorter protein.
    """
    count = len(proteins)
    codes, groups = cluster_codes(range(count) if clusters is None else clusters)
    words = word_sets(proteins)
    sizes = np.asarray(words.sum(1), dtype=np.float64).ravel()
    distances, within = np.zeros(count), np.zeros(count)
    for start in range(0, count, 512):  # blocks bound the memory
        shared = (words[start : start + 512] @ words.T).toarray().astype(np.float64)
        union = sizes[start : start + 512, None] + sizes - shared
        similarity = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
        block = np.arange(start, start + len(shared))
        similarity[np.arange(len(block)), block] = 1.0  # a protein and itself are no pair
        distances[block] = (1 - similarity).sum(1)
        within[block] = ((1 - similarity) * (codes[block, None] == codes)).sum(1)
    all_pairs = count * (count - 1) // 2
    chosen = np.random.default_rng(seed).choice(all_pairs, min(pairs, all_pairs), replace=False)
    first = np.floor((1 + np.sqrt(1 + 8 * chosen.astype(np.float64))) / 2).astype(np.int64)
    first -= first * (first - 1) // 2 > chosen  # the root may round up
    second = chosen - first * (first - 1) // 2
    aligner = local_aligner()
    identity = []
    for pair in progress(range(len(chosen)), len(chosen), "aligning", "pairs"):
        left, right = proteins[int(first[pair])], proteins[int(second[pair])]
        identity.append(aligned(aligner, left, right)[0] / min(len(left), len(right)))
    sizes = np.bincount(codes, minlength=groups)
    left_codes, right_codes = codes[first], codes[second]
    touched = np.concatenate([left_codes, right_codes[left_codes != right_codes]])
    values = np.concatenate([identity, np.array(identity)[left_codes != right_codes]])
    return {
        "word_distance": pair_mean(
            np.bincount(codes, distances - within / 2, groups),
            sizes * (count - 1) - sizes * (sizes - 1) / 2,
            distances.sum() / 2,
            all_pairs,
        ),
        "pairwise_identity": pair_mean(
            np.bincount(touched, values, groups),
            np.bincount(touched, minlength=groups),
            sum(identity),
            len(identity),
        ),
    }


def pair_mean(sums: np.ndarray, counts: np.ndarray, total: float, pairs: int) -> Estimate:
    """Return the mean of a value of pairs of proteins, with its interval over clusters.

    Pairs that share a protein, or have proteins of one cluster, are not independent, so clusters
    are left out one at a time with all pairs that have a member (jackknife of a U-statistic;
    Arvesen 1969, Annals of Mathematical Statistics 40:2076). Where only some pairs were measured
    the interval is a little wide.

    Args:
        sums: ``(C,)`` sum of the value over the pairs that have a member of each cluster.
        counts: ``(C,)`` number of those pairs.
        total: sum over all pairs.
        pairs: number of all pairs.

    Returns:
        The mean over pairs; the interval is NaN where one cluster has a member in all pairs.
    """
    estimate = float(total / pairs)
    left = pairs - counts
    if not (left > 0).all():
        return Estimate(estimate, math.nan, math.nan)
    without = (total - sums) / left
    count = len(sums)
    error = math.sqrt((count - 1) / count * np.sum((without - without.mean()) ** 2))
    half = stats.t.ppf(TAILS[1], count - 1) * error
    return Estimate(estimate, float(estimate - half), float(estimate + half), error)


@dataclass(frozen=True)
class DescriptionSettings:
    """How sets of proteins are described.

    Attributes:
        thorough: also diversity, novelty and, given ``profiles``, known families.
        profiles: HMM file.
        bootstrap: replicates for the intervals; 0: none.
        seed: of all random draws.
    """

    thorough: bool = False
    profiles: Path | None = None
    bootstrap: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings. Raises ``ValueError``."""
        if self.profiles is not None:
            if not self.thorough:
                raise ValueError("--profiles needs --generation_metrics beside it")
            check_profiles(self.profiles)


def describe(
    proteins: Sequence[str],
    natural: Sequence[str],
    settings: DescriptionSettings | None = None,
    *,
    train: Sequence[str] | None = None,
    nll: np.ndarray | None = None,
    clusters: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """Describe a set of proteins in one record.

    Args:
        proteins: residues of each; empty ones count as not valid and nothing else.
        natural: natural proteins, the reference of composition.
        settings: of the description and its intervals.
        train: training proteins, for novelty; None: leave it out.
        nll: ``(P,)`` of each protein under the teacher, in nats; NaN: not scored.
        clusters: ``(P,)`` of related proteins; None: each is a draw of its own, as samples are.

    Returns:
        ``sequences``; ``length`` and ``composition``; ``kl_of_an_exact_sample``, the composition
        divergence that chance alone gives; ``distinct_share`` of the proteins and
        ``distinct_4mers`` of their words of four, which fall with the size of the set; the
        metrics of :data:`src.evaluation.metrics.GENERATION_METRICS` and, if thorough, of
        :func:`diversity`; ``novelty.train_proteins``, quartiles of ``novelty.nearest_identity``,
        ``families.families``, ``.profiles`` and ``.threshold``. ``intervals`` by dotted name.
        A metric with nothing to count is None.
    """
    settings = settings or DescriptionSettings()
    whole = [p for p in proteins if p]
    record: dict[str, Any] = {
        "sequences": len(proteins),
        "length": length_statistics(whole),
        "composition": composition_shares(whole),
        "kl_of_an_exact_sample": 19 / (2 * max(1, int(composition.residue_counts(whole).sum()))),
        "distinct_share": len(set(whole)) / len(whole) if whole else None,
        "distinct_4mers": composition.distinct_share(whole) if whole else None,
    }
    record["intervals"] = {}
    arrays = per_protein_sums(proteins)
    if nll is not None:
        scored = np.isfinite(nll)
        arrays["nll"] = np.where(scored, nll, 0.0)
        arrays["scored_residues"] = np.where(scored, arrays["residues"], 0)
    if settings.thorough and train is not None:
        identity = nearest_identities(proteins, train)["identity"]
        arrays["identity"] = identity
        arrays |= {f"over_{level}": identity > level for level in NOVELTY_LEVELS}
        arrays["copied"] = identity >= 1
        record["novelty"] = {
            "train_proteins": len(train),
            "nearest_identity": _quartiles(identity[arrays["whole"]]),
        }
    if settings.thorough and settings.profiles is not None:
        hits = family_hits(proteins, settings.profiles)
        arrays["hit"] = hits["hit"]
        record["families"] = {key: hits[key] for key in ("families", "profiles", "threshold")}
    for name, estimate in _estimates(arrays, natural, settings, clusters).items():
        put_estimate(record, name, estimate)
    if settings.thorough and len(whole) > 1:
        related = None
        if clusters is not None:
            related = [c for c, p in zip(clusters, proteins, strict=True) if p]
        differences = diversity(whole, seed=settings.seed, clusters=related)
        for name, estimate in differences.items():
            put_estimate(record, f"diversity.{name}", estimate)
    return record


def per_protein_sums(proteins: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the sums over each protein that the cheap metrics need, ``(P, ...)`` by name."""
    sizes = np.array([len(p) for p in proteins], dtype=np.int64)
    counts = np.array([composition.residue_counts([p]) for p in proteins]).reshape(-1, 20)
    runs = np.array([composition.longest_run(p) for p in proteins], dtype=np.int64)
    return {
        "proteins": np.ones(len(proteins), dtype=np.int64),
        "whole": sizes > 0,
        "valid": (sizes > 0) & (counts.sum(1) == sizes),
        "residues": sizes,
        "counts": counts,
        "run": runs,
        "long_run": runs >= composition.LONG_RUN,
        "tandem": sizes * np.array([composition.repeat_share(p) for p in proteins]),
        "low_complexity": sizes * np.array([composition.low_complexity_share(p) for p in proteins]),
    }


def _estimates(
    arrays: Mapping[str, np.ndarray],
    natural: Sequence[str],
    settings: DescriptionSettings,
    clusters: Sequence[Any] | None,
) -> dict[str, Estimate]:
    labels = list(range(len(arrays["proteins"])) if clusters is None else clusters)
    metrics = functools.partial(
        compute_generation_metrics, natural=composition.residue_counts(natural)
    )
    estimates = bootstrap_or_plain(metrics, arrays, labels, settings.bootstrap, settings.seed)
    counted = [label for label, whole in zip(labels, arrays["whole"], strict=True) if whole]
    draws = {name: len(set(labels if name in OF_ALL else counted)) for name in SHARES}
    return {
        name: _without_spread(e, draws.get(name)) if e.low == e.high else e
        for name, e in estimates.items()
    }


def _without_spread(estimate: Estimate, draws: int | None) -> Estimate:
    """Return an estimate whose replicates are all equal with Wilson's interval, or with none.

    Where none or all of the proteins have a property, resampling them cannot show other values;
    Wilson's interval (1927, JASA 22:209) can: that of 0 among 40 is [0, 0.09]. ``draws`` are the
    independent proteins; None: the estimate is no share of proteins.
    """
    low = high = math.nan
    if draws and estimate.estimate in (0.0, 1.0):
        test = stats.binomtest(round(estimate.estimate * draws), draws)
        low, high = test.proportion_ci(LEVEL, method="wilson")
    return replace(estimate, low=float(low), high=float(high))


def _quartiles(values: np.ndarray) -> dict[str, float | None]:
    names = ("min", "q1", "median", "q3", "max")
    if not len(values):
        return dict.fromkeys(names)
    return dict(zip(names, map(float, np.quantile(values, [0, 0.25, 0.5, 0.75, 1])), strict=True))


def describe_all(
    generated: Mapping[str, Sequence[str]],
    natural: Sequence[str],
    settings: DescriptionSettings | None = None,
    *,
    train: Sequence[str] | None = None,
    score: Callable[[Sequence[str]], np.ndarray] | None = None,
    clusters: Sequence[Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Describe each model's proteins beside natural ones, and thoroughly beside shuffled ones.

    Args:
        generated: residues of each protein by model.
        natural: natural proteins that no model was trained on.
        settings: as for :func:`describe`.
        train: as for :func:`describe`.
        score: returns the teacher's NLL of proteins, NaN where it has none.
        clusters: of the natural proteins.

    Returns:
        A record of :func:`describe` for each model, for ``natural`` and, thoroughly, for
        ``shuffled``: as many natural proteins as the largest set has, because diversity and
        distinct words are best compared between sets of one size.
    """
    settings = settings or DescriptionSettings()
    largest = max((len(proteins) for proteins in generated.values()), default=0)
    chosen = list(range(len(natural)))
    if 0 < largest < len(natural):
        drawn = np.random.default_rng(settings.seed).choice(len(natural), largest, replace=False)
        chosen = np.sort(drawn).tolist()
    some = [natural[i] for i in chosen]
    related = None if clusters is None else [clusters[i] for i in chosen]
    sets: dict[str, tuple[Sequence[str], list[Any] | None]]
    sets = {name: (proteins, None) for name, proteins in generated.items()}
    sets["natural"] = (some, related)
    if settings.thorough:
        sets["shuffled"] = ([shuffled(p, settings.seed) for p in some], related)
    return {
        name: describe(
            proteins,
            natural,
            settings,
            train=train,
            nll=None if score is None else score(proteins),
            clusters=labels,
        )
        for name, (proteins, labels) in sets.items()
    }


def measure_generation(
    results: dict[str, Any],
    models: Mapping[str, PreTrainedModel],
    tokenizer: Any,
    natural: Sequence[str],
    count: int,
    settings: DescriptionSettings | None = None,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    train: Sequence[str] | None = None,
    clusters: Sequence[Any] | None = None,
) -> None:
    """Let each model generate proteins, and add their description to an evaluation's results.

    Args:
        results: of ``src.evaluation.measurement.evaluate``; changed in place: ``generation``
            (the records of :func:`describe_all`, and the ``reference``), ``kl_from_natural`` and
            its intervals.
        models: ``student`` and ``teacher``.
        tokenizer: of both.
        natural: held-out proteins, the reference of composition.
        count: sequences that each model generates, with tags drawn from those of ``natural``.
        settings: of the description.
        batch_size: proteins sampled and scored at a time.
        max_length: residues of a sampled protein, at most, where a model states no longest input;
            others are sampled as long as they take.
        train: training proteins, for novelty.
        clusters: of the natural proteins.

    Raises:
        ValueError: a model cannot be sampled, or states no longest input without ``max_length``.
    """
    from src.evaluation.generation import GenerationSettings, sample_proteins
    from src.evaluation.sampler import fitted_length
    from src.evaluation.scoring import score_proteins
    from src.models.forward import stated_positions

    settings = settings or DescriptionSettings()
    wanted = GenerationSettings(count, seed=settings.seed, batch_size=batch_size).suited(tokenizer)
    rng, tags = np.random.default_rng(settings.seed), [getattr(p, "tag", "") for p in natural]
    drawn = Counter(tags[i] for i in rng.integers(len(tags), size=count))
    generated: dict[str, list[str]] = {}
    extra: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        started = time.monotonic()
        generated[name], counts = [], Counter()
        limit = None if stated_positions(model.config) else max_length
        for number, (tag, share) in enumerate(drawn.items()):
            seed = settings.seed + number
            part = replace(wanted, num_sequences=share, max_length=limit, tag=tag, seed=seed)
            sampled = sample_proteins(model, tokenizer, fitted_length(model, tokenizer, part))
            generated[name] += sampled.sequences
            counts.update(sampled.counts)
        extra[name] = {
            "sampling": asdict(replace(wanted, max_length=limit)),
            "counts": dict(counts),
            "sequences_per_second": len(generated[name]) / (time.monotonic() - started),
            "examples": generated[name][:EXAMPLES],
        }

    def score(proteins: Sequence[str]) -> np.ndarray:
        return score_proteins(models["teacher"], tokenizer, proteins, batch_size=batch_size).nll

    generation = describe_all(
        generated, natural, settings, train=train, score=score, clusters=clusters
    )
    for name, more in extra.items():
        generation[name] |= more
        key = "kl_from_natural"
        results[key][name] = generation[name][key]
        results["intervals"][f"{key}.{name}"] = generation[name]["intervals"][key]
    reference = {"proteins": len(natural), "composition": composition_shares(natural)}
    results["generation"] = {**generation, "reference": reference}

"""Judges a candidate against a reference by the intervals of their differences.

The verdict asks three questions: perplexity, KL divergence, calibration error (ECE). "Lower" and
"higher" mean that the 95 % interval of the difference excludes zero; perplexities are "equivalent"
where the difference is shown to be within a margin (two one-sided tests), which a wide interval
never shows. Each scenario needs all its parts at once, so its chance of error is at most that of
one part (an intersection-union test: Berger 1982, Technometrics 24:295): nothing is to correct.

The intervals are those of these two models on such proteins. They do not hold the spread between
training seeds: that needs several seeds (``src.evaluation.statistics.two_way_interval``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from src.evaluation.results import few_clusters, interval_of, lookup

if TYPE_CHECKING:
    from src.evaluation.statistics import Estimate

MARGIN = 0.02
"""Default margin of equivalence, in ln(perplexity): about 2 %, as in docs/EXPERIMENT.md."""
REPLICATES = 2000
SAME = 1e-4
"""Relative difference up to which a metric recomputed from single proteins is the file's own."""

SCENARIOS = {
    "best": "perplexity, KL and ECE lower",
    "good": "perplexity equivalent, KL and ECE lower",
    "okay": "perplexity higher, KL and ECE lower",
    "investigate": "perplexity, KL and ECE higher",
    "inconclusive": "no scenario is shown by the intervals",
}
METRIC_OF = {"perplexity": "perplexity_ratio", "KL": "kl_divergence", "ECE": "student_ece.ece"}
"""The metric of each part of the verdict."""


@dataclass
class ResultsFile:
    """A results file in a comparison; ``results`` is None where the file is missing."""

    path: Path
    results: dict[str, Any] | None
    name: str = ""


@dataclass(frozen=True)
class Difference:
    """Candidate minus reference in one metric; NaN where it is not known.

    ``outcome`` is ``lower``, ``higher``, ``equivalent``, ``unclear`` or ``unknown``. Perplexity is
    compared in ln(perplexity ratio), KL in nats per token, ECE as it is.
    """

    estimate: float
    low: float
    high: float
    outcome: str
    method: str


@dataclass(frozen=True)
class Verdict:
    """The scenario of a candidate against a reference, and its reasons."""

    candidate: str
    reference: str
    scenario: str
    differences: dict[str, Difference]
    margin: float
    clusters: int | None = None
    reasons: list[str] = field(default_factory=list)


PAIRED, UNPAIRED = "paired", "two intervals"
NOT_KNOWN = Difference(math.nan, math.nan, math.nan, "unknown", "")


def scenario_of(perplexity: str, kl: str, ece: str) -> str:
    """Return the scenario of three outcomes, a key of ``SCENARIOS``."""
    if (kl, ece) == ("lower", "lower"):
        scenarios = {"lower": "best", "equivalent": "good", "higher": "okay"}
        return scenarios.get(perplexity, "inconclusive")
    all_higher = (perplexity, kl, ece) == ("higher", "higher", "higher")
    return "investigate" if all_higher else "inconclusive"


def outcome_of(low: float, high: float, equivalent: bool = False) -> str:
    """Return the outcome that the interval of a difference shows.

    ``lower`` comes before ``equivalent`` and that before ``higher``: a difference that is both
    above zero and shown to be within the margin is one that does not matter.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        return "unknown"
    if high < 0:
        return "lower"
    if equivalent:
        return "equivalent"
    return "higher" if low > 0 else "unclear"


def verdict_on(
    candidate: ResultsFile,
    reference: ResultsFile,
    margin: float = MARGIN,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Verdict:
    """Judge a candidate against a reference.

    If both files have tables of the same single proteins, perplexity and KL are compared protein by
    protein (bootstrap over clusters, paired). Otherwise, and for ECE always, because it is no sum
    over proteins, the two intervals are subtracted end by end: [low - high', high - low']. For
    estimates that are about normal this covers at least 95 % whatever their correlation, because
    their standard errors add up in full; it misses small differences that pairing would show.

    Args:
        candidate: an entry.
        reference: another.
        margin: of equivalence, in ln(perplexity); above 0.
        replicates: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The verdict with its differences; ``inconclusive`` where a part is missing or the two were
        not measured on the same proteins beside the same teacher.

    Raises:
        ValueError: a table of single proteins is broken.
    """
    problem = _incomparable(candidate, reference)
    if problem:
        unknown = dict.fromkeys(METRIC_OF, NOT_KNOWN)
        names = candidate.name, reference.name
        return Verdict(*names, "inconclusive", unknown, margin, reasons=[problem])
    ours, theirs = candidate.results or {}, reference.results or {}
    clusters, estimates, reasons = _paired_estimates(candidate, reference, replicates, seed)
    differences = {}
    for part, metric in METRIC_OF.items():
        part_margin = margin if part == "perplexity" else None
        if part in estimates:
            differences[part] = _paired_difference(estimates[part], part_margin)
        else:
            differences[part] = _unpaired_difference(ours, theirs, metric, part_margin)
    reasons += _doubts(differences, ours, theirs)
    if not _calibration_meaningful(ours, theirs):
        differences["ECE"] = NOT_KNOWN
    scenario = scenario_of(*(d.outcome for d in differences.values()))
    return Verdict(candidate.name, reference.name, scenario, differences, margin, clusters, reasons)


def verdicts_on(
    entries: Sequence[ResultsFile],
    reference: Path,
    margin: float = MARGIN,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> tuple[list[Verdict], str | None]:
    """Judge every entry whose file exists against the one of a path.

    The other arguments are those of :func:`verdict_on`.

    Returns:
        The verdicts, and a line on why there are none, or None.

    Raises:
        ValueError: the reference holds no evaluation, or as in :func:`verdict_on`.
    """
    judged_by = next((entry for entry in entries if entry.path == reference), None)
    if judged_by is None:
        raise ValueError(f"--reference {reference} holds no evaluation of a student")
    if judged_by.results is None:
        return [], f"no verdict without the reference {reference}"
    others = [e for e in entries if e is not judged_by and e.results is not None]
    verdicts = [verdict_on(entry, judged_by, margin, replicates, seed) for entry in others]
    return verdicts, None if verdicts else f"nothing to judge against {reference}"


def unlike(entries: Sequence[ResultsFile]) -> list[str]:
    """Return a line for each entry whose row of a table cannot be compared with the first one."""
    there = [entry for entry in entries if entry.results is not None]
    problems = ((entry.name, _incomparable(entry, there[0])) for entry in there[1:])
    return [f"{there[0].name} and {name}: {problem}" for name, problem in problems if problem]


def _incomparable(candidate: ResultsFile, reference: ResultsFile) -> str | None:
    """Return why two results cannot be compared at all, or None."""
    for entry in (candidate, reference):
        if entry.results is None:
            return f"{entry.path} is missing"
    for what, name in (
        ("beside different teachers", "run.teacher.fingerprint"),
        ("on different proteins", "data.fingerprint"),
        ("on different proteins", "run.data.fingerprint"),
    ):
        ours, theirs = (lookup(e.results or {}, name) for e in (candidate, reference))
        if ours != theirs and None not in (ours, theirs):
            return f"they were measured {what}: evaluate both alike"
    return None


def _calibration_meaningful(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    name = "student_ece.calibration_meaningful"
    return all(lookup(results, name) is not False for results in (ours, theirs))


def _doubts(
    differences: Mapping[str, Difference], ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> list[str]:
    """Return warnings about metrics that are missing or mean little."""
    lines = []
    for part, difference in differences.items():
        if difference.outcome != "unknown":
            continue
        if None in (lookup(ours, METRIC_OF[part]), lookup(theirs, METRIC_OF[part])):
            how = ": evaluate with --compute_ece" if part == "ECE" else ""
            lines.append(f"{part} was not measured for both{how}")
        else:
            lines.append(f"{part} has no interval in both files: evaluate again, with --bootstrap")
    if not _calibration_meaningful(ours, theirs):
        lines.append(
            "ECE means nothing where a student is right no more often than always naming the most "
            "frequent token"
        )
    if None in (lookup(ours, "data.fingerprint"), lookup(theirs, "data.fingerprint")):
        lines.append("whether both were measured on the same proteins is not recorded")
    return lines


def _paired_difference(estimate: Estimate, margin: float | None) -> Difference:
    from src.evaluation.statistics import is_equivalent

    equivalent = bool(
        margin is not None and math.isfinite(estimate.low) and is_equivalent(estimate, margin)
    )
    outcome = outcome_of(estimate.low, estimate.high, equivalent)
    return Difference(estimate.estimate, estimate.low, estimate.high, outcome, PAIRED)


def _unpaired_difference(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], name: str, margin: float | None
) -> Difference:
    """Subtract the intervals of a metric; with a margin it is a ratio, compared in its ln."""
    mine, other = (_with_ends(results, name, margin is not None) for results in (ours, theirs))
    if mine is None or other is None:
        return NOT_KNOWN
    low, high = mine[1] - other[2], mine[2] - other[1]
    equivalent = margin is not None and -margin < low and high < margin
    return Difference(mine[0] - other[0], low, high, outcome_of(low, high, equivalent), UNPAIRED)


def _with_ends(
    results: Mapping[str, Any], name: str, logarithm: bool
) -> tuple[float, float, float] | None:
    """Return a metric and the ends of its interval, or None where any is missing."""
    value, ends = lookup(results, name), interval_of(results, name)
    if value is None or ends is None:
        return None
    if not logarithm:
        return value, ends[0], ends[1]
    if min(value, *ends) <= 0:
        return None
    return math.log(value), math.log(ends[0]), math.log(ends[1])


def per_protein_path(entry: ResultsFile) -> Path | None:
    """Return the path of a results file's table of single proteins, None without one.

    It is searched beside the file, under its name with ``.parquet``, then at the path that the
    evaluation recorded.
    """
    recorded = lookup(entry.results or {}, "run.arguments.per_protein")
    named = [Path(recorded)] if isinstance(recorded, str) else []
    return next((p for p in (entry.path.with_suffix(".parquet"), *named) if p.is_file()), None)


def _paired_estimates(
    candidate: ResultsFile, reference: ResultsFile, replicates: int, seed: int
) -> tuple[int | None, dict[str, Estimate], list[str]]:
    """Return the number of clusters, the paired differences, and why there are none."""
    from src.evaluation.per_protein import read_per_protein
    from src.evaluation.statistics import cluster_bootstrap

    frames = []
    for entry in (candidate, reference):
        path = per_protein_path(entry)
        if path is None:
            return None, {}, [f"{entry.name} has no table of single proteins (--per_protein)"]
        frame = read_per_protein(
            path, ("protein", "cluster"), ("tokens", "residues"), ("nll_student", "kl")
        )
        frame = frame.sort_values("protein", kind="stable", ignore_index=True)
        tokens = frame["tokens"].sum()
        for name, computed in (
            ("student_perplexity", np.exp(frame["nll_student"].sum() / tokens)),
            ("kl_divergence", frame["kl"].sum() / tokens),
        ):
            stated = lookup(entry.results or {}, name)
            if stated is None:
                continue
            if not math.isclose(computed, stated, rel_tol=SAME, abs_tol=1e-9):
                return None, {}, [f"{path} is of another evaluation than {entry.path}: not used"]
        frames.append(frame)
    ours, theirs = frames
    for name in ("protein", "cluster", "residues", "tokens"):
        if not ours[name].equals(theirs[name]):
            return None, {}, [f"the tables of single proteins differ in {name}: not paired"]
    arrays = {
        "nll": ours["nll_student"] - theirs["nll_student"],
        "kl": ours["kl"] - theirs["kl"],
        "tokens": ours["tokens"],
    }
    # The teacher's part of the perplexity ratio is the same on both sides and drops out.
    estimates = cluster_bootstrap(
        lambda sums: {
            "perplexity": sums["nll"] / sums["tokens"],
            "KL": sums["kl"] / sums["tokens"],
        },
        arrays,
        ours["cluster"],
        replicates,
        seed,
    )
    clusters = len(set(ours["cluster"].tolist()))
    return clusters, estimates, few_clusters(clusters)


def verdict_lines(verdict: Verdict) -> list[str]:
    """Return a verdict for a person: a headline, a line for each part, and warnings."""
    lines = [
        f"{verdict.candidate} against {verdict.reference}: {verdict.scenario} "
        f"({SCENARIOS[verdict.scenario]})"
    ]
    for part, difference in verdict.differences.items():
        if difference.outcome == "unknown":
            lines.append(f"{part}: not known")
            continue
        numbers = (difference.estimate, difference.low, difference.high)
        if part == "perplexity":
            middle, low, high = (f"{math.exp(number):.4f}" for number in numbers)
            shown = f"{middle} times the reference's [{low}, {high}]"
        else:
            middle, low, high = (f"{number:+.4f}" for number in numbers)
            shown = f"{middle} [{low}, {high}]{' nats per token' if part == 'KL' else ''}"
        how = "two intervals subtracted end by end"
        if difference.method == PAIRED:
            how = f"paired by protein, {verdict.clusters:,} clusters"
        outcome = difference.outcome
        if outcome == "equivalent":
            outcome += f" (within a factor of {math.exp(verdict.margin):.3f})"
        lines.append(f"{part} {outcome}: {shown}; {how}")
    lines += verdict.reasons
    if verdict.scenario != "inconclusive":
        lines.append("of these two models; another training seed is not in the intervals")
    return lines

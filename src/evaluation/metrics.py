"""The table of metrics. To add a metric, add one entry and the function that computes it.

The schema of results files, the printed table, the comparison, the report and the model card read
this table. Metrics are computed from sums over proteins, so that a bootstrap over clusters of
proteins can recompute each of them from weighted sums.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from src.evaluation.schema import NonNegative, Number, Positive, Share

MODELS = ("student", "teacher")
FLOORS = ("uniform", "unigram", "bigram", "trigram")

Sums = Mapping[str, np.ndarray]
Compute = Callable[[Sums, Any], np.ndarray]


@dataclass(frozen=True)
class Metric:
    """One quantity of a results file.

    Attributes:
        name: dotted key in the file; ``{model}`` in it stands for ``student`` and ``teacher``.
        label: name for a reader; "": only in the file.
        unit: for example ``nats per token``; "": none.
        better: ``lower`` or ``higher``; "": neither.
        values: pydantic type of the value.
        compute: returns ``(R,)`` from sums ``(R, ...)`` and the model's name ("" if the metric has
            no ``{model}``); for generated proteins the second argument holds the residue counts of
            natural proteins. None: computed elsewhere.
        needs: the sum without which the metric is not computed.
        ratio: name of the metric that compares student and teacher.
        column: heading in the comparison; "": not there.
        index: type in the model index of the hub; "": not there.
        spec: format of the value where it is shown without its interval.
    """

    name: str
    label: str = ""
    unit: str = ""
    better: str = ""
    values: Any = Number
    compute: Compute | None = None
    needs: str = ""
    ratio: str = ""
    column: str = ""
    index: str = ""
    spec: str = ""

    @property
    def per_model(self) -> bool:
        """Whether the metric is measured of student and teacher each."""
        return "{model}" in self.name

    @property
    def key(self) -> str:
        """The student's name, or the only one: what comparison and model index show."""
        return self.name.format(model="student")

    @property
    def title(self) -> str:
        """Label with unit."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def names(self) -> list[tuple[str, str]]:
        """Return (name, model) of each of its values; the model is "" if there is one value."""
        return [(self.name.format(model=m), m) for m in (MODELS if self.per_model else ("",))]


def _mean(key: str, unit: str = "tokens") -> Compute:
    """Return the function that divides a sum by the number of tokens or residues."""
    return lambda sums, model: sums[key.format(model=model)] / sums[unit]


def _perplexity(unit: str) -> Compute:
    return lambda sums, model: _exp(sums[f"nll_{model}"] / sums[unit])


def _exp(nats: np.ndarray) -> np.ndarray:
    """Return e to the given powers; infinite, without a warning, where that is beyond numbers."""
    with np.errstate(over="ignore"):
        return np.exp(nats)


def _bits_per_residue(sums: Sums, model: str) -> np.ndarray:
    return sums[f"nll_{model}"] / sums["residues"] / math.log(2)


def _perplexity_ratio(unit: str) -> Compute:
    return lambda sums, _: _exp((sums["nll_student"] - sums["nll_teacher"]) / sums[unit])


def _kept_advantage(sums: Sums, _: str) -> np.ndarray:
    """Return (unigram - student) / (unigram - teacher) in nats, NaN where that is below 0."""
    advantage = sums["floor_unigram"] - sums["nll_teacher"]
    kept = sums["floor_unigram"] - sums["nll_student"]
    positive = advantage > 0
    return np.where(positive, kept / np.where(positive, advantage, 1), np.nan)


def _calibration(measure: str) -> Compute:
    def compute(sums: Sums, model: str) -> np.ndarray:
        from src.evaluation.calibration import MEASURES

        return MEASURES[measure](sums, f"{model}_")

    return compute


def _accuracy_over_floor(sums: Sums, model: str) -> np.ndarray:
    return sums[f"correct_{model}"] / sums["tokens"] - sums["most_frequent"] / sums["tokens"]


def _floor_metrics(floor: str) -> Iterator[Metric]:
    """Yield the metrics of an n-gram model and what each model gains over it."""
    key = f"floor_{floor}"

    def gain(sums: Sums, model: str) -> np.ndarray:
        return (sums[key] - sums[f"nll_{model}"]) / sums["residues"]

    def perplexity(sums: Sums, _: str) -> np.ndarray:
        return np.exp(sums[key] / sums["residues"])

    place = f"floors.{floor}"
    nats = _mean(key, "residues")
    yield Metric(f"{place}.nats_per_residue", values=NonNegative, compute=nats, needs=key)
    yield Metric(f"{place}.perplexity_per_residue", values=Positive, compute=perplexity, needs=key)
    yield Metric(f"{place}.{{model}}_gain", compute=gain, needs=key)


def _calibration_metric(measure: str, label: str = "", **more: Any) -> Metric:
    more.setdefault("compute", _calibration(measure))
    more.setdefault("better", "lower" if label else "")
    return Metric(f"{{model}}_ece.{measure}", label, needs="most_frequent", **more)


# The order of the entries is the order of a results file.
METRICS: list[Metric] = [
    Metric("{model}_perplexity", "perplexity per token", better="lower", values=Positive,
           compute=_perplexity("tokens"), ratio="perplexity_ratio", index="perplexity"),
    Metric("{model}_perplexity_per_residue", "perplexity per residue", better="lower",
           values=Positive, compute=_perplexity("residues"), ratio="perplexity_ratio_per_residue",
           index="perplexity_per_residue"),
    Metric("{model}_bits_per_residue", "bits per residue", better="lower", values=NonNegative,
           compute=_bits_per_residue),
    Metric("{model}_nats_per_residue", values=NonNegative,
           compute=_mean("nll_{model}", "residues")),
    Metric("{model}_accuracy", "top-1 accuracy", better="higher", values=Share,
           compute=_mean("correct_{model}")),
    Metric("{model}_brier", "Brier score", better="lower", values=NonNegative,
           compute=_mean("brier_{model}")),
    Metric("{model}_entropy", compute=_mean("entropy_{model}")),
    Metric("perplexity_ratio", better="lower", values=Positive, column="perplexity ratio",
           compute=_perplexity_ratio("tokens"), index="perplexity_ratio"),
    Metric("perplexity_ratio_per_residue", values=Positive,
           compute=_perplexity_ratio("residues")),
    Metric("kl_divergence", "KL(teacher‖student)", "nats per token", "lower", NonNegative,
           _mean("kl"), column="KL", index="kl_divergence"),
    Metric("kl_per_residue", "KL(teacher‖student)", "nats per residue", "lower", NonNegative,
           _mean("kl", "residues")),
    Metric("reverse_kl_divergence", "KL(student‖teacher)", "nats per token", "lower", NonNegative,
           _mean("reverse_kl")),
    Metric("reverse_kl_per_residue", values=NonNegative, compute=_mean("reverse_kl", "residues")),
    Metric("js_divergence", "Jensen–Shannon", "nats per token", "lower", NonNegative,
           _mean("js")),
    Metric("js_per_residue", values=NonNegative, compute=_mean("js", "residues")),
    Metric("top1_agreement", "same first choice", better="higher", values=Share,
           compute=_mean("agree"), index="top1_agreement"),
    *itertools.chain.from_iterable(map(_floor_metrics, FLOORS[1:])),
    Metric("kept_advantage", "kept of the teacher's advantage over unigram", better="higher",
           compute=_kept_advantage, needs="floor_unigram"),
    _calibration_metric("ece", "ECE, 15 equal-width bins", values=Share, index="ece",
                        column="ECE"),
    _calibration_metric("ece_equal_mass"),
    _calibration_metric("ece_debiased", "ECE, debiased"),
    _calibration_metric("smooth_ece", "smooth ECE"),
    _calibration_metric("accuracy"),
    _calibration_metric("mean_confidence"),
    _calibration_metric("brier", compute=_mean("brier_{model}")),
    _calibration_metric("accuracy_floor", compute=_mean("most_frequent")),
    _calibration_metric("accuracy_over_floor", compute=_accuracy_over_floor),
    # Computed elsewhere, from generated proteins and from the models' sizes.
    Metric("kl_from_natural.{model}", "composition KL from held-out", better="lower",
           column="KL from natural", index="kl_from_natural"),
    Metric("compression_ratio", values=Positive, column="compression", spec="{:.1f}x"),
]  # fmt: skip


def _quotient(above: str, below: str) -> Compute:
    """Return the function that divides two sums, NaN where nothing was counted."""

    def compute(sums: Sums, _: Any) -> np.ndarray:
        top, count = (np.asarray(sums[key], np.float64) for key in (above, below))
        return np.divide(top, count, out=np.full(top.shape, np.nan), where=count > 0)

    return compute


def _composition_kl(sums: Sums, natural: np.ndarray) -> np.ndarray:
    from src.evaluation.composition import composition_kl

    return np.where(sums["residues"] > 0, composition_kl(sums["counts"], natural), np.nan)


def _teacher_perplexity(sums: Sums, _: Any) -> np.ndarray:
    return np.exp(_quotient("nll", "scored_residues")(sums, _))


def _novelty(name: str, label: str, key: str) -> Metric:
    return Metric(f"novelty.{name}", label, compute=_quotient(key, "whole"), needs="identity")


# The first entries are in the order of the computed part of a record.
GENERATION_METRICS: list[Metric] = [
    Metric("valid_share", "valid", compute=_quotient("valid", "proteins")),
    Metric("distinct_share", "distinct"),
    Metric("distinct_4mers"),
    Metric("length.mean", "mean length, residues", compute=_quotient("residues", "whole")),
    Metric("repetitiveness.longest_run", compute=_quotient("run", "whole")),
    Metric("repetitiveness.long_run_share", "with six or more of a residue in a row",
           compute=_quotient("long_run", "whole")),
    Metric("repetitiveness.tandem_repeat_share", "residues in tandem repeats",
           compute=_quotient("tandem", "residues")),
    Metric("repetitiveness.low_complexity_share", "residues of low complexity",
           compute=_quotient("low_complexity", "residues")),
    Metric("kl_from_natural", "composition KL from held-out", compute=_composition_kl),
    Metric("teacher_perplexity_per_residue", "teacher's perplexity per residue", needs="nll",
           compute=_teacher_perplexity),
    Metric("diversity.word_distance", "distance in words of three residues"),
    Metric("diversity.pairwise_identity", "identity of two proteins"),
    _novelty("nearest_identity.mean", "identity to the nearest training protein", "identity"),
    _novelty("share_over_30", "", "over_0.3"),
    _novelty("share_over_50", "over 50 % identical to one", "over_0.5"),
    _novelty("share_over_90", "", "over_0.9"),
    _novelty("copied_share", "copied whole", "copied"),
    Metric("families.hit_share", "hit by a known family", needs="hit",
           compute=_quotient("hit", "proteins")),
    Metric("sequences_per_second", "proteins per second"),
]  # fmt: skip
"""Metrics of a set of generated proteins; names are those in the record of the set."""


def compute_metrics(sums: Sums) -> dict[str, np.ndarray]:
    """Return every metric that follows from sums over proteins.

    Args:
        sums: ``(R,)`` each (calibration sums have further dimensions), weighted or not.

    Returns:
        ``(R,)`` by the metric's full name. A quotient without a denominator is NaN.
    """
    values: dict[str, np.ndarray] = {}
    for per_model, group in itertools.groupby(METRICS, key=lambda metric: metric.per_model):
        computed = [metric for metric in group if not metric.needs or metric.needs in sums]
        for model in MODELS if per_model else ("",):
            for metric in computed:
                if metric.compute:
                    values[metric.name.format(model=model)] = metric.compute(sums, model)
    return values


def compute_generation_metrics(sums: Sums, natural: np.ndarray) -> dict[str, np.ndarray]:
    """Return every metric of generated proteins that follows from sums over them.

    Args:
        sums: ``(R, ...)`` of ``sequence_quality.per_protein_sums`` and what ``describe`` adds.
        natural: ``(20,)`` residue counts of natural proteins.

    Returns:
        ``(R,)`` by name, NaN where there is nothing to count.
    """
    return {
        metric.name: metric.compute(sums, natural)
        for metric in GENERATION_METRICS
        if metric.compute and (not metric.needs or metric.needs in sums)
    }

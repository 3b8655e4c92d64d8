"""Measures students beside their teacher on held-out proteins, with intervals over clusters."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from src.common.cli import unheard
from src.common.devices import peak_memory
from src.evaluation.calibration import BINS, WIDTH_EDGES, CalibrationSums, reliability_curve
from src.evaluation.gates import (
    FLOOR_PROTEINS,
    check_teacher,
    draw_proteins,
    floor_nll,
    floors_record,
    residues_of_tokens,
)
from src.evaluation.metrics import MODELS, compute_metrics
from src.evaluation.results import put_estimate
from src.evaluation.scoring import EvaluationSettings, Proteins, Scores, score_students
from src.evaluation.statistics import Estimate, bootstrap_or_plain
from src.evaluation.student_record import longest
from src.models.inspection import count_parameters
from src.models.sizes import threshold_for
from src.proteins.tokens import LONGER_THAN

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Evaluation:
    """The content of a results file, and the columns of the table of single proteins."""

    results: dict[str, Any]
    per_protein: dict[str, Any]


def protein_clusters(
    names: Sequence[str], residues: Sequence[str], table: Mapping[str, str] | None = None
) -> list[str]:
    """Return the cluster of each protein.

    Args:
        names: of the proteins.
        residues: of the proteins.
        table: cluster by name; a protein that is not in it is its own cluster, but exact
            duplicates always share one: the first that the table has for any of them.
    """
    known: dict[str, str] = {}
    for name, sequence in zip(names, residues, strict=True):
        if table and name in table:
            known.setdefault(sequence, table[name])
    own: dict[str, str] = {}
    for name, sequence in zip(names, residues, strict=True):
        own.setdefault(sequence, known.get(sequence, name))
    return [own[sequence] for sequence in residues]


class HeldOut(NamedTuple):
    """P held-out proteins: token ids, names, residues, their lengths ``(P,)`` and clusters."""

    proteins: list[np.ndarray]
    names: list[str]
    residues: list[str]
    sizes: np.ndarray
    clusters: list[str]

    def table(self, scores: Scores) -> dict[str, Any]:
        """Return the table of single proteins; sums are over a protein, in nats."""
        return {
            "protein": self.names,
            "cluster": self.clusters,
            "residues": self.sizes,
            "tokens": scores.tokens,
            **{key: scores.sums[key] for key in ("nll_student", "nll_teacher", "kl")},
        }


def evaluate(student: PreTrainedModel, *arguments: Any, **options: Any) -> Evaluation:
    """Return :func:`evaluate_students` of one student, with its other arguments."""
    return evaluate_students({"student": student}, *arguments, **options)["student"]


def evaluate_students(
    students: Mapping[str, PreTrainedModel],
    teacher: PreTrainedModel,
    tokenizer: Any,
    test: Any,
    settings: EvaluationSettings | None = None,
    *,
    train: Proteins | None = None,
    clusters: Mapping[str, str] | None = None,
    cluster_kind: str = "clusters",
    announce: Callable[[str], None] = unheard,
) -> dict[str, Evaluation]:
    """Measure students beside their teacher on held-out proteins; the teacher runs once for all.

    Args:
        students: causal language models in eval mode, by name.
        teacher: one with the same vocabulary, on the same device.
        tokenizer: of all.
        test: held-out proteins: token ids by index, with ``len``; ``names`` where they have any,
            and a ``report`` where some were left out when they were read.
        settings: what is measured and how.
        train: training proteins, residues or tokens, to fit the n-gram floors on.
        clusters: cluster of related proteins by name.
        cluster_kind: what they are: ``clusters`` or ``families``.
        announce: called with one line for each stage.

    Returns:
        For each student the content of a results file without ``run``, and the table of single
        proteins. Keys of generated proteins are null
        (:func:`src.evaluation.sequence_quality.measure_generation`).

    Raises:
        ValueError: the teacher fails its checks, the vocabularies differ, or nothing can be scored.
    """
    settings = settings or EvaluationSettings()
    started = time.monotonic()
    limit = min(longest(student, teacher, settings) for student in students.values())
    held_out = _held_out(test, tokenizer, limit, clusters)
    drawn = None
    if train is not None:
        drawn = residues_of_tokens(draw_proteins(train, FLOOR_PROTEINS, settings.seed), tokenizer)
    announce("fitting the n-gram floors")
    floors, fitted_on = floor_nll(held_out.residues, drawn, held_out.clusters, settings.seed)
    gates: dict[str, Any] | None = None
    if settings.check:
        announce("checking the teacher on natural and shuffled proteins")
        gates = check_teacher(
            teacher, tokenizer, held_out.proteins, drawn, seed=settings.seed, settings=settings,
            cluster_of=clusters and dict(zip(held_out.residues, held_out.clusters, strict=True)),
        )  # fmt: skip
        announce(gates["summary"])
    all_scores = score_students(list(students.values()), teacher, held_out.proteins, settings)
    number_of_clusters = len(set(held_out.clusters))
    announce(f"intervals over {number_of_clusters:,} {cluster_kind}")
    evaluations = {}
    for (name, student), scores in zip(students.items(), all_scores, strict=True):
        results = _describe_student(student, teacher, scores, held_out, floors, settings)
        results["floors"] = floors_record(results.get("floors"), fitted_on, drawn)
        results["gates"] = gates
        results["data"] = {
            "proteins": len(held_out.sizes),
            "too_long": _dropped(test) + len(test) - len(held_out.sizes),
            "residues": int(held_out.sizes.sum()),
            "tokens": int(scores.tokens.sum()),
            "clusters": number_of_clusters,
            "cluster_kind": cluster_kind,
            "fingerprint": getattr(test, "fingerprint", None),
        }
        results["performance"] = {
            "device": teacher.device.type,
            "seconds": round(time.monotonic() - started, 2),
            "students": len(students),
            "peak_memory_bytes": peak_memory(teacher.device),
        }
        evaluations[name] = Evaluation(results, held_out.table(scores))
    return evaluations


def _dropped(test: Any) -> int:
    """Return how many proteins were left out as too long when the others were tokenised."""
    report = getattr(test, "report", None)
    dropped = {} if report is None else report.dropped
    return sum(e["count"] for why, e in dropped.items() if why.startswith(LONGER_THAN))


def _held_out(test: Any, tokenizer: Any, limit: int, clusters: Mapping[str, str] | None) -> HeldOut:
    """Return the proteins of at most ``limit`` tokens."""
    fits = [i for i in range(len(test)) if len(test[i]) <= limit]
    if not fits:
        raise ValueError(f"no protein to evaluate fits {limit} tokens ({len(test)} given)")
    proteins = [np.asarray(test[i]) for i in fits]
    all_names = getattr(test, "names", None)
    names = [str(i + 1 if all_names is None else all_names[i]) for i in fits]
    residues = residues_of_tokens(proteins, tokenizer)
    sizes = np.array([len(r) for r in residues])
    return HeldOut(proteins, names, residues, sizes, protein_clusters(names, residues, clusters))


def _describe_student(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    scores: Scores,
    held_out: HeldOut,
    floors: Mapping[str, np.ndarray],
    settings: EvaluationSettings,
) -> dict[str, Any]:
    """Return the metrics of one student with their intervals."""
    arrays = {**scores.sums, "tokens": scores.tokens, "residues": held_out.sizes}
    arrays |= {f"floor_{name}": values for name, values in floors.items()}
    proteins = len(held_out.sizes)
    calibration: dict[str, CalibrationSums] = {}
    if settings.compute_ece:
        top = int(np.bincount(scores.targets).argmax())
        arrays["most_frequent"] = np.bincount(
            scores.owners[scores.targets == top], minlength=proteins
        )
        for model in MODELS:
            calibration[model] = CalibrationSums.collect(
                scores.confidence[model], scores.correct[model], scores.owners, proteins
            )
            arrays |= calibration[model].arrays(f"{model}_")
    estimates = bootstrap_or_plain(
        compute_metrics, arrays, held_out.clusters, settings.bootstrap, settings.seed
    )
    results = _results(estimates, student, teacher)
    intervals = results["intervals"]
    if intervals.get("perplexity_ratio") and not intervals.get("kept_advantage"):
        results["kept_advantage"] = None  # a share of what may be nothing
    for model, sums in calibration.items():
        interval = intervals[f"{model}_ece.accuracy_over_floor"]
        _describe_calibration(results[f"{model}_ece"], sums, interval)
    return results


def _results(
    estimates: Mapping[str, Estimate], student: PreTrainedModel, teacher: PreTrainedModel
) -> dict[str, Any]:
    """Return estimates by the dotted names of a results file, with sizes and the threshold."""
    results: dict[str, Any] = {"perplexity_ratio": None, "kl_divergence": None}
    # Empty, not null, where calibration is not measured: the owner's readers call .get on it.
    results |= {"student_ece": {}, "teacher_ece": {}}
    results["intervals"] = {}
    for name, estimate in estimates.items():
        put_estimate(results, name, estimate)
    sizes = {
        model: count_parameters(m) for model, m in (("student", student), ("teacher", teacher))
    }
    share = sizes["student"] / sizes["teacher"]
    bound, ratio = threshold_for(share), results["perplexity_ratio"]
    return results | {
        "student_parameters": sizes["student"],
        "teacher_parameters": sizes["teacher"],
        "share_of_teacher": share,
        "compression_ratio": sizes["teacher"] / sizes["student"],
        "threshold": {
            "perplexity_ratio_below": bound,
            # The ratio is null where it is too large for a number.
            "passed": ratio is not None and bool(ratio < bound),
            "rule": "5 % of the teacher: 3.0, 11 %: 2.5, 27 %: 2.0; linear between, nearest beyond",
        },
        "kl_from_natural": {"student": None, "teacher": None},
        "generation": None,
    }


def _describe_calibration(
    record: dict[str, Any], sums: CalibrationSums, interval: Sequence[float] | None
) -> None:
    """Add whether calibration means anything, and the curve of the reliability diagram.

    It does where the accuracy beats always naming the most frequent token, beyond chance where
    there is an ``interval`` of the difference: else confidence has nothing to be right about.
    """
    least = record["accuracy_over_floor"] if interval is None else interval[0]
    record["calibration_meaningful"] = bool(least > 0)
    record["bins"] = BINS
    record["reliability"] = reliability_curve(sums.width.sum(0), WIDTH_EDGES)

"""Measures students beside their teacher on held-out proteins, with intervals over clusters."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from src.common.devices import peak_memory
from src.common.files import atomic_write
from src.evaluation.calibration import CalibrationSums, reliability_curve
from src.evaluation.gates import (
    FLOOR_PROTEINS,
    check_teacher,
    floor_nll,
    floor_warning,
    floors_record,
    residues_of_tokens,
    sample,
)
from src.evaluation.inputs import longest
from src.evaluation.metrics import MODELS, compute_metrics
from src.evaluation.results import put_estimate
from src.evaluation.scoring import EvaluationSettings, Proteins, Scores, score_students
from src.evaluation.statistics import Estimate, cluster_bootstrap, plain_estimates
from src.models.sizes import threshold_for
from src.models.weights import count_parameters

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
            duplicates always share one.
    """
    first: dict[str, str] = {}
    clusters = []
    for name, sequence in zip(names, residues, strict=True):
        cluster = (table or {}).get(name)
        own = first.setdefault(sequence, cluster if cluster is not None else name)
        clusters.append(cluster if cluster is not None else own)
    return clusters


def evaluate(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: Any,
    test: Any,
    settings: EvaluationSettings | None = None,
    *,
    train: Proteins | None = None,
    clusters: Mapping[str, str] | None = None,
    cluster_kind: str = "clusters",
    announce: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Measure a student beside its teacher on held-out proteins.

    Args:
        student: a causal language model in eval mode.
        teacher: one with the same vocabulary, on the same device.
        tokenizer: of both.
        test: held-out proteins: token ids by index, with ``len``; ``names`` where they have any.
        settings: what is measured and how.
        train: training proteins, residues or tokens, to fit the n-gram floors on.
        clusters: cluster of related proteins by name.
        cluster_kind: what they are: ``clusters`` or ``families``.
        announce: called with one line for each stage.

    Returns:
        The content of a results file without ``run``, and the table of single proteins:
        ``protein``, ``cluster``, ``residues``, ``tokens``, ``nll_student``, ``nll_teacher``, ``kl``
        (summed over the protein, in nats). Keys that concern generated proteins are null: see
        :func:`src.evaluation.sequence_quality.measure_generation`.

    Raises:
        ValueError: the teacher fails its checks, the vocabularies differ, or nothing can be scored.
    """
    evaluations = evaluate_students(
        {"student": student},
        teacher,
        tokenizer,
        test,
        settings,
        train=train,
        clusters=clusters,
        cluster_kind=cluster_kind,
        announce=announce,
    )
    return evaluations["student"]


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
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, Evaluation]:
    """Return the evaluation of each student by name; the teacher runs once for all of them.

    The other arguments and the errors are those of :func:`evaluate`.
    """
    settings = settings or EvaluationSettings()
    started = time.monotonic()
    limit = min(longest(student, teacher, settings) for student in students.values())
    lengths = np.array([len(test[i]) for i in range(len(test))])
    fits = np.flatnonzero(lengths <= limit)
    if not len(fits):
        raise ValueError(f"no protein to evaluate fits {limit} tokens ({len(lengths)} given)")
    proteins = [np.asarray(test[int(i)]) for i in fits]
    all_names = getattr(test, "names", None)
    names = [str(all_names[int(i)]) if all_names is not None else str(i + 1) for i in fits]
    residues = residues_of_tokens(proteins, tokenizer)
    labels = protein_clusters(names, residues, clusters)
    drawn = None
    if train is not None:
        drawn = residues_of_tokens(sample(train, FLOOR_PROTEINS, settings.seed), tokenizer)
    announce("fitting the n-gram floors")
    floors, fitted_on = floor_nll(residues, drawn, labels, settings.seed)
    gates: dict[str, Any] | None = None
    if settings.check:
        announce("checking the teacher on natural and shuffled proteins")
        gates = check_teacher(
            teacher, tokenizer, proteins, drawn, seed=settings.seed, settings=settings
        )
        announce(gates["summary"])
    all_scores = score_students(list(students.values()), teacher, proteins, settings)
    sizes = np.array([len(r) for r in residues])
    if settings.check and "unigram" in floors:
        warning = floor_warning(all_scores[0].sums["nll_teacher"], floors["unigram"], sizes)
        if warning:
            announce(warning)
    announce(f"intervals over {len(set(labels)):,} {cluster_kind}")
    device = teacher.device
    shared = {
        "gates": gates,
        "data": {
            "proteins": len(sizes),
            "too_long": int(len(lengths) - len(fits)),
            "residues": int(sizes.sum()),
            "tokens": int(all_scores[0].tokens.sum()),
            "clusters": len(set(labels)),
            "cluster_kind": cluster_kind,
            "fingerprint": getattr(test, "fingerprint", None),
        },
    }
    evaluations = {}
    for (name, student), scores in zip(students.items(), all_scores, strict=True):
        results = _describe_student(student, teacher, scores, sizes, floors, labels, settings)
        results["floors"] = floors_record(results.get("floors"), fitted_on, drawn)
        results |= shared
        results["performance"] = {
            "device": device.type,
            "seconds": round(time.monotonic() - started, 2),
            "students": len(students),
            "peak_memory_bytes": peak_memory(device),
        }
        table = {
            "protein": names,
            "cluster": labels,
            "residues": sizes,
            "tokens": scores.tokens,
            **{key: scores.sums[key] for key in ("nll_student", "nll_teacher", "kl")},
        }
        evaluations[name] = Evaluation(results, table)
    return evaluations


def _describe_student(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    scores: Scores,
    sizes: np.ndarray,
    floors: Mapping[str, np.ndarray],
    labels: Sequence[Any],
    settings: EvaluationSettings,
) -> dict[str, Any]:
    """Return the metrics of one student with their intervals."""
    arrays = {**scores.sums, "tokens": scores.tokens, "residues": sizes}
    arrays |= {f"floor_{name}": values for name, values in floors.items()}
    calibration: dict[str, CalibrationSums] = {}
    if settings.compute_ece:
        top = int(np.bincount(scores.targets).argmax())
        arrays["most_frequent"] = np.bincount(
            scores.owners[scores.targets == top], minlength=len(sizes)
        )
        for model in MODELS:
            calibration[model] = CalibrationSums.collect(
                scores.confidence[model], scores.correct[model], scores.owners, len(sizes)
            )
            arrays |= calibration[model].arrays(f"{model}_")
    results = _results(_estimates(arrays, labels, settings), student, teacher)
    for model, sums in calibration.items():
        interval = results["intervals"][f"{model}_ece.accuracy_over_floor"]
        _describe_calibration(results[f"{model}_ece"], sums, interval)
    return results


def _estimates(
    arrays: Mapping[str, np.ndarray], labels: Sequence[Any], settings: EvaluationSettings
) -> dict[str, Estimate]:
    if settings.bootstrap:
        return cluster_bootstrap(
            compute_metrics, arrays, labels, settings.bootstrap, settings.seed, settings.level
        )
    return plain_estimates(compute_metrics, arrays, settings.level)


def _results(
    estimates: Mapping[str, Estimate], student: PreTrainedModel, teacher: PreTrainedModel
) -> dict[str, Any]:
    """Lay figures out under their names, with intervals, sizes and the threshold."""
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
    bound = threshold_for(share)
    return results | {
        "student_parameters": sizes["student"],
        "teacher_parameters": sizes["teacher"],
        "share_of_teacher": share,
        "compression_ratio": sizes["teacher"] / sizes["student"],
        "threshold": {
            "perplexity_ratio_below": bound,
            "passed": bool(results["perplexity_ratio"] < bound),
            "rule": "5 % of the teacher: 3.0, 11 %: 2.5, 27 %: 2.0; linear between, nearest beyond",
        },
        "kl_from_natural": {"student": None, "teacher": None},
        "kl_from_natural_uniprot": {"student": None, "teacher": None},
        "generation": None,
    }


def _describe_calibration(
    record: dict[str, Any], sums: CalibrationSums, interval: Sequence[float] | None
) -> None:
    """Add whether calibration means anything, and the curves of the reliability diagram.

    It does where the accuracy beats always naming the most frequent token, beyond chance where
    there is an ``interval`` of the difference: else confidence has nothing to be right about.
    """
    least = record["accuracy_over_floor"] if interval is None else interval[0]
    record["calibration_meaningful"] = bool(least > 0)
    record["bins"] = len(sums.width_edges) - 1
    record["reliability"] = reliability_curve(sums.width.sum(0), sums.width_edges)
    record["reliability_equal_mass"] = reliability_curve(sums.mass.sum(0), sums.mass_edges)


def write_per_protein(path: str | Path, table: Mapping[str, Any]) -> None:
    """Write a table of single proteins as parquet, atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with atomic_write(path, "wb") as handle:
        pq.write_table(pa.table({name: pa.array(values) for name, values in table.items()}), handle)

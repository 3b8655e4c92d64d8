"""Writes, reads, checks and prints results files.

A results file is JSON. Each metric of ``src.evaluation.metrics`` has its own key, ``null`` where it
was not measured; ``intervals`` holds ``[low, high]`` by the metric's dotted name
(``student_ece.ece``); ``run`` records the command, versions and data. ``schema_version`` is 1;
version 0 is any file without that key, as the project's first scripts wrote them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, TypeAdapter
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from src.common.files import check_outputs, is_number, read_json, write_json
from src.common.privacy import publishable
from src.evaluation.metrics import FLOORS, GENERATION_METRICS, METRICS, MODELS, Metric
from src.evaluation.schema import (
    Intervals,
    NonNegative,
    Number,
    Object,
    Positive,
    Share,
    check_record,
    record_type,
)

if TYPE_CHECKING:
    from src.evaluation.statistics import Estimate

SCHEMA_VERSION = 1
REQUIRED = (
    "perplexity_ratio",
    "kl_divergence",
    "student_ece",
    "teacher_ece",
    "student_perplexity",
    "teacher_perplexity",
    "compression_ratio",
    "kl_from_natural",
    "intervals",
    "run",
)
"""Keys of every results file. A value may also be null, except ``intervals`` and ``run``."""

GENERATION_SETS = ("student", "teacher", "natural", "shuffled")
SAMPLING = ("top_k", "top_p", "temperature", "repetition_penalty")
"""Settings of sampling that are shown."""


def _check_curve(curve: Any) -> Any:
    """Check that a reliability curve can be drawn: a bin without tokens has no means."""
    bins = len(curve["count"])
    if not bins:
        raise PydanticCustomError("curve", "must have bins")
    for name in ("edges", "confidence", "accuracy"):
        values = curve[name]
        if len(values) != bins + (name == "edges"):
            raise PydanticCustomError("curve", "must have means for each bin and edges around it")
        if any(v is None and (name == "edges" or curve["count"][i]) for i, v in enumerate(values)):
            raise PydanticCustomError("curve", "must have means for each bin with tokens")
    return curve


class _Curve(TypedDict):
    count: list[NonNegative]
    edges: list[Share | None]
    confidence: list[Share | None]
    accuracy: list[Share | None]


SECTIONS: dict[str, Any] = {
    "student_ece": Object,
    "teacher_ece": Object,
    **{f"{m}_ece.reliability": Annotated[_Curve, AfterValidator(_check_curve)] for m in MODELS},
    "student_parameters": Positive,
    "teacher_parameters": Positive,
    "share_of_teacher": Positive,
    "threshold": Object,
    "threshold.perplexity_ratio_below": Positive,
    "floors": Object,
    "floors.uniform.perplexity_per_residue": Positive,
    "floors.uniform.nats_per_residue": NonNegative,
    "gates": Object,
    "gates.summary": str,
    "data": Object,
    **{f"data.{c}": NonNegative for c in ("proteins", "clusters", "residues", "tokens")},
    "data.cluster_kind": Literal["clusters", "families", "proteins"],
    "performance": Object,
    "settings": Object,
    "intervals": Intervals,
    "run": Object,
    "generation": Object,
    **{f"generation.{s}.composition": dict[Any, Share] for s in (*GENERATION_SETS, "reference")},
    **{f"generation.{s}.sequences": NonNegative for s in GENERATION_SETS},
    **{f"generation.{s}.intervals": Intervals for s in GENERATION_SETS},
    **{f"generation.student.sampling.{name}": Number for name in SAMPLING},
    **{f"generation.student.counts.{name}": NonNegative for name in ("attempts", "kept")},
    "generation.student.examples": list[str],
}
"""Types of what a results file holds beside metrics. May be missing or null."""


@functools.cache
def _results_type(metrics: tuple[str, ...]) -> TypeAdapter[Any]:
    """Return the type of a results file with the metrics of these names, all in the table."""
    of_all = {name: metric.values for metric in METRICS for name, _ in metric.names()}
    of_sets = {
        f"generation.{name}.{metric.name}": metric.values
        for name in GENERATION_SETS
        for metric in GENERATION_METRICS
    }
    return record_type({**of_all, **of_sets, **SECTIONS})


def write_results(path: str | Path, results: Mapping[str, Any], overwrite: bool = False) -> None:
    """Check a results file and write it atomically, with the current ``schema_version``.

    Private paths are removed from ``run`` and ``settings``, because results are published.

    Raises:
        ValueError: a key is missing or wrong, or the file exists and ``overwrite`` is not set.
    """
    check_outputs(path, overwrite=overwrite)
    results = {"schema_version": SCHEMA_VERSION, **results}
    validate(results, path)
    cleaned = {name: publishable(results[name]) for name in ("run", "settings") if name in results}
    write_json(path, {**results, **cleaned})


def read_results(path: str | Path) -> dict[str, Any]:
    """Read a results file of any version and bring it to the current form.

    Raises:
        ValueError: not JSON, not a results file, of a newer version, or a key is wrong.
    """
    return brought_up(read_json(path), path)


def brought_up(results: Any, path: str | Path) -> dict[str, Any]:
    """Return results of any version in the current form; ``path`` names them in an error."""
    if not isinstance(results, dict):
        raise ValueError(f"{path}: not a results file (expected an object at the top)")
    version = results.get("schema_version", 0)
    if isinstance(version, bool) or not isinstance(version, int) or version < 0:
        raise ValueError(f"{path}: schema_version must be a whole number, got {version!r:.40}")
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{path}: schema_version {version} is newer than this program's {SCHEMA_VERSION}: "
            "update the program"
        )
    for step in range(version, SCHEMA_VERSION):
        results = _UPGRADES[step](results)
    validate(results, path)
    return results


def _from_unversioned(results: dict[str, Any]) -> dict[str, Any]:
    """Bring a file without ``schema_version`` to version 1: add keys, make a bare ECE an object."""
    results = {**dict.fromkeys(REQUIRED), **results, "schema_version": 1}
    for key in ("student_ece", "teacher_ece"):
        if is_number(results[key]):
            results[key] = {"ece": results[key]}
    if is_number(results["kl_from_natural"]):
        results["kl_from_natural"] = {"student": results["kl_from_natural"], "teacher": None}
    elif results["kl_from_natural"] is None:
        results["kl_from_natural"] = {
            model: lookup(results, f"{model}_generation.kl_from_natural")
            for model in ("student", "teacher")
        }
    for key in ("intervals", "run"):
        if results[key] is None:
            results[key] = {}
    return results


_UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {0: _from_unversioned}


def validate(results: Mapping[str, Any], path: str | Path = "results") -> None:
    """Check a results file of the current version.

    Raises:
        ValueError: one line that names the file, the key and what is wrong with it.
    """
    if results.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{path}: schema_version must be {SCHEMA_VERSION}")
    for key in REQUIRED:
        if key not in results:
            raise ValueError(f"{path}: {key} is missing")
    for key in ("intervals", "run"):
        if results[key] is None:
            raise ValueError(f"{path}: {key} must be an object, got None")
    check_record(results, _results_type(tuple(metric.name for metric in METRICS)), path)


def lookup(results: Mapping[str, Any], name: str) -> Any:
    """Return the value of a dotted name such as ``student_ece.ece``, None where it is missing."""
    value: Any = results
    for part in name.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def interval_of(results: Mapping[str, Any], name: str) -> Any:
    """Return ``[low, high]`` of a metric, None where it has no interval."""
    return (results.get("intervals") or {}).get(name)


def put_estimate(results: dict[str, Any], name: str, estimate: Estimate) -> None:
    """Store an estimate and its interval under a dotted name; null where it is not finite."""
    *path, last = name.split(".")
    place = results
    for part in path:
        if not isinstance(place.get(part), dict):
            place[part] = {}
        place = place[part]
    place[last] = finite_or_none(estimate.estimate)
    interval = [finite_or_none(estimate.low), finite_or_none(estimate.high)]
    results["intervals"][name] = None if None in interval else interval


def finite_or_none(value: float) -> float | None:
    """Return a number as JSON can hold it."""
    return float(value) if math.isfinite(value) else None


def metric_rows(results: Mapping[str, Any]) -> Iterator[tuple[Metric, list[str]]]:
    """Yield each measured metric of the table with its cells: student, teacher and their ratio."""
    for metric in METRICS:
        if metric.label and metric.per_model:
            cells = [with_interval(results, name) for name, _ in metric.names()]
            if any(cells):
                yield metric, [*cells, metric.ratio and with_interval(results, metric.ratio)]


def pair_rows(results: Mapping[str, Any]) -> Iterator[tuple[Metric, str]]:
    """Yield each measured metric that compares student and teacher, with its value."""
    for metric in METRICS:
        if metric.label and not metric.per_model and (cell := with_interval(results, metric.name)):
            yield metric, cell


def generation_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the sets of proteins that were described, and rows of label and values."""
    sets = {s: r for s in GENERATION_SETS if (r := lookup(results, f"generation.{s}"))}
    rows = []
    for metric in GENERATION_METRICS:
        cells = [with_interval(record, metric.name) for record in sets.values()]
        if metric.label and any(cells):
            rows.append([metric.label, *cells])
    return list(sets), rows


def floor_cells(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return name and perplexity per residue of each n-gram floor."""
    values = [(n, lookup(results, f"floors.{n}.perplexity_per_residue")) for n in FLOORS]
    return [(name, f"{value:.2f}") for name, value in values if value is not None]


LEAST_CLUSTERS = 5
"""Fewest clusters whose bootstrap interval needs no warning."""
SIZES = ("student_parameters", "teacher_parameters", "share_of_teacher", "compression_ratio")


def print_table(results: Mapping[str, Any]) -> None:
    """Print the metrics of a results file with their intervals."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for title in ("student", "teacher", "student / teacher"):
        table.add_column(title, justify="right")
    for metric, cells in metric_rows(results):
        table.add_row(metric.title, *cells)
    # A fixed width, so that a log file shows the same table as a terminal.
    console = Console(width=110, highlight=False)
    console.print(table)
    for line in summary_lines(results):
        console.print(line, markup=False, soft_wrap=True)
    sets, rows = generation_rows(results)
    if sets:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("generated, and controls")
        for name in sets:
            count = lookup(results, f"generation.{name}.sequences")
            table.add_column(name if count is None else f"{name} ({count:,})")
        for row in rows:
            table.add_row(*row)
        wide = Console(width=40 + 26 * len(sets), highlight=False)
        wide.print(table)


def summary_lines(results: Mapping[str, Any]) -> list[str]:
    """Return the lines below the table: divergences, size and threshold, floors, warnings."""
    lines = [
        f"{metric.label}: {cell} {metric.unit}".rstrip() for metric, cell in pair_rows(results)
    ]
    bound = lookup(results, "threshold.perplexity_ratio_below")
    if bound is not None and all(results.get(key) is not None for key in SIZES):
        verdict = "passed" if lookup(results, "threshold.passed") else "not passed"
        lines.append(
            f"size: {results['student_parameters']:,} of {results['teacher_parameters']:,} "
            f"parameters ({results['share_of_teacher']:.1%}, {results['compression_ratio']:.1f} "
            f"times smaller); ratio below {bound:.2f}: {verdict}"
        )
    floors = [" ".join(cells) for cells in floor_cells(results)]
    if floors:
        lines.append(f"floors, perplexity per residue: {', '.join(floors)}")
    lines += cautions(results)
    if lookup(results, "data.proteins") and lookup(results, "data.clusters") is not None:
        kind = lookup(results, "data.cluster_kind") or "clusters"
        count = f"{results['data']['proteins']:,} proteins"
        if kind == "proteins":
            over = f"{kind}: too narrow if many are relatives (no table says which are)"
        else:
            count += f" in {results['data']['clusters']:,} {kind}"
            over = kind
        lines.append(f"{count}; intervals: 95 %, bootstrap over {over}")
    return lines


def cautions(results: Mapping[str, Any]) -> list[str]:
    """Return warnings: known proteins, models no better than frequencies, what misleads."""
    lines = []
    if lookup(results, "run.data.trained_on"):
        lines.append(
            "the student was trained on these proteins: the figures say nothing about new ones"
        )
    for model in MODELS:
        gain = lookup(results, f"floors.unigram.{model}_gain")
        if gain is not None and gain <= 0:
            lines.append(
                f"the {model} predicts proteins no better than the frequencies of residues alone"
            )
        if lookup(results, f"{model}_ece.calibration_meaningful") is False:
            lines.append(
                f"calibration of the {model} is not meaningful: it is right no more often than "
                "always naming the most frequent token"
            )
    gain = lookup(results, "floors.unigram.teacher_gain")
    if gain and gain > 0 and lookup(results, "kept_advantage") is None:
        lines.append(
            "what the student kept is not told: the teacher is not clearly better than the "
            "frequencies of residues on these proteins"
        )
    clusters = lookup(results, "data.clusters")
    if clusters is not None and any((results.get("intervals") or {}).values()):
        lines += few_clusters(clusters, lookup(results, "data.cluster_kind") or "clusters")
    return lines


def few_clusters(count: int, kind: str = "clusters") -> list[str]:
    """Return a warning where intervals are of two to four clusters, else nothing.

    95 % intervals of a mean cover 91 % with five clusters, 77 % with three, 50 % with two
    (simulated, normal effects).
    """
    if count < 2 or count >= LEAST_CLUSTERS:
        return []  # a single cluster has no interval
    return [f"intervals are too narrow: {count:,} {kind}, at least {LEAST_CLUSTERS} are needed"]


def with_interval(results: Mapping[str, Any], name: str) -> str:
    """Return a value as ``1.230 [1.200, 1.260]``, without interval where there is none."""
    value = lookup(results, name)
    if value is None:
        return ""
    interval = interval_of(results, name)
    if not interval:
        return _short(value)
    return f"{_short(value)} [{_short(interval[0])}, {_short(interval[1])}]"


def _short(value: float) -> str:
    """Return a number with three decimals, or four significant digits where it is large."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"

"""The one form of a results file: what it holds, how it is written, how older ones are read.

A results file is JSON. Figures stand under fixed names, ``null`` where they were not measured;
``intervals`` holds ``[low, high]`` for each figure, nested names joined by dots
(``student_ece.ece``); ``run`` says what made it. ``schema_version`` counts the forms: version 0 is
any file without that key, as the project's first scripts wrote them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.common.cli import printable
from src.common.files import (
    MAX_JSON_DEPTH,
    check_outputs,
    is_nested_beyond,
    is_number,
    read_json,
    write_json,
)
from src.common.privacy import publishable

if TYPE_CHECKING:
    from src.evaluation.statistics import Estimate

SCHEMA_VERSION = 1
MODELS = ("student", "teacher")
FLOORS = ("uniform", "unigram", "bigram", "trigram")

REQUIRED: dict[str, str] = {
    "perplexity_ratio": "above 0",
    "kl_divergence": "at least 0",
    "student_ece": "calibration",
    "teacher_ece": "calibration",
    "student_perplexity": "above 0",
    "teacher_perplexity": "above 0",
    "compression_ratio": "above 0",
    "kl_from_natural": "pair",
    "intervals": "intervals",
    "run": "object",
}
"""Keys of every results file. A value may also be null, except ``intervals`` and ``run``."""

OPTIONAL: dict[str, str] = {
    "perplexity_ratio_per_residue": "above 0",
    "student_perplexity_per_residue": "above 0",
    "teacher_perplexity_per_residue": "above 0",
    "student_bits_per_residue": "at least 0",
    "teacher_bits_per_residue": "at least 0",
    "student_nats_per_residue": "at least 0",
    "teacher_nats_per_residue": "at least 0",
    "kl_per_residue": "at least 0",
    "reverse_kl_divergence": "at least 0",
    "reverse_kl_per_residue": "at least 0",
    "js_divergence": "at least 0",
    "js_per_residue": "at least 0",
    "top1_agreement": "share",
    "student_accuracy": "share",
    "teacher_accuracy": "share",
    "student_brier": "at least 0",
    "teacher_brier": "at least 0",
    "student_parameters": "above 0",
    "teacher_parameters": "above 0",
    "share_of_teacher": "above 0",
    "kept_advantage": "number",
    "kl_from_natural_uniprot": "pair",
    "threshold": "object",
    "floors": "object",
    "gates": "object",
    "generation": "object",
    "data": "object",
    "performance": "object",
    "settings": "object",
}

NESTED: dict[str, str] = {
    "threshold.perplexity_ratio_below": "above 0",
    **{f"{m}_ece.{key}": "number" for m in MODELS for key in ("ece_debiased", "smooth_ece")},
    **{f"{m}_ece.reliability": "reliability" for m in MODELS},
    **{f"floors.{name}.perplexity_per_residue": "above 0" for name in FLOORS},
    **{f"floors.{name}.nats_per_residue": "at least 0" for name in FLOORS},
    **{f"floors.{name}.{m}_gain": "number" for name in FLOORS for m in MODELS},
    **{f"data.{count}": "at least 0" for count in ("proteins", "clusters", "residues", "tokens")},
}
"""What tables, figures and reports show of the objects above. May be missing or null."""


def write_results(path: str | Path, results: Mapping[str, Any], overwrite: bool = False) -> None:
    """Check a results file and write it atomically, with the current ``schema_version``.

    What made them (``run``, ``settings``) is cleaned: results are published, and whose home they
    come from is nobody's business.

    Raises:
        ValueError: a key is missing or wrong, or the file is there and ``overwrite`` is not set.
    """
    check_outputs(path, overwrite=overwrite)
    results = {"schema_version": SCHEMA_VERSION, **results}
    validate(results, path)
    made_by = {name: publishable(results[name]) for name in ("run", "settings") if name in results}
    write_json(path, {**results, **made_by})


def read_results(path: str | Path) -> dict[str, Any]:
    """Read a results file of any version and bring it to the current form.

    Raises:
        ValueError: not JSON, not a results file, of a newer version, or a key is wrong.
    """
    results = read_json(path)
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
    """Fill in what files without ``schema_version`` did not have; a bare ECE becomes an object."""
    results = {**dict.fromkeys(REQUIRED), **results, "schema_version": 1}
    for key in ("student_ece", "teacher_ece"):
        if is_number(results[key]):
            results[key] = {"ece": results[key]}
    if is_number(results["kl_from_natural"]):
        results["kl_from_natural"] = {"student": results["kl_from_natural"], "teacher": None}
    elif results["kl_from_natural"] is None:
        results["kl_from_natural"] = {
            model: figure(results, f"{model}_generation.kl_from_natural")
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
    check_figures(results, {**REQUIRED, **OPTIONAL, **NESTED, **GENERATION}, path)


def check_figures(
    record: Any,
    kinds: Mapping[str, str],
    path: str | Path,
    *,
    needed: bool = False,
    way_out: str = "",
) -> None:
    """Check what a JSON object holds under dotted names, and that all of it can be shown.

    Args:
        record: as read; objects on the way to a name are checked, too.
        kinds: kind of the value by its name, as in :data:`REQUIRED`.
        path: what the message begins with.
        needed: whether every value must be there; else it may be missing or null.
        way_out: what the user can do, at the end of the message.

    Raises:
        ValueError: one line that names the key and what is wrong with it.
    """
    if not isinstance(record, Mapping):
        faults = iter([f"must be an object, got {record!r:.40}"])
    else:
        found = (_fault(record, name, kind, needed) for name, kind in kinds.items())
        faults = (fault for fault in (*found, _unusable(record)) if fault)
    fault = next(faults, None)
    if fault:
        raise ValueError(printable(f"{path}: {fault}{way_out and ': '}{way_out}"))


def _fault(record: Mapping[str, Any], name: str, kind: str, needed: bool) -> str | None:
    """Return what is wrong with the value under a dotted name, or None."""
    parts = name.split(".")
    value: Any = record
    for depth, part in enumerate(parts):
        if not isinstance(value, Mapping):
            return f"{'.'.join(parts[:depth])} must be an object, got {value!r:.40}"
        if part not in value:
            return f"{'.'.join(parts[: depth + 1])} is missing" if needed else None
        value = value[part]
        if value is None and not needed:
            return None
    problem = _problem(value, kind)
    return f"{name} {problem}" if problem else None


def _is_interval(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(map(is_number, value))
        and not value[0] > value[1]
    )


LISTS = {"texts": "text", "numbers": "number", "objects": "object"}
NAMED = {"shares": "share", "rates": "above 0", "names": "text"}
"""Kinds of lists, and of objects with keys of any name, by the kind of what they hold."""


def _problem(value: Any, kind: str) -> str | None:
    """Return what is wrong with a value of some kind, or None."""
    if kind in ("number", "above 0", "at least 0", "share"):
        if not is_number(value):
            return f"must be a number, got {value!r:.40}"
        if (
            (kind == "above 0" and not value > 0)
            or (kind == "at least 0" and not value >= 0)
            or (kind == "share" and not 0 <= value <= 1)
        ):
            wanted = {"share": "in [0, 1]"}.get(kind, kind)
            return f"must be {wanted}, got {value!r:.40}"
        return None
    if kind == "text":
        return None if isinstance(value, str) else f"must be text, got {value!r:.40}"
    if kind in LISTS:
        right = isinstance(value, list) and not any(_problem(each, LISTS[kind]) for each in value)
        return None if right else f"must be a list of {kind}, got {value!r:.40}"
    if kind == "interval":
        return None if _is_interval(value) else f"must be [low, high], got {value!r:.40}"
    if not isinstance(value, dict):
        return f"must be an object, got {value!r:.40}"
    if kind in NAMED:
        for name, each in value.items():
            if _problem(each, NAMED[kind]):
                return f"has a {printable(name)[:40]} that {_problem(each, NAMED[kind])}"
    elif kind == "reliability":
        return _problem_of_curve(value)
    elif kind == "calibration":
        if value.get("ece") is not None and _problem(value["ece"], "share"):
            return f"has an ece that {_problem(value['ece'], 'share')}"
    elif kind == "pair":
        for name in MODELS:
            if value.get(name) is not None and not is_number(value[name]):
                return f"has a {name} that is no number: {value[name]!r:.40}"
    elif kind == "intervals":
        for name, interval in value.items():
            if interval is None:
                continue
            if not _is_interval(interval):
                return f"must hold [low, high], but {printable(name)[:40]} is {interval!r:.40}"
    return None


def _problem_of_curve(curve: Mapping[str, Any]) -> str | None:
    """Return what keeps a reliability curve from being drawn, or None."""
    count = curve.get("count")
    if not isinstance(count, list) or not count or any(_problem(n, "at least 0") for n in count):
        return f"has a count that is no list of numbers of tokens: {count!r:.40}"
    for name, length in (
        ("edges", len(count) + 1),
        ("confidence", len(count)),
        ("accuracy", len(count)),
    ):
        values = curve.get(name)
        if not isinstance(values, list) or len(values) != length:
            return f"has {name} that are no list of {length} numbers: {values!r:.40}"
        for index, value in enumerate(values):
            # Without tokens a bin has no mean.
            empty = name != "edges" and value is None and not count[index]
            if not empty and _problem(value, "share"):
                return f"has {name} of which one {_problem(value, 'share')}"
    return None


def _unusable(results: Mapping[str, Any]) -> str | None:
    """Return what no results file may hold anywhere, with its dotted name, or None.

    That is: NaN, infinity, an integer beyond every float, or objects nested too deeply to be read.
    """
    if is_nested_beyond(dict(results), MAX_JSON_DEPTH):
        return f"is nested more than {MAX_JSON_DEPTH} deep"
    stack: list[tuple[str, Any]] = [("", results)]
    while stack:
        where, item = stack.pop()
        if isinstance(item, float) and not math.isfinite(item):
            return f"{where} is not a finite number"
        if isinstance(item, int) and abs(item) > sys.float_info.max:
            return f"{where} is too large a number"
        if isinstance(item, Mapping):
            stack += [
                (f"{where}.{str(key)[:40]}" if where else str(key)[:40], each)
                for key, each in item.items()
            ]
        elif isinstance(item, list | tuple):
            stack += [(f"{where}[{index}]", each) for index, each in enumerate(item)]
    return None


def figure(results: Mapping[str, Any], name: str) -> Any:
    """Return a figure by its dotted name, None where it is missing: ``student_ece.ece``."""
    value: Any = results
    for part in name.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def put_figure(results: dict[str, Any], name: str, estimate: Estimate) -> None:
    """Store an estimate under its dotted name, and its interval; null where it is not finite."""
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


TABLE = (
    ("perplexity per token", "perplexity", "perplexity_ratio"),
    ("perplexity per residue", "perplexity_per_residue", "perplexity_ratio_per_residue"),
    ("bits per residue", "bits_per_residue", None),
    ("top-1 accuracy", "accuracy", None),
    ("ECE, 15 equal-width bins", "ece.ece", None),
    ("ECE, debiased", "ece.ece_debiased", None),
    ("smooth ECE", "ece.smooth_ece", None),
    ("Brier score", "brier", None),
)
"""Label, figure of each model without its prefix, and the figure of their ratio."""

GENERATION_TABLE = (
    ("mean length, residues", "length.mean"),
    ("valid", "valid_share"),
    ("distinct", "distinct_share"),
    ("teacher's perplexity per residue", "teacher_perplexity_per_residue"),
    ("composition KL from held-out", "kl_from_natural"),
    ("with six or more of a residue in a row", "repetitiveness.long_run_share"),
    ("residues in tandem repeats", "repetitiveness.tandem_repeat_share"),
    ("residues of low complexity", "repetitiveness.low_complexity_share"),
    ("distance in words of three residues", "diversity.word_distance"),
    ("identity of two proteins", "diversity.pairwise_identity"),
    ("identity to the nearest training protein", "novelty.nearest_identity.mean"),
    ("over 50 % identical to one", "novelty.share_over_50"),
    ("copied whole", "novelty.copied_share"),
    ("hit by a known family", "families.hit_share"),
    ("proteins per second", "sequences_per_second"),
)
"""Label and figure of each set of generated proteins (``src.evaluation.sequence_quality``)."""
SAMPLING = ("top_k", "top_p", "temperature", "repetition_penalty")
"""Settings of sampling that are shown."""
GENERATION_SETS = ("student", "teacher", "natural", "shuffled")

GENERATION: dict[str, str] = {
    **{f"generation.{s}.distinct_4mers": "number" for s in GENERATION_SETS},
    **{f"generation.{s}.novelty.share_over_30": "number" for s in GENERATION_SETS},
    **{f"generation.{s}": "object" for s in GENERATION_SETS},
    **{f"generation.{s}.sequences": "at least 0" for s in GENERATION_SETS},
    **{f"generation.{s}.intervals": "intervals" for s in GENERATION_SETS},
    **{f"generation.{s}.{name}": "number" for s in GENERATION_SETS for _, name in GENERATION_TABLE},
    **{f"generation.{s}.composition": "shares" for s in (*GENERATION_SETS, "reference")},
    **{f"generation.student.sampling.{name}": "number" for name in SAMPLING},
    **{f"generation.student.counts.{name}": "at least 0" for name in ("attempts", "kept")},
    "generation.student.examples": "texts",
}
"""What is shown of generated proteins, as in ``NESTED``."""


def generation_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the sets of proteins that were described, and their table: label, then figures."""
    sets = {s: r for s in GENERATION_SETS if (r := figure(results, f"generation.{s}"))}
    rows = []
    for label, name in GENERATION_TABLE:
        cells = [with_interval(record, name) for record in sets.values()]
        if any(cells):
            rows.append([label, *cells])
    return list(sets), rows


SIZES = ("student_parameters", "teacher_parameters", "share_of_teacher", "compression_ratio")


def print_table(results: Mapping[str, Any]) -> None:
    """Print the main figures of a results file for a person, each with its interval."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for title in ("student", "teacher", "student / teacher"):
        table.add_column(title, justify="right")
    for label, name, ratio in TABLE:
        cells = [with_interval(results, f"{model}_{name}") for model in MODELS]
        if any(cells):
            table.add_row(label, *cells, with_interval(results, ratio) if ratio else "")
    for key in ("kl_from_natural", "kl_from_natural_uniprot"):
        cells = [with_interval(results, f"{key}.{model}") for model in MODELS]
        if any(cells):
            where = "UniProt" if key.endswith("uniprot") else "held-out"
            table.add_row(f"composition KL from {where}", *cells, "")
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
            count = figure(results, f"generation.{name}.sequences")
            table.add_column(name if count is None else f"{name} ({count:,})")
        for row in rows:
            table.add_row(*row)
        wide = Console(width=40 + 26 * len(sets), highlight=False)
        wide.print(table)


def summary_lines(results: Mapping[str, Any]) -> list[str]:
    """Return what the table cannot hold: divergences, size and threshold, floors, warnings."""
    lines = []
    if figure(results, "kl_divergence") is not None:
        lines.append(
            f"KL(teacher‖student): {with_interval(results, 'kl_divergence')} nats per token, "
            f"{with_interval(results, 'kl_per_residue')} per residue; same first choice: "
            f"{with_interval(results, 'top1_agreement')}"
        )
    bound = figure(results, "threshold.perplexity_ratio_below")
    if bound is not None and all(results.get(key) is not None for key in SIZES):
        verdict = "passed" if figure(results, "threshold.passed") else "not passed"
        lines.append(
            f"size: {results['student_parameters']:,} of {results['teacher_parameters']:,} "
            f"parameters ({results['share_of_teacher']:.1%}, {results['compression_ratio']:.1f} "
            f"times smaller); ratio below {bound:.2f}: {verdict}"
        )
    kept = figure(results, "kept_advantage")
    if kept is not None:
        lines.append(
            "kept of the teacher's advantage over unigram: "
            + with_interval(results, "kept_advantage")
        )
    floors = [
        f"{name} {figure(results, f'floors.{name}.perplexity_per_residue'):.2f}"
        for name in FLOORS
        if figure(results, f"floors.{name}.perplexity_per_residue") is not None
    ]
    if floors:
        lines.append(f"floors, perplexity per residue: {', '.join(floors)}")
    lines += cautions(results)
    if figure(results, "data.proteins") and figure(results, "data.clusters") is not None:
        lines.append(
            f"{results['data']['proteins']:,} proteins in {results['data']['clusters']:,} "
            "clusters; intervals: 95 %, bootstrap over clusters"
        )
    return lines


def cautions(results: Mapping[str, Any]) -> list[str]:
    """Return what keeps the figures of either model from meaning what they seem to say."""
    lines = []
    for model in MODELS:
        gain = figure(results, f"floors.unigram.{model}_gain")
        if gain is not None and gain <= 0:
            lines.append(
                f"the {model} predicts proteins no better than the frequencies of residues alone"
            )
        if figure(results, f"{model}_ece.calibration_meaningful") is False:
            lines.append(
                f"calibration of the {model} is not meaningful: it is right no more often than "
                "always naming the most frequent token"
            )
    return lines


def with_interval(results: Mapping[str, Any], name: str) -> str:
    """Return a figure as ``1.23 [1.20, 1.26]``; without its interval where there is none."""
    value = figure(results, name)
    if value is None:
        return ""
    interval = (results.get("intervals") or {}).get(name)
    if not interval:
        return _short(value)
    return f"{_short(value)} [{_short(interval[0])}, {_short(interval[1])}]"


def _short(value: float) -> str:
    """Return a number with three decimals, or four significant digits where it is large."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"

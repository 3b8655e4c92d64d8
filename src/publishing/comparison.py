"""Compares evaluations in a table, with verdicts (:mod:`src.publishing.verdicts`) beside it."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.common.files import read_json
from src.common.settings import PUBLISHED_STUDENTS
from src.common.tables import latex_lines, markdown_lines
from src.evaluation.metrics import METRICS, Metric
from src.evaluation.results import interval_of, lookup, read_results, with_interval
from src.models.sizes import threshold_for
from src.publishing.verdicts import ResultsFile, Verdict, verdict_lines

MISSING = "---"

# Reading


def read_entries(paths: Sequence[str | Path]) -> tuple[list[ResultsFile], list[str]]:
    """Read the results files, of any version, of a comparison; one that is missing keeps its row.

    Returns:
        The entries under names that tell them apart, and a line for each file that is missing or
        was left out because it holds no evaluation (other results stand in the same folder).

    Raises:
        ValueError: a file is broken, a pattern matched nothing, or none holds an evaluation.
    """
    entries: list[ResultsFile] = []
    notes: list[str] = []
    for path in dict.fromkeys(map(Path, paths)):
        if path.is_dir():
            raise ValueError(f"{path} is a directory: name its files, for example {path}/*.json")
        if not path.exists():
            if any(sign in str(path) for sign in "*?["):
                raise ValueError(f"no file matches {path}: evaluate a student first")
            entries.append(ResultsFile(path, None))
            notes.append(how_to_make(path))
        elif _is_evaluation(read_json(path)):
            entries.append(ResultsFile(path, read_results(path)))
        else:
            notes.append(f"{path}: left out, because it holds no evaluation of a student")
    if not entries:
        raise ValueError(notes[0] if notes else "no results file was named")
    for entry, name in zip(entries, _names([e.path for e in entries]), strict=True):
        entry.name = name
    return entries, notes


def _is_evaluation(content: Any) -> bool:
    # Anything but an object goes on to read_results, which says what is wrong with it.
    return not isinstance(content, dict) or any(
        content.get(key) is not None for key in ("perplexity_ratio", "kl_divergence", "student_ece")
    )


def how_to_make(path: Path) -> str:
    """Return one line on a missing results file, with the command where it is well known."""
    for preset, student in PUBLISHED_STUDENTS.items():
        if preset.replace("-", "_") in path.stem:
            return (
                f"{path} is missing: it takes the model hub; with a network, python "
                f"scripts/evaluate.py --student_model {student} --compute_ece --output {path}"
            )
    return f"{path} is missing"


def _names(paths: Sequence[Path]) -> list[str]:
    """Return file names without suffix, or whole paths where names are not distinct."""
    stems = [path.stem for path in paths]
    return [
        stem if stems.count(stem) == 1 else str(path.with_suffix(""))
        for stem, path in zip(stems, paths, strict=True)
    ]


# The table


@dataclass(frozen=True)
class Threshold:
    """The bound of the perplexity ratio for a student's size, and whether it was met.

    ``certain`` is false where the interval of the ratio holds the bound, or there is none.
    """

    bound: float
    passed: bool
    certain: bool


def threshold_outcome(results: Mapping[str, Any]) -> Threshold | None:
    """Compare the perplexity ratio with the bound for the student's size; None without a size."""
    ratio, compression = lookup(results, "perplexity_ratio"), lookup(results, "compression_ratio")
    share = lookup(results, "share_of_teacher") or (1 / compression if compression else None)
    if ratio is None or share is None:
        return None
    bound = threshold_for(share)
    interval = interval_of(results, "perplexity_ratio")
    certain = bool(interval) and not interval[0] < bound <= interval[1]
    return Threshold(bound, ratio < bound, certain)


def table(entries: Sequence[ResultsFile]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the cells of the comparison, ``---`` where a value is missing."""
    metrics = [metric for metric in METRICS if metric.column]
    headings = ["", *(metric.column for metric in metrics), "threshold"]
    rows = []
    for entry in entries:
        results = entry.results or {}
        cells = [_cell(results, metric) for metric in metrics]
        rows.append([entry.name, *cells, threshold_cell(entry.results)])
    return headings, rows


def _cell(results: Mapping[str, Any], metric: Metric) -> str:
    value = lookup(results, metric.key)
    if metric.spec and value:
        return metric.spec.format(value)
    return with_interval(results, metric.key) or MISSING


def threshold_cell(results: Mapping[str, Any] | None) -> str:
    """Return ``pass`` or ``fail`` with the bound; with ``?`` where it is not certain."""
    outcome = threshold_outcome(results or {})
    if outcome is None:
        return MISSING
    word = "pass" if outcome.passed else "fail"
    return f"{word}{'' if outcome.certain else '?'} (< {outcome.bound:.2f})"


FOOTNOTE = (
    "Intervals: 95 %, bootstrap over clusters of test proteins; none where the file has none. "
    "Threshold: of the perplexity ratio for the student's size; ? where its interval holds the "
    "bound or is missing."
)


def as_markdown(
    entries: Sequence[ResultsFile], verdicts: Sequence[Verdict], notes: Sequence[str]
) -> str:
    """Return the comparison as a Markdown table with its verdicts."""
    headings, rows = table(entries)
    lines = [*markdown_lines(headings, rows), "", FOOTNOTE]
    for verdict in verdicts:
        first, *rest = verdict_lines(verdict)
        lines += ["", f"**{first}**", "", *(f"- {line}" for line in rest)]
    if notes:
        lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def as_latex(
    entries: Sequence[ResultsFile], verdicts: Sequence[Verdict], notes: Sequence[str]
) -> str:
    """Return the comparison as a LaTeX table (package booktabs); verdicts as comments."""
    headings, rows = table(entries)
    lines = [
        *latex_lines(headings, rows),
        f"% {FOOTNOTE}",
        *(f"% {line}" for verdict in verdicts for line in verdict_lines(verdict)),
        *(f"% {note}" for note in notes),
    ]
    return "\n".join(lines) + "\n"


def as_csv(
    entries: Sequence[ResultsFile], verdicts: Sequence[Verdict], notes: Sequence[str]
) -> str:
    """Return the comparison as CSV, unrounded, an empty cell where a value is missing."""
    names = [metric.key for metric in METRICS if metric.column]
    judged = {verdict.candidate: verdict for verdict in verdicts}
    header = ["name", "file", *(f"{n}{end}" for n in names for end in ("", "_low", "_high"))]
    header += ["threshold", "passed", "certain"]
    if judged:
        header += ["reference", "verdict"]
        header += [
            f"{part}_difference{end}"
            for part in ("ln_perplexity", "kl", "ece")
            for end in ("", "_low", "_high", "_outcome", "_method")
        ]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    for entry in entries:
        results = entry.results or {}
        row: list[Any] = [entry.name, entry.path]
        for name in names:
            interval = interval_of(results, name) or (None, None)
            row += [lookup(results, name), *interval]
        outcome = threshold_outcome(results)
        row += [outcome.bound, outcome.passed, outcome.certain] if outcome else [None] * 3
        verdict = judged.get(entry.name)
        if verdict:
            row += [verdict.reference, verdict.scenario]
            for difference in verdict.differences.values():
                numbers = (difference.estimate, difference.low, difference.high)
                row += [number if math.isfinite(number) else None for number in numbers]
                row += [difference.outcome, difference.method]
        writer.writerow(row)
    return buffer.getvalue()


FORMATS = {"markdown": as_markdown, "csv": as_csv, "latex": as_latex}
SUFFIXES = {".md": "markdown", ".csv": "csv", ".tex": "latex"}


def format_of(path: Path) -> str:
    """Return the format that a file's suffix names. Raises ``ValueError`` for another."""
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"--output {path}: name it {', '.join(SUFFIXES)}, or pass --format "
            f"({', '.join(FORMATS)})"
        )
    return SUFFIXES[path.suffix]


def print_comparison(
    entries: Sequence[ResultsFile], verdicts: Sequence[Verdict], notes: Sequence[str]
) -> None:
    """Print the comparison for a person; as wide as it needs where the output is a file."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    headings, rows = table(entries)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        shown.add_row(*row)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=160)
    console.print(shown)
    for line in (FOOTNOTE, *notes):
        console.print(line, soft_wrap=True)
    for verdict in verdicts:
        first, *rest = verdict_lines(verdict)
        console.print()
        console.print(first, style="bold", soft_wrap=True)
        for line in rest:
            console.print(f"  {line}", soft_wrap=True)

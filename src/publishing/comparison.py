"""Compares evaluations in a table, and judges a candidate against a reference by intervals.

The verdict asks three questions: perplexity, KL divergence, calibration error (ECE). "Lower" and
"higher" mean that the 95 % interval of the difference excludes zero; perplexities are "equivalent"
where the difference is shown to be within a margin (two one-sided tests), which a wide interval
never shows. Each scenario needs all its parts at once, so its chance of error is at most that of
one part (an intersection-union test: Berger 1982, Technometrics 24:295): nothing is to correct.

Intervals speak of these two models on such proteins. What another training seed would give is
not in them: that needs several seeds (``src.evaluation.statistics.two_way_interval``).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from src.common.files import read_json
from src.common.settings import PUBLISHED_STUDENTS
from src.common.tables import latex_lines, markdown_lines
from src.evaluation.metrics import METRICS, Metric
from src.evaluation.results import interval_of, lookup, read_results, with_interval
from src.models.sizes import threshold_for

if TYPE_CHECKING:
    from src.evaluation.statistics import Estimate

MISSING = "---"
MARGIN = 0.02
"""Default margin of equivalence, in ln(perplexity): about 2 %, as in docs/EXPERIMENT.md."""
REPLICATES = 2000
SAME = 1e-4
"""Relative difference up to which a figure recomputed from single proteins is the file's own."""

SCENARIOS = {
    "best": "perplexity, KL and ECE lower",
    "good": "perplexity equivalent, KL and ECE lower",
    "okay": "perplexity higher, KL and ECE lower",
    "investigate": "perplexity, KL and ECE higher",
    "inconclusive": "no scenario is shown by the intervals",
}
PAIRED = "paired"
UNPAIRED = "two intervals"


@dataclass
class ResultsFile:
    """A results file in a comparison; ``results`` is None where the file is missing."""

    path: Path
    results: dict[str, Any] | None
    name: str = ""


@dataclass(frozen=True)
class Difference:
    """Candidate minus reference in one figure; NaN where it is not known.

    ``outcome`` is ``lower``, ``higher``, ``equivalent``, ``unclear`` or ``unknown``. Perplexity is
    compared in ln(perplexity ratio), KL in nats for each token, ECE as it is.
    """

    estimate: float
    low: float
    high: float
    outcome: str
    method: str


@dataclass(frozen=True)
class Verdict:
    """What a candidate is against a reference, and why."""

    candidate: str
    reference: str
    scenario: str
    differences: dict[str, Difference]
    margin: float
    clusters: int | None = None
    reasons: list[str] = field(default_factory=list)


NOT_KNOWN = Difference(math.nan, math.nan, math.nan, "unknown", "")

# Reading


def read_entries(paths: Sequence[str | Path]) -> tuple[list[ResultsFile], list[str]]:
    """Read the files of a comparison.

    Args:
        paths: results files of any version; one that is named but missing keeps its row.

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
    """Return file names without suffix, or whole paths where those are not distinct."""
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
    """Return the headings and the cells of the comparison, ``---`` where there is no figure."""
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
    """Return the comparison as CSV, unrounded, an empty cell where there is no figure."""
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


# The verdict


def scenario_of(perplexity: str, kl: str, ece: str) -> str:
    """Return the scenario of three outcomes: best, good, okay, investigate or inconclusive."""
    if (kl, ece) == ("lower", "lower"):
        return {"lower": "best", "equivalent": "good", "higher": "okay"}.get(
            perplexity, "inconclusive"
        )
    if (perplexity, kl, ece) == ("higher", "higher", "higher"):
        return "investigate"
    return "inconclusive"


def outcome_of(low: float, high: float, equivalent: bool = False) -> str:
    """Return what the interval of a difference shows.

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


def judge(
    candidate: ResultsFile,
    reference: ResultsFile,
    margin: float = MARGIN,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Verdict:
    """Judge a candidate against a reference.

    Where tables of the same single proteins stand beside both files, perplexity and KL are
    compared protein by protein (bootstrap over clusters, paired). Otherwise, and for ECE always,
    because it is no sum over proteins, the two intervals are subtracted end by end:
    [low - high', high - low']. For estimates that are about normal this covers at least 95 %
    whatever their correlation, because their standard errors add up in full; it misses small
    differences that pairing would show.

    Args:
        candidate: an entry.
        reference: another.
        margin: of equivalence, in ln(perplexity).
        replicates: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The verdict with its differences; ``inconclusive`` where a part is missing or the two were
        not measured on the same proteins beside the same teacher.

    Raises:
        ValueError: ``margin`` is not above 0, or a table of single proteins is broken.
    """
    if not 0 < margin < math.inf:
        raise ValueError(f"--margin must be above 0, got {margin}")
    clusters, estimates, reasons = None, {}, []
    differences: dict[str, Difference]
    problem = _incomparable(candidate, reference)
    if problem:
        differences = {part: NOT_KNOWN for part in ("perplexity", "KL", "ECE")}
        reasons.append(problem)
    else:
        ours, theirs = candidate.results or {}, reference.results or {}
        clusters, estimates, reasons = _paired_estimates(candidate, reference, replicates, seed)
        differences = {
            "perplexity": _difference(
                ours, theirs, "perplexity_ratio", estimates.get("perplexity"), margin
            ),
            "KL": _difference(ours, theirs, "kl_divergence", estimates.get("KL")),
            "ECE": _difference(ours, theirs, "student_ece.ece"),
        }
        reasons += _doubts(differences, ours, theirs)
        if not _calibration_meaningful(ours, theirs):
            differences["ECE"] = NOT_KNOWN
    scenario = scenario_of(*(d.outcome for d in differences.values()))
    return Verdict(candidate.name, reference.name, scenario, differences, margin, clusters, reasons)


def judge_all(
    entries: Sequence[ResultsFile],
    reference: Path,
    margin: float = MARGIN,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> tuple[list[Verdict], str | None]:
    """Judge every entry that is there against the one of a path.

    Args:
        entries: of :func:`read_entries`, the reference among them.
        reference: its path.
        margin: as in :func:`judge`.
        replicates: as in :func:`judge`.
        seed: as in :func:`judge`.

    Returns:
        The verdicts, and a line on why there are none, or None.

    Raises:
        ValueError: the reference holds no evaluation, or as in :func:`judge`.
    """
    judged_by = next((entry for entry in entries if entry.path == reference), None)
    if judged_by is None:
        raise ValueError(f"--reference {reference} holds no evaluation of a student")
    if judged_by.results is None:
        return [], f"no verdict without the reference {reference}"
    others = [e for e in entries if e is not judged_by and e.results is not None]
    verdicts = [judge(entry, judged_by, margin, replicates, seed) for entry in others]
    return verdicts, None if verdicts else f"nothing to judge against {reference}"


def _incomparable(candidate: ResultsFile, reference: ResultsFile) -> str | None:
    """Return why two results cannot be compared at all, or None."""
    for entry in (candidate, reference):
        if entry.results is None:
            return f"{entry.path} is missing"
    for what, names in (
        ("beside different teachers", ("run.teacher.fingerprint",)),
        ("on different proteins", ("data.fingerprint", "run.data.fingerprint")),
    ):
        for name in names:
            ours, theirs = (lookup(e.results or {}, name) for e in (candidate, reference))
            if ours != theirs and None not in (ours, theirs):
                return f"they were measured {what}: evaluate both alike"
    return None


def _calibration_meaningful(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    return all(
        lookup(results, "student_ece.calibration_meaningful") is not False
        for results in (ours, theirs)
    )


def _doubts(
    differences: Mapping[str, Difference], ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> list[str]:
    """Return what a reader should know about figures that are missing or mean little."""
    lines = []
    names = {"perplexity": "perplexity_ratio", "KL": "kl_divergence", "ECE": "student_ece.ece"}
    for part, difference in differences.items():
        if difference.outcome != "unknown":
            continue
        name = names[part]
        if None in (lookup(ours, name), lookup(theirs, name)):
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


def _difference(
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    name: str,
    paired: Estimate | None = None,
    margin: float | None = None,
) -> Difference:
    """Return the difference in one figure: paired where there is an estimate, else from intervals.

    With a margin the figure is a ratio and is compared in its logarithm.
    """
    if paired is not None:
        equivalent = False
        if margin is not None and math.isfinite(paired.low):
            from src.evaluation.statistics import equivalence

            equivalent = equivalence(paired, margin).equivalent
        outcome = outcome_of(paired.low, paired.high, equivalent)
        return Difference(paired.estimate, paired.low, paired.high, outcome, PAIRED)
    mine, other = (_with_ends(results, name, margin is not None) for results in (ours, theirs))
    if mine is None or other is None:
        return NOT_KNOWN
    low, high = mine[1] - other[2], mine[2] - other[1]
    equivalent = margin is not None and -margin < low and high < margin
    return Difference(mine[0] - other[0], low, high, outcome_of(low, high, equivalent), UNPAIRED)


def _with_ends(
    results: Mapping[str, Any], name: str, logarithm: bool
) -> tuple[float, float, float] | None:
    """Return a figure and the ends of its interval, or None where any is missing."""
    value, ends = lookup(results, name), interval_of(results, name)
    if value is None or ends is None:
        return None
    if not logarithm:
        return value, ends[0], ends[1]
    if min(value, *ends) <= 0:
        return None
    return math.log(value), math.log(ends[0]), math.log(ends[1])


def per_protein_path(entry: ResultsFile) -> Path | None:
    """Return where the table of single proteins of a results file stands, None without one.

    It is looked for beside the file, under its name with ``.parquet``, then where the evaluation
    says that it wrote it.
    """
    recorded = lookup(entry.results or {}, "run.arguments.per_protein")
    named = [Path(recorded)] if isinstance(recorded, str) else []
    return next((p for p in (entry.path.with_suffix(".parquet"), *named) if p.is_file()), None)


def read_per_protein(path: Path) -> dict[str, np.ndarray]:
    """Read the columns of a table of single proteins, ordered by protein.

    Raises:
        ValueError: not parquet, a column is missing, or a figure is not finite.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels, numbers = ("protein", "cluster"), ("tokens", "residues", "nll_student", "kl")
    try:
        read = pq.read_table(path, columns=[*labels, *numbers])
        columns = {name: np.asarray(read[name].to_pylist()) for name in labels}
        columns |= {name: np.asarray(read[name].to_pylist(), dtype=np.float64) for name in numbers}
    except (pa.ArrowException, KeyError, TypeError, ValueError, OSError) as error:
        first = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: not a table of single proteins ({first})") from None
    if not all(np.isfinite(columns[name]).all() for name in numbers):
        raise ValueError(f"{path}: a figure is not finite")
    order = np.argsort(columns["protein"], kind="stable")
    return {name: values[order] for name, values in columns.items()}


def _paired_estimates(
    candidate: ResultsFile, reference: ResultsFile, replicates: int, seed: int
) -> tuple[int | None, dict[str, Estimate], list[str]]:
    """Return clusters and paired differences of ln(perplexity) and KL, or nothing and why not."""
    tables = []
    for entry in (candidate, reference):
        path = per_protein_path(entry)
        if path is None:
            return None, {}, [f"{entry.name} has no table of single proteins (--per_protein)"]
        columns = read_per_protein(path)
        tokens = columns["tokens"].sum()
        for name, mine in (
            ("student_perplexity", np.exp(columns["nll_student"].sum() / tokens)),
            ("kl_divergence", columns["kl"].sum() / tokens),
        ):
            theirs = lookup(entry.results or {}, name)
            if theirs is not None and not math.isclose(mine, theirs, rel_tol=SAME, abs_tol=1e-9):
                return None, {}, [f"{path} is of another evaluation than {entry.path}: not used"]
        tables.append(columns)
    ours, theirs = tables
    for name in ("protein", "cluster", "residues", "tokens"):
        if not np.array_equal(ours[name], theirs[name]):
            return None, {}, [f"the tables of single proteins differ in {name}: not paired"]
    from src.evaluation.statistics import cluster_bootstrap

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
    return len(set(ours["cluster"].tolist())), estimates, []


def verdict_lines(verdict: Verdict) -> list[str]:
    """Return a verdict for a person: a headline, a line for each part, and what to doubt."""
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

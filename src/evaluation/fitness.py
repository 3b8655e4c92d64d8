"""Scores variants of proteins by their likelihood and compares the scores with measurements.

A protein's score is log p(tokens after the first | the first) of its layout, line breaks and end
counted (:func:`src.evaluation.scoring.score_proteins`). Variants are read from FASTA or from
a table such as ProteinGym's substitution benchmark (Notin et al. 2023, NeurIPS): ``mutant``,
``mutated_sequence`` and ``DMS_score``. ProteinGym's own ProtGPT2 baseline scores bare sequences,
averaged over both directions; ours are in the layout that the model was trained on, so the two are
not to be mixed.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from src.common.cli import printable, unheard
from src.common.files import write_text
from src.evaluation.mutants import Substitution, mutated, numbering, parse_mutant
from src.evaluation.scoring import score_proteins
from src.evaluation.statistics import Estimate, cluster_codes, cluster_weights, percentiles
from src.evaluation.variants import variant_nll, windowed_nll
from src.models.loading import ProteinModel
from src.proteins.columns import (
    LEAST_PROTEIN,
    MUTANT_COLUMNS,
    SEQUENCE_COLUMNS,
    is_missing,
    number_of,
)
from src.proteins.formats import TABLES, kind_of
from src.proteins.layouts import tagged_as
from src.proteins.readers import Record, tag_of_cell
from src.proteins.reading import ReadReport
from src.proteins.sources import (
    clean,
    read_distinct_names,
    read_proteins,
    require_proteins,
    usable,
)
from src.proteins.tables import open_table

SCORE_COLUMN = "DMS_score"
MUTANT_COLUMN = "mutant"
LEAST_COMPARED = 3
"""Fewest variants with both a measurement and a score: of two the correlation is always ±1."""
NOT_UNDERSTOOD = "mutants that are not understood (A12C, A12C:D45E)"
OTHER_MUTANTS = "mutants whose position is not understood, each by itself in intervals"


@dataclass
class Variants:
    """Proteins to score, P of them, with the table that they came in.

    Attributes:
        columns: of the table; ``name`` and ``sequence`` where it was FASTA.
        rows: ``(P,)`` the cells of each.
        residues: ``(P,)`` cleaned; empty where a row of a table has no usable sequence.
        measured: ``(P,)`` measured fitness, NaN where a cell is empty; None without such a column.
        clusters: ``(P,)`` variants that resemble each other: those of the same positions where a
            column ``mutant`` tells them, else each by itself.
        report: what was read, mended and dropped.
    """

    columns: list[str]
    rows: list[list[str]]
    residues: list[str]
    measured: np.ndarray | None
    clusters: list[Any]
    report: ReadReport = field(default_factory=ReadReport)


def read_variants(
    path: str | Path,
    sequence_column: str | None = None,
    score_column: str | None = None,
    wild: str | None = None,
    tag: str | None = None,
) -> Variants:
    """Read proteins from any file of them, or mutants of a wild type from a table.

    Entries of FASTA without usable residues are left out; rows of a table stay, with empty
    residues. The report counts both.

    Args:
        path: the file.
        sequence_column: None: a usual one (:data:`src.proteins.columns.SEQUENCE_COLUMNS`).
        score_column: measured fitness; None: ``DMS_score`` where there is one.
        wild: residues of the wild type, for a table with mutants alone.
        tag: key or column of the layout's tag; proteins without it are counted like those without
            usable residues.

    Raises:
        ValueError: the file is missing, broken or without a usable protein, a column is missing, a
            score is no number, or the mutants are not of this wild type.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a directory: give one file" if path.is_dir() else "there is no such file"
        raise ValueError(f"--input {path}: {what}")
    kind = kind_of(path)
    if kind in TABLES:
        return _read_table(path, kind, sequence_column, score_column, wild, tag)
    if score_column or wild:
        what = f"--score_column {score_column}" if score_column else "--wildtype with --input"
        raise ValueError(f"{what}: {path} has no columns")
    proteins, report = read_distinct_names(
        path, keep_ambiguous=True, sequence_column=sequence_column, tag=tag
    )
    rows = [[p.name, p.residues] for p in proteins]
    residues = [p.residues for p in proteins]
    return Variants(["name", "sequence"], rows, residues, None, list(range(len(rows))), report)


def mutant_variants(
    wild: str, mutants: Sequence[Sequence[Substitution]], names: Sequence[str], first: int = 1
) -> Variants:
    """Return the table of a wild type's mutants: ``mutant`` and ``sequence``.

    ``names`` are the mutants as they were written, ``first`` is the number of the first residue.
    """
    residues = [tagged_as(wild, mutated(wild, mutant, first)) for mutant in mutants]
    clusters = [":".join(str(s.number) for s in mutant) for mutant in mutants]
    rows = [list(row) for row in zip(names, residues, strict=True)]
    return Variants([MUTANT_COLUMN, "sequence"], rows, residues, None, clusters)


def _read_table(
    path: Path,
    kind: str,
    sequence_column: str | None,
    score_column: str | None,
    wild: str | None,
    tag: str | None,
) -> Variants:
    report = ReadReport(source=str(path))
    table = open_table(path, kind, report, sequence_column)
    mutant = table.find(None, (*MUTANT_COLUMNS, *(["variant"] if wild else ())), "")
    score = table.find(score_column, (SCORE_COLUMN,), "--score_column")
    data = tags = None
    if wild is None:
        tags = None if tag is None else table.find(tag, (), "--layout")
        data = table.sequence(sequence_column)
        report.column = table.columns[data]
    elif mutant is None:
        raise ValueError(f"--wildtype: {path} has no column {MUTANT_COLUMN!r} of mutants of it")
    elif (unread := table.find(None, SEQUENCE_COLUMNS, "")) is not None:
        report.note(
            f"--wildtype: mutants are from column {table.columns[mutant]!r}, "
            f"{table.columns[unread]!r} is not read"
        )
    numbered = list(table.rows)
    rows = [row for _, row in numbered]
    places = [f"{path.name}:{number}" for number, _ in numbered]
    if not rows:
        raise ValueError(f"--input {path}: there is no row below the header line")
    heard = report if wild is None else None
    parsed = [] if mutant is None else _parsed([row[mutant] for row in rows], places, heard)
    if data is not None:
        texts = ["" if is_missing(row[data]) else row[data] for row in rows]
    else:
        assert wild is not None
        begin = numbering([m for m in parsed if m], wild)
        report.note(f"mutants: {begin}")
        texts = ["" if m is None else mutated(wild, m, begin.first) for m in parsed]
    residues, measured = [], []
    for place, row, text in zip(places, rows, texts, strict=True):
        fault = "" if text or wild is None else NOT_UNDERSTOOD
        tagged = "" if tags is None else tag_of_cell(row[tags])
        record = Record("", place, text, fault=fault, tag=tagged)
        protein = usable(record, report, keep_ambiguous=True, tag=None if wild else tag) or ""
        residues.append(tagged_as(wild, protein) if wild and protein else protein)
        if score is not None:
            where = f"{place}: {table.columns[score]}"
            comma = table.divider != ","
            measured.append(number_of(row[score], where, decimal_comma=comma))
            if comma and "," in row[score]:
                report.fix("decimal commas", place)
    require_proteins(report)
    clusters: list[Any] = [_positions(m) or f"row {i}" for i, m in enumerate(parsed)]
    return Variants(
        table.columns,
        rows,
        residues,
        np.array(measured) if score is not None else None,
        clusters or list(range(len(rows))),
        report,
    )


def _parsed(
    mutants: Sequence[str], places: Sequence[str], report: ReadReport | None
) -> list[list[Substitution] | None]:
    """Return the substitutions of each mutant, None where it is written in another way."""
    parsed: list[list[Substitution] | None] = []
    for mutant, place in zip(mutants, places, strict=True):
        try:
            parsed.append(parse_mutant(mutant))
        except ValueError:
            if report and mutant.strip():
                report.notice(OTHER_MUTANTS, f"{place}, {printable(mutant[:30])!r}")
            parsed.append(None)
    return parsed


def _positions(mutant: Sequence[Substitution] | None) -> str:
    """Return the positions that a mutant changes: ``A1P:D2N`` gives ``1:2``, ``SG5A`` ``S5``."""
    return ":".join(f"{s.prefix}{s.number}" for s in mutant or ())


def score_columns(
    models: Mapping[str, ProteinModel],
    residues: Sequence[str],
    batch_size: int = 32,
    wild: str | None = None,
    windows: bool = False,
    announce: Callable[[str], None] = unheard,
) -> dict[str, np.ndarray]:
    """Return log-likelihoods of proteins under models, as columns of a table.

    All processes call this together, and each scores a share.

    Args:
        models: by prefix of the columns.
        residues: ``(P,)``; equal ones are scored once, empty ones not at all.
        batch_size: proteins scored at a time.
        wild: the protein that all are variants of: what they share with it is computed once.
        windows: score proteins longer than the model in overlapping windows
            (:func:`src.evaluation.variants.windowed_nll`). Given ``wild``, all are scored so as
            soon as one of them is too long: substitutions change the number of tokens, and a
            protein is many nats less likely in windows than as a whole.
        announce: called with a line on how many proteins of a model were scored in windows.

    Returns:
        ``{prefix}log_likelihood`` (nats) and ``{prefix}log_likelihood_per_residue``, ``(P,)`` each;
        given ``wild`` also ``{prefix}log_ratio``, log p(protein) - log p(wild type). NaN where a
        protein does not fit the model.
    """
    asked = [*([] if wild is None else [wild]), *residues]
    kinds = {(p, getattr(p, "tag", "")): p for p in asked if p}
    unique = list(kinds.values())
    place = {kind: i for i, kind in enumerate([*kinds, ("", "")])}
    back = np.array([place[p, getattr(p, "tag", "")] for p in residues])
    sizes = np.array([max(1, len(protein)) for protein in residues])
    columns = {}
    for prefix, loaded in models.items():
        if wild is None:
            nll = score_proteins(*loaded, unique, batch_size=batch_size, shared=True).nll
        else:
            nll = variant_nll(loaded, wild, unique)
        if windows:
            _score_long(loaded, unique, nll, wild is not None, announce, prefix)
        nll = np.append(nll, math.nan)  # of an empty protein
        columns[f"{prefix}log_likelihood"] = -nll[back]
        columns[f"{prefix}log_likelihood_per_residue"] = -nll[back] / sizes
        if wild is not None:
            columns[f"{prefix}log_ratio"] = nll[0] - nll[back]
    return columns


def _score_long(
    loaded: ProteinModel,
    proteins: Sequence[str],
    nll: np.ndarray,
    alike: bool,
    announce: Callable[[str], None],
    prefix: str,
) -> None:
    """Fill in, window by window, the NLL ``(P,)`` of proteins that do not fit the model.

    ``alike``: where there is such a protein, the others are scored in windows as well.
    """
    long = [i for i, value in enumerate(nll.tolist()) if math.isnan(value)]
    if not long:
        return
    nll[long] = windowed_nll(loaded, [proteins[i] for i in long])
    # One that stays NaN is not too long: the tokenizer does not spell it.
    count = int(np.isfinite(nll[long]).sum())
    if not count:
        return
    if alike and len(long) < len(nll):
        nll[:] = windowed_nll(loaded, proteins)
        count = int(np.isfinite(nll).sum())
    kept = int(np.isfinite(nll).sum()) - count
    line = f"{prefix.replace('_', ' ')}scores: {count:,} different proteins in windows"
    if kept:
        line += f", {kept:,} as a whole: a whole protein is more likely, so the two do not compare"
    announce(line)


def write_scores(path: str | Path, variants: Variants, scores: Mapping[str, np.ndarray]) -> None:
    """Write the table that was read with columns of scores behind its own, as CSV, atomically.

    :func:`check_columns` tells beforehand where the table has such a column already.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*variants.columns, *scores])
    for row, *values in zip(variants.rows, *scores.values(), strict=True):
        writer.writerow([*row, *("" if math.isnan(v) else f"{v:.6f}" for v in values)])
    write_text(path, table.getvalue())


def lengths_differ(residues: Sequence[str]) -> bool:
    """Return whether proteins are not all of one length."""
    return len({len(protein) for protein in residues if protein}) > 1


def which_suits(residues: Sequence[str]) -> str:
    """Return, for a person, which of the two log-likelihoods ranks these proteins."""
    if not lengths_differ(residues):
        return "all of one length: the total and the value per residue give the same order"
    low, high = (end(len(p) for p in residues if p) for end in (min, max))
    return (
        f"lengths from {low:,} to {high:,} residues: compare log_likelihood_per_residue; the total "
        "is a sum over residues, so that a truncated protein looks better by it"
    )


def wild_type(given: str, tag: str | None = None) -> str:
    """Return the residues of ``--wildtype``: given as such, or in a file with one protein.

    With the key or column of a tag they have that tag, which only a file can say.

    Raises:
        ValueError: they are neither (a text with a dot is the name of a file that is not there),
            or the file holds several proteins.
    """
    if os.path.isfile(given):  # False, too, where it is too long for a name
        proteins = {p.residues for p in read_proteins(given, keep_ambiguous=True, tag=tag)}
        if len(proteins) != 1:
            raise ValueError(
                f"--wildtype {given}: holds {len(proteins)} proteins, and not one (over several "
                "lines it needs a '>' header)"
            )
        return proteins.pop()
    if "." in given or os.sep in given:
        raise ValueError(f"--wildtype {given}: there is no such file")
    report = ReadReport()
    cleaned = clean(given, report, "--wildtype", keep_ambiguous=True)
    if cleaned is None or (given.islower() and len(given) < LEAST_PROTEIN):
        raise ValueError(f"--wildtype {given[:40]!r}: neither a file nor residues")
    return cleaned


def check_columns(variants: Variants, names: Sequence[str]) -> None:
    """Raise ``ValueError`` where a table already has a column of one of these names."""
    for name in names:
        if name in variants.columns:
            raise ValueError(f"--input has a column {name!r} already: rename or drop it first")


def comparable(*columns: np.ndarray) -> np.ndarray:
    """Return ``(P,)`` which variants have a number in every column ``(P,)``."""
    return np.all([np.isfinite(column) for column in columns], axis=0)


def require_measured(variants: Variants) -> None:
    """Check that there are measurements to compare with, before anything is scored.

    Raises:
        ValueError: there are none, or of fewer than three variants.
    """
    if variants.measured is None:
        raise ValueError("--correlations: needs --input with measured fitness: --score_column?")
    _require_enough(int(np.isfinite(variants.measured).sum()))


def _require_enough(count: int) -> None:
    if count < LEAST_COMPARED:
        raise ValueError(
            f"{count} variants have both a measurement and a score: {LEAST_COMPARED} are needed "
            "for a correlation"
        )


def spearman(
    scores: Mapping[str, np.ndarray],
    measured: np.ndarray,
    clusters: Sequence[Any],
    n: int = 2000,
    seed: int = 0,
) -> tuple[dict[str, Estimate], int]:
    """Return Spearman's correlation of scores with measurements, and of two scores the difference.

    Intervals are expanded percentiles of a bootstrap over clusters (positions) that all scores
    share; they speak of other variants of this protein, not of other proteins.

    Args:
        scores: ``(P,)`` by name; of two, the first less the second is given as ``difference``.
        measured: ``(P,)``.
        clusters: ``(P,)``.
        n: replicates; 0: no intervals (NaN).
        seed: of the draws.

    Returns:
        Estimates by name, and how many variants had both a measurement and every score.

    Raises:
        ValueError: there are fewer than three such variants.
    """
    from scipy import stats

    known = comparable(measured, *scores.values())
    count = int(known.sum())
    _require_enough(count)
    y = measured[known]
    xs = {name: values[known] for name, values in scores.items()}
    codes, groups = cluster_codes([c for c, k in zip(clusters, known, strict=True) if k])
    tests: dict[str, Any] = {name: stats.spearmanr(x, y) for name, x in xs.items()}
    point = {name: float(test.statistic) for name, test in tests.items()}
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in xs}
    for weights in cluster_weights(groups, n, seed, count):
        for name, x in xs.items():
            drawn[name].append(weighted_spearman(x, y, weights[:, codes]))
    replicates = {name: np.concatenate(v) if v else np.array([]) for name, v in drawn.items()}
    if len(xs) == 2:
        first, second = xs
        point["difference"] = point[first] - point[second]
        replicates["difference"] = replicates[first] - replicates[second]
    estimates = {}
    for name, estimate in point.items():
        low = high = math.nan
        if groups > 1 and len(replicates[name]) and np.isfinite(replicates[name]).all():
            low, high = map(float, percentiles(replicates[name], groups))
        estimates[name] = Estimate(estimate, low, high)
    return estimates, count


def weighted_spearman(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation of samples that hold each pair so many times.

    Args:
        x: ``(P,)``.
        y: ``(P,)``.
        weights: ``(R, P)`` whole numbers from 0: how often each sample holds each pair.

    Returns:
        ``(R,)``; NaN where a sample holds a single value of either. Ties share their mean rank.
    """
    total = weights.sum(1, keepdims=True)
    centred = []
    for values in (x, y):
        ranks = _weighted_ranks(values, weights)
        centred.append(ranks - (weights * ranks).sum(1, keepdims=True) / total)
    left, right = centred
    product = (weights * left * right).sum(1)
    spread = np.sqrt((weights * left**2).sum(1) * (weights * right**2).sum(1))
    return np.divide(product, spread, out=np.full(len(weights), np.nan), where=spread > 0)


def _weighted_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean rank ``(R, P)`` of each value in samples that hold it so many times."""
    _distinct, which = np.unique(values, return_inverse=True)
    order = np.argsort(which, kind="stable")
    starts = np.searchsorted(which[order], np.arange(which.max() + 1))
    held = np.add.reduceat(weights.T[order], starts, axis=0)  # (distinct, R)
    below = held.cumsum(0) - held
    return (below + (held + 1) / 2)[which].T

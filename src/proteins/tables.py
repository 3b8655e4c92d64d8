"""Reads tables of proteins: CSV and TSV as programs save them, JSON lines, Excel and parquet.

A table's header is the first line with the name of a known column; titles above it are skipped.
Column names are compared without regard to case, blanks and ``#``. Cells may be divided by commas,
tabs or semicolons, whatever the file is called.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from src.common.cli import printable
from src.proteins.columns import (
    NAME_COLUMNS,
    SEQUENCE_COLUMNS,
    all_proteins,
    find_column,
    first_of,
    is_header,
    key,
    looks_like_protein,
    may_be_protein,
    no_sequence_column,
)
from src.proteins.formats import (
    COMMENTS,
    EXCEL,
    JSON_LINES,
    PARQUET,
    reason,
)
from src.proteins.parquet import batch_cells, open_parquet
from src.proteins.reading import ReadReport
from src.proteins.table_rows import (
    DIVIDERS,
    beginning,
    delimited_rows,
    divider_of,
    excel_rows,
    json_rows,
    parquet_rows,
)

TITLES = "lines above the header, skipped"
REPEATED = "header lines again, skipped"
ROW_NAMES = "row names without a column name"


class Table(NamedTuple):
    """A table with a header.

    Attributes:
        place: of the file, for messages.
        columns: names, as they are in the header.
        rows: ``(number, cells)`` of each row, the number as a person finds it in the file.
        divider: between the cells; empty where it is not text.
        advice: what to do where no column of residues is found.
    """

    place: str
    columns: list[str]
    rows: Iterator[tuple[int, list[str]]]
    divider: str = ""
    advice: str = ""

    def find(self, wanted: str | None, usual: Sequence[str], flag: str) -> int | None:
        """Return the place of a column: the wanted one, else the first of the usual ones, or None.

        Raises:
            ValueError: the wanted column is missing, or a column is there twice.
        """
        return find_column(self.columns, wanted, usual, flag, self.place)

    def sequence(self, wanted: str | None) -> int:
        """Return the place of the column of residues. Raises ``ValueError`` where there is none."""
        column = self.find(wanted, SEQUENCE_COLUMNS, "--sequence_column")
        if column is None:
            raise no_sequence_column(self.columns, self.place, self.advice)
        return column


def open_table(
    path: Path, kind: str, report: ReadReport, sequence_column: str | None = None
) -> Table:
    """Open a table and find its header, with the ``sequence_column`` if the user names one.

    Titles above the header, and a table without one, are reported.

    Raises:
        ValueError: the file is broken, or has no row.
    """
    divider = ""
    if kind == JSON_LINES:
        rows = json_rows(path, report)
    elif kind == EXCEL:
        rows = excel_rows(path, report, sequence_column)
    elif kind == PARQUET:
        rows = parquet_rows(path)
    else:
        divider = divider_of(path, sequence_column)
        rows = delimited_rows(path, divider)
    first = beginning(rows, lambda numbered: numbered[1][0].startswith("#"))
    if not first:
        raise ValueError(f"{path}: there is no protein in it")
    at = next((i for i, (_, row) in enumerate(first) if is_header(row, sequence_column)), None)
    advice = ""
    if at is None:
        filled = [sum(map(bool, row)) for _, row in first]
        at = filled.index(max(filled))
        header = first[at][1]
        proteins = [i for i in range(len(header)) if all_proteins(first[at + 1 :], i)]
        with_header = [i for i in proteins if looks_like_protein(header[i])]
        if len(with_header) == len(proteins) == 1 and not sequence_column:
            columns = [f"column_{i}" for i in range(1, len(header) + 1)]
            columns[proteins[0]] = "sequence"
            if len(columns) > 1:
                columns[0 if proteins[0] else 1] = "name"
            report.note(f"no header line: the residues are in column {proteins[0] + 1}")
            kept = chain(first[at:], rows)
            return Table(
                str(path), columns, _checked(kept, columns, path, divider, report), divider
            )
        if proteins:
            names = ", ".join(printable(header[i])[:30] for i in proteins[:4])
            advice = f"pass --sequence_column ({names} look{'s' * (len(proteins) == 1)} like it)"
        elif divider or kind == EXCEL:
            advice = "pass --sequence_column, or write a line of column names above the rows"
        by_columns = any(re.search(r"\.\d+$", name) for name in first[0][1])
        if kind == JSON_LINES and len(first) == 2 and (by_columns or "[" in first[1][1][0][:1]):
            advice = "write an object for each protein (pandas: orient='records', lines=True)"
    if at:
        report.fix(TITLES, f"{path.name}:{first[0][0]}", at)
    columns = [cell.strip() for cell in first[at][1]]
    while columns and not columns[-1]:
        columns.pop()
    below = first[at + 1 :]
    if divider and _have_names(below, columns, sequence_column):
        report.note(ROW_NAMES)
        columns.insert(0, "row")
    if not sequence_column:
        _refuse_other_text(path, columns, below)
    checked = _checked(chain(below, rows), columns, path, divider, report)
    return Table(str(path), columns, checked, divider, advice)


def _have_names(
    rows: Sequence[tuple[int, list[str]]], columns: Sequence[str], wanted: str | None
) -> bool:
    """Return whether rows begin with names that the header has no column for, as R writes them."""
    data = first_of([wanted] if wanted else SEQUENCE_COLUMNS, columns)
    if len(rows) < 2 or data is None or {len(row) for _, row in rows} != {len(columns) + 1}:
        return False
    shifted = [row[data + 1] for _, row in rows]
    distinct = len({row[0] for _, row in rows}) == len(rows)
    return distinct and all(map(looks_like_protein, shifted))


def _refuse_other_text(
    path: Path, columns: Sequence[str], rows: Sequence[tuple[int, list[str]]]
) -> None:
    """Raise ``ValueError`` if a column ``text`` would be read and another one holds proteins."""
    chosen = first_of(SEQUENCE_COLUMNS, columns)
    if chosen is None or key(columns[chosen]) != "text":
        return
    texts = [row[chosen] for _, row in rows if len(row) > chosen]
    others = [i for i in range(len(columns)) if i != chosen and all_proteins(rows, i)]
    if rows and len(others) == 1 and not any(map(may_be_protein, texts)):
        raise ValueError(
            f"{path}: the column 'text' holds no proteins: pass --sequence_column "
            f"{printable(columns[others[0]])[:30]}"
        )


def _checked(
    rows: Iterable[tuple[int, list[str]]],
    columns: Sequence[str],
    path: Path,
    divider: str,
    report: ReadReport,
) -> Iterator[tuple[int, list[str]]]:
    """Yield rows with one cell for each column.

    Blank ones at the end and headers of files that were joined to the first are left out.
    """
    blank: list[tuple[int, list[str]]] = []
    for number, row in rows:
        if [cell.strip() for cell in row] == columns:
            report.fix(REPEATED, f"{path.name}:{number}")
            continue
        while len(row) > len(columns) and not row[-1].strip():
            row.pop()
        if not divider:
            row += [""] * (len(columns) - len(row))  # Excel leaves out empty cells at the end
        if not any(cell.strip() for cell in row):
            blank.append((number, [""] * len(columns)))
            continue
        if len(row) != len(columns):
            if row[0].startswith("#"):
                report.fix(COMMENTS, f"{path.name}:{number}")
                continue
            quoted = DIVIDERS.get(divider, "divider")
            raise ValueError(
                f"{path}:{number}: {len(row)} cells for {len(columns)} columns: a cell with a "
                f"{quoted} in it needs double quotes"
            )
        yield from blank
        blank.clear()
        yield number, row


def parquet_proteins(
    path: Path, sequence_column: str | None, report: ReadReport, tag: str | None = None
) -> Iterator[tuple[int, str, str, Any, str]]:
    """Yield row number, name, tag, cell and kind of column of each row of a parquet file.

    The cell is text, or the ids ``(T,)`` of tokens.

    Raises:
        ValueError: the file is broken, or has no column of residues of the right type.
    """
    columns, batches = open_parquet(path)
    table = Table(str(path), columns, iter(()))
    data = table.sequence(sequence_column)
    name = table.find(None, NAME_COLUMNS, "")
    tags = None if tag is None else table.find(tag, (), "--layout")
    kind = key(columns[data])
    report.column = columns[data]
    beside = list(dict.fromkeys(i for i in (name, tags) if i not in (None, data)))
    wanted = [columns[i] for i in (data, *beside)]
    row = 0
    for batch in batches(wanted, typed=True):
        try:
            cells, texts = batch_cells(batch, kind)
        except Exception as error:  # of pyarrow, for a damaged page
            raise ValueError(f"{path}: row {row + 1}: broken parquet ({reason(error)})") from None
        empty = [""] * len(cells)
        held: dict[int | None, list[str]] = dict(zip(beside, texts, strict=True))
        titles, values = (held.get(i, empty) for i in (name, tags))
        for title, value, cell in zip(titles, values, cells, strict=True):
            row += 1
            yield row, title, value, cell, kind

"""Reads tables of proteins: CSV and TSV as programs save them, JSON lines, Excel and parquet.

A table's header is the first line with the name of a known column; titles above it are skipped.
Column names are compared without regard to case, blanks and ``#``. Cells may be divided by commas,
tabs or semicolons, whatever the file is called.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from src.common.cli import printable
from src.proteins.formats import (
    BOMB,
    BROKEN,
    EXCEL,
    FREE_EXPANSION_BYTES,
    JSON_LINES,
    MAX_EXPANSION,
    PARQUET,
    guarded_lines,
    opened,
    reason,
    refuse_bomb,
)
from src.proteins.layouts import PROTEIN_LETTERS
from src.proteins.parquet import batch_cells, open_parquet
from src.proteins.reading import ReadReport

MAX_ROW_BYTES = 1 << 22
MAX_ROW_TOKENS = 1 << 20
SAMPLE = 20
"""Rows at the beginning among which the header is looked for."""
SEQUENCE_COLUMNS = (
    "mutated_sequence",
    "sequence_aa",
    "sequence_alignment_aa",
    "aa_sequence",
    "amino_acid_sequence",
    "protein_sequence",
    "aa_seq",
    "sequence",
    "sequence.value",
    "seq",
    "text",
    "input_ids",
)
"""Columns of residues, the first that is there is read: ProteinGym's, antibodies' (AIRR and OAS,
whose ``sequence`` holds nucleotides), usual names, UniProt's JSON (``sequence.value``); ``text``
may be laid out, ``input_ids`` is tokens."""
NAME_COLUMNS = (
    "name", "id", "accession", "entry", "protein", "header", "sequence_id", "protein_id", "mutant",
    "primaryaccession",
)  # fmt: skip
MUTANT_COLUMNS = ("mutant", "mutation", "mutations", "hgvs_pro")
"""Columns of mutants: ProteinGym's, usual names, MaveDB's."""
OTHER_COLUMNS = ("mutant", "hgvs_pro", "dms_score")
DIVIDERS = {",": "comma", "\t": "tab", ";": "semicolon"}
LEAST_PROTEIN = 15
"""Letters from which a cell is taken for a protein by its look."""
_RESULTS = r'\s*(\{\s*"results"\s*:\s*)?\[\s*'
"""Beginning of an array, perhaps in an object as UniProt writes it."""
_STRAY_QUOTE = re.compile(r'(?:^|\t)"[^"\t]*"[^"\t\r\n]')
"""A cell that begins with a word in quotes."""
_FIRST, _NEXT = re.compile(_RESULTS), re.compile(r"\s*,?\s*")
TITLES = "lines above the header, skipped"
REPEATED = "header lines again, skipped"
ROW_NAMES = "row names without a column name"
JSON_SAMPLE = 1000
"""Objects at the beginning whose keys are the columns."""
LATE_KEYS = f"keys that the first {JSON_SAMPLE:,} objects lack, not read"
csv.field_size_limit(MAX_ROW_BYTES)


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
        found = self.find(wanted, SEQUENCE_COLUMNS, "--sequence_column")
        if found is None:
            raise no_sequence_column(self.columns, self.place, self.advice)
        return found


def key(name: str) -> str:
    """Return a column's name as names are compared."""
    return "_".join(str(name).strip().lstrip("#").strip().lower().split())


def find_column(
    columns: Sequence[str], wanted: str | None, usual: Sequence[str], flag: str, place: str
) -> int | None:
    """Return a column's place, see :meth:`Table.find`."""
    keys = [key(name) for name in columns]
    for name in (wanted,) if wanted else usual:
        exact = [i for i, column in enumerate(columns) if wanted and column == wanted]
        found = exact or [i for i, column in enumerate(keys) if column == key(name)]
        if len(found) > 1:
            raise ValueError(
                f"{place}: {len(found)} columns are named {printable(name)!r}: rename or drop all "
                "but one"
            )
        if found:
            return found[0]
    if wanted:
        raise ValueError(
            f"{place}: no column {printable(wanted)!r} among its columns ({_shown(columns)}): "
            f"pass {flag}"
        )
    return None


def no_sequence_column(columns: Sequence[str], place: str, advice: str = "") -> ValueError:
    """Return the error of a table without a known column of residues."""
    if not advice and not {*MUTANT_COLUMNS}.isdisjoint(map(key, columns)):
        return ValueError(
            f"{place}: holds mutants and no sequences: pass --wildtype to scripts/score.py"
        )
    return ValueError(
        f"{place}: no column 'sequence', 'text' or 'input_ids' among its columns "
        f"({_shown(columns)}): {advice or 'pass --sequence_column, the one with the residues'}"
    )


def _shown(columns: Sequence[str]) -> str:
    more = ", …" if len(columns) > 8 else ""
    return printable(", ".join(str(name)[:30] for name in columns[:8])) + more


def looks_like_protein(cell: str) -> bool:
    """Return whether a cell holds the letters of a protein, and enough of them."""
    letters = cell.strip().rstrip("*").upper()
    return len(letters) >= LEAST_PROTEIN and PROTEIN_LETTERS.issuperset(letters)


# Any table


def open_table(
    path: Path, kind: str, report: ReadReport, sequence_column: str | None = None
) -> Table:
    """Open a table and find its header.

    Args:
        path: the file.
        kind: from :func:`src.proteins.formats.kind_of`.
        report: counts titles above the header, and notes a table without one.
        sequence_column: a column that the header has, if the user names one.

    Raises:
        ValueError: the file is broken, or has no row.
    """
    divider = ""
    if kind == JSON_LINES:
        rows = _json_rows(path, report)
    elif kind == EXCEL:
        rows = _excel_rows(path, report, sequence_column)
    elif kind == PARQUET:
        rows = _parquet_rows(path)
    else:
        divider = _divider(path, sequence_column)
        rows = _delimited_rows(path, divider)
    first = _beginning(rows, lambda numbered: numbered[1][0].startswith("#"))
    if not first:
        raise ValueError(f"{path}: there is no protein in it")
    at = next((i for i, (_, row) in enumerate(first) if _recognised(row, sequence_column)), None)
    advice = ""
    if at is None:
        filled = [sum(map(bool, row)) for _, row in first]
        at = filled.index(max(filled))
        header = first[at][1]
        proteins = [i for i in range(len(header)) if _all_proteins(first[at + 1 :], i)]
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


def _beginning(rows: Iterator[Any], is_comment: Callable[[Any], bool]) -> list[Any]:
    """Take rows until :data:`SAMPLE` of them are no comments."""
    taken, counted = [], 0
    while counted < SAMPLE and (row := next(rows, None)) is not None:
        taken.append(row)
        counted += not is_comment(row)
    return taken


def _first_of(names: Sequence[str], columns: Sequence[str]) -> int | None:
    """Return the place of the first of some names that is a column, None without one."""
    keys = [key(column) for column in columns]
    return next((keys.index(key(name)) for name in names if key(name) in keys), None)


def _have_names(
    rows: Sequence[tuple[int, list[str]]], columns: Sequence[str], wanted: str | None
) -> bool:
    """Return whether rows begin with names that the header has no column for, as R writes them."""
    data = _first_of([wanted] if wanted else SEQUENCE_COLUMNS, columns)
    if len(rows) < 2 or data is None or {len(row) for _, row in rows} != {len(columns) + 1}:
        return False
    shifted = [row[data + 1] for _, row in rows]
    distinct = len({row[0] for _, row in rows}) == len(rows)
    return distinct and all(map(looks_like_protein, shifted))


def _refuse_other_text(
    path: Path, columns: Sequence[str], rows: Sequence[tuple[int, list[str]]]
) -> None:
    """Raise ``ValueError`` if a column ``text`` would be read and another one holds proteins."""
    chosen = _first_of(SEQUENCE_COLUMNS, columns)
    if chosen is None or key(columns[chosen]) != "text":
        return
    texts = [row[chosen] for _, row in rows if len(row) > chosen]
    others = [i for i in range(len(columns)) if i != chosen and _all_proteins(rows, i)]
    if rows and len(others) == 1 and not any(map(_may_be_protein, texts)):
        raise ValueError(
            f"{path}: the column 'text' holds no proteins: pass --sequence_column "
            f"{printable(columns[others[0]])[:30]}"
        )


def _may_be_protein(text: str) -> bool:
    return "<" in text or PROTEIN_LETTERS.issuperset("".join(text.split()))


def _recognised(row: Sequence[str], wanted: str | None) -> bool:
    known = {key(wanted)} if wanted else {*SEQUENCE_COLUMNS, *OTHER_COLUMNS}
    has_protein = any(cell.isupper() and looks_like_protein(cell) for cell in row)
    return not has_protein and any(key(cell) in known for cell in row)


def _all_proteins(rows: Sequence[tuple[int, list[str]]], column: int) -> bool:
    cells = [row[column] for _, row in rows if len(row) > column]
    return all(map(looks_like_protein, cells)) if cells else True


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
                continue
            quoted = DIVIDERS.get(divider, "divider")
            raise ValueError(
                f"{path}:{number}: {len(row)} cells for {len(columns)} columns: a cell with a "
                f"{quoted} in it needs double quotes"
            )
        yield from blank
        blank.clear()
        yield number, row


# Text


def _divider(path: Path, wanted: str | None) -> str:
    """Return what divides a table's cells: the first divider that gives a known header."""
    usual = "\t" if {".tsv", ".tab"} & {s.lower() for s in path.suffixes} else ","
    order = [usual, *(d for d in DIVIDERS if d != usual)]
    numbered = guarded_lines(path, ReadReport())
    lines = [text for _, text in _beginning(numbered, lambda line: line[1].startswith("#"))]
    if lines and lines[0].lower().startswith("sep=") and lines[0][4:5] in DIVIDERS:
        return lines[0][4]
    for single in (False, True):
        for divider in order:
            for line in lines:
                cells = line.replace('"', "").split(divider)
                if (single or len(cells) > 1) and _recognised(cells, wanted):
                    return divider
    return max(order, key=lambda d: sorted(line.count(d) for line in lines)[len(lines) // 2 :][:1])


def _delimited_rows(path: Path, divider: str) -> Iterator[tuple[int, list[str]]]:
    row_bytes = 0

    def lines() -> Iterator[str]:
        nonlocal row_bytes
        # CRLF is the line end of CSV (RFC 4180): not counted as fixed.
        for number, line in guarded_lines(path, ReadReport()):
            row_bytes += len(line)
            if row_bytes > MAX_ROW_BYTES:
                raise ValueError(f"{path}:{number}: a row of over {MAX_ROW_BYTES:,} bytes")
            yield "\n" if number == 1 and line.lower().startswith("sep=") else f"{line}\n"

    # Programs write tabs without quotes: there a quote is a character like others.
    sample = (line for _, line in islice(guarded_lines(path, ReadReport()), JSON_SAMPLE))
    plain = divider == "\t" and any(map(_STRAY_QUOTE.search, sample))
    quoting = csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
    reader = csv.reader(
        lines(), delimiter=divider, strict=True, quoting=quoting, skipinitialspace=True
    )
    try:
        for row in reader:
            row_bytes = 0
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(
            f"{path}:{reader.line_num}: broken CSV ({reason(error)}): a cell that begins with a "
            "double quote ends with one, and is quoted whole"
        ) from None


def _json_rows(path: Path, report: ReadReport) -> Iterator[tuple[int, list[str]]]:
    """Yield the columns, the keys of the first objects, then the rows of JSON lines or an array.

    An object in an object gives a column ``key.key`` for each of its keys.
    """

    def objects() -> Iterator[tuple[int, dict[str, Any]]]:
        with opened(path) as (stream, _, _):
            array = re.match(_RESULTS.encode(), stream.peek(64).removeprefix(b"\xef\xbb\xbf"))
        if array:
            yield from _streamed_objects(path)
            return
        begun = False
        for number, line in guarded_lines(path, ReadReport()):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not begun and line.strip() == "{":  # an object over several lines
                    yield from _streamed_objects(path, brackets=False)
                    return
                raise ValueError(f"{path}:{number}: broken JSON ({reason(error)})") from None
            if not isinstance(value, dict):
                raise ValueError(f"{path}:{number}: not a JSON object with a column for each key")
            begun = True
            yield number, value

    rows = ((number, _flat(row)) for number, row in objects())
    first = list(islice(rows, JSON_SAMPLE))
    columns = list(dict.fromkeys(name for _, row in first for name in row))
    if columns:
        yield 0, columns
    known = set(columns)
    for number, row in chain(first, rows):
        if later := row.keys() - known:
            report.notice(LATE_KEYS, f"{path.name}:{number}, {printable(min(later))!r}")
        yield number, [_text_of(row.get(name)) for name in columns]


def _streamed_objects(path: Path, brackets: bool = True) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSON array, or those that follow one another without its brackets.

    A text in the place of an object is a sequence.
    """
    head = _FIRST if brackets else _NEXT
    decoder, number, buffer, read, at = json.JSONDecoder(), 0, "", 0, 0
    with opened(path) as (stream, _, packed):
        text, more = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace"), "["
        while more:
            try:
                more = text.read(MAX_ROW_BYTES)
            except BROKEN as error:
                raise ValueError(f"{path}: broken or truncated archive ({reason(error)})") from None
            buffer, read, at = buffer[at:] + more, read + len(more), 0
            if packed:
                refuse_bomb(path, number + 1, read, packed())
            while True:
                start = (_NEXT if number else head).match(buffer, at).end()  # type: ignore[union-attr]
                if start == len(buffer):
                    break
                if brackets and buffer[start] == "]":
                    return
                place = f"{path}: object {number + 1}"
                try:
                    value, at = decoder.raw_decode(buffer, start)
                except (ValueError, RecursionError) as error:
                    if more and len(buffer) - start < MAX_ROW_BYTES:
                        break  # its end is to come
                    raise ValueError(f"{place}: broken JSON ({reason(error)})") from None
                if not isinstance(value, (dict, str)):
                    raise ValueError(f"{place}: not a JSON object with a column for each key")
                number += 1
                yield number, value if isinstance(value, dict) else {"sequence": value}
    if brackets:
        raise ValueError(f"{path}: the JSON array has no end: the file is cut short")


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the keys of an object in it as its own, ``key.key``."""
    flat = {}
    for name, value in row.items():
        inner = value if isinstance(value, dict) else {}
        flat |= {f"{name}.{k}": v for k, v in inner.items()} if inner else {name: value}
    return flat


def _text_of(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _excel_rows(
    path: Path, report: ReadReport, wanted: str | None
) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of an Excel file; formulas give the values last seen.

    They are those of the first sheet with a known column, or of the first one.
    """
    try:
        import openpyxl
    except ImportError:
        raise ValueError(
            f"{path}: Excel needs the package openpyxl: pip install openpyxl, or save the sheet as "
            "CSV UTF-8"
        ) from None
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _refuse_large_excel(path)
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
            sheets = book.worksheets
            known = (s for s in sheets if any(_recognised(r, wanted) for _, r in _cells(s, SAMPLE)))
            sheet = next(known, sheets[0])
            if len(sheets) > 1:
                report.note(f"of {len(sheets)} sheets this one: {printable(sheet.title)}")
            yield from _cells(sheet)
    except ValueError:
        raise
    except Exception as error:  # the package raises many kinds
        raise ValueError(f"{path}: broken Excel file ({reason(error)})") from None


def _cells(sheet: Any, most: int | None = None) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a sheet that are not blank, with their numbers, of the first ``most``."""
    sheet.reset_dimensions()
    for number, cells in enumerate(sheet.iter_rows(max_row=most, values_only=True), start=1):
        row = ["" if cell is None else str(cell) for cell in cells]
        if any(row):
            yield number, row


def _refuse_large_excel(path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > max(FREE_EXPANSION_BYTES, MAX_EXPANSION * path.stat().st_size):
        raise ValueError(f"{path}: unpacks to more than {MAX_EXPANSION} times its size: {BOMB}")


def _parquet_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the columns, then the rows of a parquet file as text."""
    names, batches = open_parquet(path)
    yield 0, names
    row = 0
    for batch in batches(names):
        for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            row += 1
            yield row, [_text_of(value) for value in values]


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


# Cells


def number_of(cell: str, place: str, decimal_comma: bool = False) -> float:
    """Return the number in a cell, NaN where it is empty or says that there is none.

    Args:
        cell: of a table.
        place: for the message.
        decimal_comma: read ``0,5`` as one half.

    Raises:
        ValueError: the cell holds something else, or an infinite number.
    """
    text = cell.strip()
    if is_missing(text):
        return float("nan")
    if decimal_comma and re.fullmatch(r"[+-]?\d*,\d+([eE][+-]?\d+)?", text):
        text = text.replace(",", ".")
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{place}: {cell[:30]!r} is not a number") from None
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{place}: {cell[:30]!r} is not finite")
    return value


MISSING = {
    *("", "-", "?", "na", "n/a", "nan", "none", "null", "nd", "n.d.", "tbd"),
    *("missing", "unknown", "not determined", "not available"),
}


def is_missing(cell: str) -> bool:
    """Return whether a cell says that there is no value: empty, ``NA``, ``#N/A`` and the like."""
    text = cell.strip()
    return text.lower() in MISSING or text.startswith("#")

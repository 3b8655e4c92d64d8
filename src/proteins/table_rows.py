"""Reads the rows of tables as they stand in a file: CSV and TSV, JSON, Excel, parquet."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from src.common.cli import printable
from src.proteins.columns import is_header
from src.proteins.formats import (
    BOMB,
    BROKEN,
    FREE_EXPANSION_BYTES,
    MAX_EXPANSION,
    guarded_lines,
    opened,
    reason,
    refuse_bomb,
)
from src.proteins.parquet import open_parquet
from src.proteins.reading import ReadReport

MAX_ROW_BYTES = 1 << 22
SAMPLE = 20
"""Rows at the beginning among which the header is looked for."""
DIVIDERS = {",": "comma", "\t": "tab", ";": "semicolon"}
_RESULTS = r'\s*(\{\s*"results"\s*:\s*)?\[\s*'
"""Beginning of an array, perhaps in an object as UniProt writes it."""
_STRAY_QUOTE = re.compile(r'(?:^|\t)"[^"\t]*"[^"\t\r\n]')
"""A cell that begins with a word in quotes."""
_FIRST, _NEXT = re.compile(_RESULTS), re.compile(r"\s*,?\s*")
JSON_SAMPLE = 1000
"""Objects at the beginning whose keys are the columns."""
LATE_KEYS = f"keys that the first {JSON_SAMPLE:,} objects lack, not read"
csv.field_size_limit(MAX_ROW_BYTES)


def beginning(rows: Iterator[Any], is_comment: Callable[[Any], bool]) -> list[Any]:
    """Take rows until :data:`SAMPLE` of them are no comments."""
    taken, counted = [], 0
    while counted < SAMPLE and (row := next(rows, None)) is not None:
        taken.append(row)
        counted += not is_comment(row)
    return taken


def divider_of(path: Path, wanted: str | None) -> str:
    """Return what divides a table's cells: the first divider that gives a known header."""
    usual = "\t" if {".tsv", ".tab"} & {s.lower() for s in path.suffixes} else ","
    order = [usual, *(d for d in DIVIDERS if d != usual)]
    numbered = guarded_lines(path, ReadReport())
    lines = [text for _, text in beginning(numbered, lambda line: line[1].startswith("#"))]
    if lines and lines[0].lower().startswith("sep=") and lines[0][4:5] in DIVIDERS:
        return lines[0][4]
    for single in (False, True):
        for divider in order:
            for line in lines:
                cells = line.replace('"', "").split(divider)
                if (single or len(cells) > 1) and is_header(cells, wanted):
                    return divider
    return max(order, key=lambda d: sorted(line.count(d) for line in lines)[len(lines) // 2 :][:1])


def delimited_rows(path: Path, divider: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the cells of each row of text that are divided so, with the row's last line."""
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


def json_rows(path: Path, report: ReadReport) -> Iterator[tuple[int, list[str]]]:
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


def excel_rows(
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
            known = (s for s in sheets if any(is_header(r, wanted) for _, r in _cells(s, SAMPLE)))
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


def parquet_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the columns, then the rows of a parquet file as text."""
    names, batches = open_parquet(path)
    yield 0, names
    row = 0
    for batch in batches(names):
        for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            row += 1
            yield row, [_text_of(value) for value in values]

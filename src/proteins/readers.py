"""Reads records of proteins from FASTA, text, tables and data sets on the hub.

A new format needs its name and its endings in :mod:`src.proteins.formats`, and a line in
:func:`file_records` that calls its reader, a generator of :class:`Record`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.common.cli import say
from src.common.hub_errors import hub_advice, hub_fault
from src.common.settings import BUNDLED_DATA
from src.proteins.columns import (
    NAME_COLUMNS,
    SEQUENCE_COLUMNS,
    is_missing,
    key,
    looks_like_protein,
)
from src.proteins.formats import (
    FASTA,
    LAID_OUT,
    PARQUET,
    TEXT,
    guarded_lines,
    kind_of,
    reason,
)
from src.proteins.layouts import END_OF_TEXT, PROTEIN_LETTERS
from src.proteins.reading import ReadReport
from src.proteins.tables import Table, open_table, parquet_proteins

__all__ = ["Record", "file_records", "guarded_lines", "hub_records", "kind_of"]

MAX_ROW_TOKENS = 1 << 20
MAX_RESIDUES = 100_000
"""Limit of a protein; the longest one known, titin, has about 35,000 residues."""
TOO_LONG = f"longer than {MAX_RESIDUES:,} characters: no protein is"
MARKERS = "end-of-text markers between proteins"
HEADER_WORDS = {*SEQUENCE_COLUMNS, "sequences", "protein", "proteins", "peptide", "peptides", "aa"}
HEADER = "a header line, skipped"
LINE_NUMBERS = "numbers beside the residues"
NAMES_BESIDE = "a name before the residues"
LABELS_BEHIND = "a label behind the residues, left out"
PIR = re.compile(r"[A-Z][A-Z0-9];(?=\S)")
"""Begins a header of PIR (NBRF), as Modeller writes it: ``>P1;NAME``. A title line follows, and
``*`` ends the residues."""
PIR_TITLES = "title lines of PIR, skipped"
HUB_PAUSES = (1, 4, 16, 60, 120)
"""Seconds before each new attempt to go on with a stream that broke."""


class Record(NamedTuple):
    """One protein of a source before cleaning.

    Attributes:
        name: the first word of a header, or a cell.
        place: its file and line, for messages.
        text: holds the residues.
        ids: tokens, where the source holds these instead of text.
        fault: why the protein cannot be used, where the reader knows.
        title: the whole header.
        tag: the cell of the column that the layout asks for.
    """

    name: str
    place: str
    text: str = ""
    ids: np.ndarray | None = None
    fault: str = ""
    title: str = ""
    tag: str = ""


def file_records(
    path: Path, report: ReadReport, sequence_column: str | None = None, tag: str | None = None
) -> Iterator[Record]:
    """Yield the records of a file, and report what the reader mends or skips.

    The ``sequence_column`` of a table is by default the first of the usual ones; records hold the
    cells of its column ``tag``.

    Raises:
        ValueError: the file is refused, as :mod:`src.proteins.sources` lists; the message names the
            file and the line or row.
    """
    kind = kind_of(path)
    if kind in (FASTA, LAID_OUT, TEXT):
        if sequence_column:
            raise ValueError(f"--sequence_column {sequence_column}: {path} has no columns")
        reader = {FASTA: fasta_records, LAID_OUT: laid_out_records, TEXT: text_records}[kind]
        return reader(path, report)
    if kind == PARQUET:
        return _parquet_records(path, report, sequence_column, tag)
    table = open_table(path, kind, report, sequence_column)
    return table_records(path, table, report, sequence_column, tag)


def without_numbers(line: str) -> str:
    """Return a line's residues without GenBank's number before or EMBL's and Clustal's behind them.

    Empty where there is no such number, or nothing beside numbers.
    """
    words = line.split()
    kept = words[1:] if words and words[0].isdecimal() else words
    kept = kept[:-1] if kept and kept[-1].isdecimal() else kept
    return "".join(kept) if len(kept) < len(words) else ""


def fasta_records(path: Path, report: ReadReport) -> Iterator[Record]:
    """Yield the entries of a FASTA file; the first word of a header is the name."""
    title, place, size = "", 0, 0
    pir: re.Match[str] | None = None
    parts: list[str] = []

    def entries() -> Iterator[Record]:
        words = title.split(None, 1)
        name = words[0] if words else f"line_{place}"
        where = f"{path.name}:{place}"
        if pir and len(parts) > 1 and parts[-1].endswith("*"):
            report.fix(PIR_TITLES, where)
            name = name[pir.end() :]
            del parts[0]
        text = "".join(parts)
        if size > MAX_RESIDUES:
            yield Record(name, where, fault=TOO_LONG, title=title)
        elif END_OF_TEXT in text:
            yield from pieces(text, name, where, report, title)
        else:
            yield Record(name, where, text, title=title)

    for number, line in guarded_lines(path, report, content=True):
        if line.lstrip().startswith(">"):
            line = line.lstrip()
            if place:
                yield from entries()
            title, place, size = line[1:].strip(), number, 0
            pir = PIR.match(title)
            parts.clear()
        elif not place:
            if line.strip():
                raise ValueError(
                    f"{path}:{number}: text before the first '>' header: is this FASTA? Plain text "
                    "with one protein a line is named .txt"
                )
        elif pir and not parts:
            parts.append(line)
        elif line:
            if not line.isalpha() and (bare := without_numbers(line)):
                report.fix(LINE_NUMBERS, f"{path.name}:{number}")
                line = bare
            size += len(line)
            if size <= MAX_RESIDUES:
                parts.append(line)
    if place:
        yield from entries()


def laid_out_records(path: Path, report: ReadReport) -> Iterator[Record]:
    """Yield the proteins of a text with end-of-text markers between them, as ProtGPT2 learnt."""
    parts: list[str] = []
    size, place = 0, 0

    def record() -> Iterator[Record]:
        where = f"{path.name}:{place}"
        if size > MAX_RESIDUES:
            yield Record(f"line_{place}", where, fault=TOO_LONG)
        elif "".join(parts):
            yield Record(f"line_{place}", where, "".join(parts))

    for number, line in guarded_lines(path, report, content=True):
        for index, piece in enumerate(line.split(END_OF_TEXT)):
            if index:
                yield from record()
                parts.clear()
                size = 0
            piece = piece.strip()
            if piece:
                place = place if parts or size else number
                size += len(piece)
                if size <= MAX_RESIDUES:
                    parts.append(piece)
    yield from record()


def text_records(path: Path, report: ReadReport) -> Iterator[Record]:
    """Yield the lines of a plain text file, one protein each; blank lines are skipped.

    A line may begin with a name, and residues may stand in blocks of ten. A first line like
    ``Sequence`` or ``name seq`` is a header.

    Raises:
        ValueError: a line holds several words of which none is known to be the residues.
    """
    header = True
    for number, line in guarded_lines(path, report, content=True):
        if not line.strip():
            continue
        name, place = f"line_{number}", f"{path.name}:{number}"
        if len(line) > MAX_RESIDUES:
            yield Record(name, place, fault=TOO_LONG)
            continue
        words = line.split()
        begins, header = header, False
        if begins and len(words) <= 2 and words[-1].lower() in HEADER_WORDS:
            report.fix(HEADER, place)
            continue
        if len(words) > 1 and not _are_blocks(words):
            at = _which_is_residues(words)
            if at is None:
                raise ValueError(
                    f"{path}:{number}: {len(words)} words in a line: give one protein a line, "
                    "FASTA, or a table with a header (name, sequence)"
                )
            report.fix(NAMES_BESIDE if at else LABELS_BEHIND, place)
            name, line = words if at else (name, words[0])
        yield from pieces(line, name, place, report)


def _which_is_residues(words: Sequence[str]) -> int | None:
    """Return which of two words is a protein, beside its name or label; None where both may be."""
    if len(words) != 2:
        return None
    possible = [PROTEIN_LETTERS.issuperset(word.upper().rstrip("*")) for word in words]
    capital = [word.isupper() and may for word, may in zip(words, possible, strict=True)]
    long = [looks_like_protein(word) for word in words]
    if all(long):
        return None
    for signs in (long, capital, possible):
        if sum(signs) == 1:
            return signs.index(True)
    return 1 if all(possible) and len(words[0]) <= len(words[1]) else None


def _are_blocks(words: Sequence[str]) -> bool:
    """Return whether words are residues in blocks of equal length, the last one perhaps shorter."""
    width = len(words[0])
    return (
        {len(word) for word in words[:-1]} == {width}
        and len(words[-1]) <= width
        and (len(words) > 2 or width == 10)
        and all(word.isalpha() for word in words)
        and len({word.isupper() for word in words}) == 1
    )


def table_records(
    path: Path,
    table: Table,
    report: ReadReport,
    sequence_column: str | None = None,
    tag: str | None = None,
) -> Iterator[Record]:
    """Yield the rows of a table with a column of residues."""
    data = table.sequence(sequence_column)
    name = table.find(None, NAME_COLUMNS, "")
    tags = None if tag is None else table.find(tag, (), "--layout")
    column = table.columns[data]
    if key(column) == "input_ids":
        raise ValueError(f"{path}: tokens are read from parquet alone: use parquet")
    report.column = column
    for number, row in table.rows:
        place = f"{path.name}:{number}"
        own = f"row_{number}" if name is None or name == data else row[name]
        yield from cell_records(row[data], own, place, report, "" if tags is None else row[tags])


def _parquet_records(
    path: Path, report: ReadReport, sequence_column: str | None, tag: str | None
) -> Iterator[Record]:
    for row, title, value, cell, kind in parquet_proteins(path, sequence_column, report, tag):
        place, name = f"{path.name} row {row}", title or f"row_{row}"
        if kind == "input_ids":
            if len(cell) > MAX_ROW_TOKENS:
                raise ValueError(f"{path}: row {row}: over {MAX_ROW_TOKENS:,} tokens")
            yield Record(name, place, ids=cell)
        else:
            yield from cell_records(cell, name, place, report, value)


def cell_records(
    cell: str, name: str, place: str, report: ReadReport, tag: str = ""
) -> Iterator[Record]:
    """Yield the proteins in a cell of a table; a laid-out text may hold several."""
    for record in pieces("" if is_missing(cell) else cell, name, place, report):
        yield record._replace(tag=tag_of_cell(tag)) if tag else record


def tag_of_cell(cell: str) -> str:
    """Return a cell's first value, in one word; empty where it says that there is none."""
    return "" if is_missing(cell) else "_".join(re.split("[;,|]", cell.strip())[0].split())


def pieces(
    text: str, name: str, place: str, report: ReadReport, title: str = ""
) -> Iterator[Record]:
    """Yield the proteins of a text that may have end-of-text markers."""
    parts = [text]
    if END_OF_TEXT in text:
        # Line breaks belong to the layout and are not counted as fixed.
        parts = ["".join(p.split()) for p in text.split(END_OF_TEXT) if p.strip()] or [""]
        if len(parts) > 1:
            report.fix(MARKERS, place)
    for number, piece in enumerate(parts, start=1):
        own = name if len(parts) == 1 else f"{name}_{number}"
        if len(piece) > MAX_RESIDUES:
            yield Record(own, place, fault=TOO_LONG, title=title)
        else:
            yield Record(own, place, piece, title=title)


# The hub


def hub_records(
    source: str,
    split: str,
    report: ReadReport,
    sequence_column: str | None = None,
    tag: str | None = None,
) -> Iterator[Record]:
    """Yield the rows of a data set on the hub, as a stream that is taken up again when it breaks.

    Raises:
        ValueError: the package ``datasets`` or the network is missing, or the stream keeps
            breaking.
    """
    try:
        from datasets import load_dataset

        rows = load_dataset(source, split=split, streaming=True)
        stream = iter(rows)
        first = next(stream, None)
    except Exception as error:  # the client may raise any error
        raise ValueError(hub_problem(source, error)) from None
    if first is None:
        raise ValueError(f"{source}: the part {split!r} on the hub is empty")
    keys = list(first)
    table = Table(f"{source} ({split})", keys, iter(()))
    data, title = table.sequence(sequence_column), table.find(None, NAME_COLUMNS, "")
    tags = None if tag is None else table.find(tag, (), "--layout")
    kind = key(keys[data])
    report.column = keys[data]
    for number, row in enumerate(_steady(rows, chain([first], stream), f"{source} {split}"), 1):
        place = f"{source} {split} row {number}"
        name = title is not None and str(row[keys[title]] or "") or f"row_{number}"
        cell = row[keys[data]]
        if kind == "input_ids":
            if len(cell or ()) > MAX_ROW_TOKENS:
                raise ValueError(f"{place}: over {MAX_ROW_TOKENS:,} tokens")
            yield Record(name, place, ids=np.asarray(cell or (), dtype=np.int64))
        else:
            value = "" if tags is None else str(row[keys[tags]] or "")
            yield from cell_records(str(cell or ""), name, place, report, value)


def _steady(rows: Any, stream: Iterator[Any], place: str) -> Iterator[Any]:
    """Yield the rows of a data set once each, in order; a broken stream goes on at its row.

    Raises:
        ValueError: no row came after the last pause of ``HUB_PAUSES``.
    """
    done = attempts = 0
    while True:
        try:
            for row in stream:
                done, attempts = done + 1, 0
                yield row
            return
        except Exception as error:  # the client may raise any error
            if attempts == len(HUB_PAUSES):
                raise ValueError(
                    f"{place} row {done + 1}: the stream broke {attempts + 1} times "
                    f"({reason(error)}): try again later, or download the files"
                ) from None
            pause = HUB_PAUSES[attempts]
            attempts += 1
            say(
                f"{place} row {done + 1}: the stream broke ({reason(error)}): "
                f"going on at this row in {pause} s"
            )
            time.sleep(pause)
            stream = iter(rows.skip(done))


def hub_problem(source: str, error: Exception) -> str:
    """Return why a data set cannot be read from the hub and what to pass instead."""
    other = f"download its files, or pass --data FILE or --data {BUNDLED_DATA}"
    if isinstance(error, ImportError):
        return (
            f"{source}: the package 'datasets' is not installed: pip install datasets; or {other}"
        )
    why = hub_advice(hub_fault(error)[0], "data set", source)
    why = why or f"the hub does not give it ({reason(error)})"
    return f"{source}: no such file or directory here; {why}; or {other}"

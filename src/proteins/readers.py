"""Reads records of proteins from FASTA, text, CSV, TSV and parquet files and from the hub."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.common.cli import one_line, printable
from src.common.settings import BUNDLED_DATA
from src.proteins.layouts import END_OF_TEXT, residues_of
from src.proteins.report import ReadReport

MAX_LINE_BYTES = 1 << 20
MAX_RESIDUES = 100_000
"""Limit of a protein; the longest one known, titin, has about 35,000 residues."""
MAX_ROW_TOKENS = 1 << 20
MAX_ROW_BYTES = 1 << 22
ROWS_TOGETHER = 512
MAX_EXPANSION = 200
"""Compression shrinks proteins two- to fivefold; larger factors mean a decompression bomb."""
FREE_EXPANSION_BYTES = 1 << 24
LINES_A_CHECK = 1024
BOMB = "refused as a decompression bomb"

FASTA, TEXT, CSV, TSV, PARQUET = "FASTA", "text", "CSV", "TSV", "parquet"
SUFFIXES = {
    ".fasta": FASTA,
    ".fa": FASTA,
    ".faa": FASTA,
    ".fas": FASTA,
    ".txt": TEXT,
    ".seq": TEXT,
    ".csv": CSV,
    ".tsv": TSV,
    ".parquet": PARQUET,
    ".pq": PARQUET,
}
DIVIDERS = {",": "comma", "\t": "tab", ";": "semicolon"}
PACKED_BY = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
NAME_COLUMNS = ("name", "id", "accession", "entry", "protein", "header")

CRLF = "CRLF line ends"


class Record(NamedTuple):
    """One protein of a source before cleaning; ``place`` is its file and line, for messages."""

    name: str
    place: str
    text: str = ""
    ids: np.ndarray | None = None


def kind_of(path: Path) -> str:
    """Return the format of a file, by its suffix or else by its first bytes.

    Raises:
        ValueError: the file is empty, packed by another program than gzip, or of unknown format.
    """
    with path.open("rb") as handle:
        head = handle.read(512)
    if not head:
        raise ValueError(f"{path}: the file is empty: give one with proteins")
    for magic, packer in PACKED_BY.items():
        if head.startswith(magic):
            raise ValueError(f"{path}: is packed by {packer}: unpack it, or pack it with gzip")
    suffixes = [s.lower() for s in path.suffixes]
    packed = head.startswith(b"\x1f\x8b")
    if suffixes[-1:] == [".gz"]:
        if not packed:
            raise ValueError(f"{path}: is named .gz but is not gzip: rename or pack it")
        suffixes.pop()
    kind = SUFFIXES.get(suffixes[-1]) if suffixes else None
    if head.startswith(b"PAR1") or kind == PARQUET:
        return PARQUET
    if kind in (None, TEXT):
        first = next((line for _, line in guarded_lines(path, ReadReport()) if line.strip()), "")
        if first.startswith(">"):
            return FASTA
    if kind is None:
        raise ValueError(
            f"{path}: what it holds is not clear: name it .fasta, .txt, .csv, .parquet"
        )
    return kind


# Reading lines


def guarded_lines(path: Path, report: ReadReport) -> Iterator[tuple[int, str]]:
    """Yield a text file's lines, numbered from 1 and without line ends, gzipped or not.

    Args:
        path: the file.
        report: counts CRLF line ends.

    Yields:
        Number and text of each line; bytes that are no UTF-8 become replacement characters.

    Raises:
        ValueError: a NUL byte, a carriage return inside a line, a line over ``MAX_LINE_BYTES``,
            broken gzip, or gzip that unpacks to over ``MAX_EXPANSION`` times its size.
    """
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream: Any = raw
        if packed:
            stream = io.BufferedReader(gzip.GzipFile(fileobj=raw, mode="rb"), 1 << 18)  # type: ignore[arg-type]
        number = unpacked = 0
        while True:
            number += 1
            try:
                line: bytes = stream.readline(MAX_LINE_BYTES + 1)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(
                    f"{path}:{number}: broken or truncated gzip ({_reason(error)}): copy or "
                    "download the file again"
                ) from None
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(
                    f"{path}:{number}: the line is longer than {MAX_LINE_BYTES:,} bytes: is this "
                    "a file of proteins?"
                )
            unpacked += len(line)
            if (
                packed
                and number % LINES_A_CHECK == 0
                and unpacked > max(FREE_EXPANSION_BYTES, MAX_EXPANSION * raw.tell())
            ):
                raise ValueError(
                    f"{path}:{number}: unpacks to more than {MAX_EXPANSION} times its size: {BOMB}"
                )
            yield number, "" if line == b"\n" else _text_of_line(path, number, line, report)


def _text_of_line(path: Path, number: int, line: bytes, report: ReadReport) -> str:
    if b"\0" in line:
        raise ValueError(
            f"{path}:{number}: a NUL byte: the file is binary, UTF-16 or damaged; save it as "
            "plain text"
        )
    if line.endswith(b"\n"):
        line = line[:-1]
    if line.endswith(b"\r"):
        line = line[:-1]
        report.fix(CRLF, f"{path.name}:{number}")
    if b"\r" in line:
        raise ValueError(
            f"{path}:{number}: a carriage return inside the line: convert the line ends (dos2unix, "
            "or mac2unix)"
        )
    if number == 1 and line.startswith(b"\xef\xbb\xbf"):
        line = line[3:]
    return line.decode("utf-8", errors="replace")


def _reason(error: BaseException) -> str:
    return one_line(error)[:150]


# Reading records


def file_records(path: Path, report: ReadReport) -> Iterator[Record]:
    """Yield the records of a file.

    Raises:
        ValueError: the file is refused, as :mod:`src.proteins.sources` lists; the message names the
            file and the line or row.
    """
    kind = kind_of(path)
    if kind == FASTA:
        return fasta_records(path, report)
    if kind == TEXT:
        return text_records(path, report)
    if kind == PARQUET:
        return parquet_records(path)
    return csv_records(path, "," if kind == CSV else "\t")


def fasta_records(path: Path, report: ReadReport) -> Iterator[Record]:
    """Yield the entries of a FASTA file; the first word of a header is the name."""
    name, place, size = "", 0, 0
    parts: list[str] = []
    for number, line in guarded_lines(path, report):
        if line.startswith(">"):
            if place:
                yield Record(name, f"{path.name}:{place}", "".join(parts))
            words = line[1:].split(None, 1)
            name, place, size = words[0] if words else f"line_{number}", number, 0
            parts.clear()
        elif not place:
            if line.strip():
                raise ValueError(
                    f"{path}:{number}: text before the first '>' header: is this FASTA? Plain text "
                    "with one protein a line is named .txt"
                )
        elif line:
            size += len(line)
            if size > MAX_RESIDUES:
                _refuse_long(path, place)
            parts.append(line)
    if place:
        yield Record(name, f"{path.name}:{place}", "".join(parts))


def text_records(path: Path, report: ReadReport) -> Iterator[Record]:
    """Yield the lines of a plain text file, one protein each; blank lines are skipped."""
    for number, line in guarded_lines(path, report):
        if line.strip():
            if len(line) > MAX_RESIDUES:
                _refuse_long(path, number)
            yield Record(f"line_{number}", f"{path.name}:{number}", line)


def _refuse_long(path: Path | str, place: int | str) -> None:
    raise ValueError(
        f"{path}:{place}: the protein is longer than {MAX_RESIDUES:,} characters: no protein is; "
        "take it out or cut it"
    )


def csv_records(path: Path, delimiter: str) -> Iterator[Record]:
    """Yield the rows of a CSV or TSV file with a header line."""
    row_bytes = 0

    def lines() -> Iterator[str]:
        nonlocal row_bytes
        # CRLF is the line end of CSV (RFC 4180): not counted as fixed.
        for number, line in guarded_lines(path, ReadReport()):
            row_bytes += len(line)
            if row_bytes > MAX_ROW_BYTES:
                raise ValueError(f"{path}:{number}: a row of over {MAX_ROW_BYTES:,} bytes")
            yield f"{line}\n"

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: list[str] = []
    columns: _Columns | None = None
    try:
        for row in reader:
            row_bytes = 0
            if not row:
                continue
            if columns is None:
                header = row
                columns = _Columns.of(header, str(path), other_divider(header, delimiter))
                if columns.kind == "input_ids":
                    raise ValueError(f"{path}:1: tokens in CSV are not read: use parquet")
                continue
            require_cells(row, header, f"{path}:{reader.line_num}", delimiter)
            place = f"{path.name}:{reader.line_num}"
            name = f"row_{reader.line_num}" if columns.name is None else row[columns.name]
            yield from _text_cell(row[columns.data], name, place, columns.kind, str(path))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: broken CSV ({_reason(error)})") from None


def require_cells(row: Sequence[str], header: Sequence[str], place: str, delimiter: str) -> None:
    """Raise ``ValueError`` if a row has more or fewer cells than the header."""
    if len(row) != len(header):
        raise ValueError(
            f"{place}: {len(row)} cells for {len(header)} columns: a cell with a "
            f"{DIVIDERS[delimiter]} in it needs double quotes"
        )


def require_once(header: Sequence[str], column: str, place: Path | str) -> None:
    """Raise ``ValueError`` if a column that is read exists more than once."""
    if header.count(column) > 1:
        raise ValueError(
            f"{place}: {header.count(column)} columns are named {printable(column)!r}: rename or "
            "drop all but one"
        )


def other_divider(header: Sequence[str], delimiter: str) -> str:
    """Return advice if a header line uses another delimiter, else an empty text."""
    for divider, name in DIVIDERS.items():
        if divider != delimiter and len(header) == 1 and divider in header[0]:
            advice = {",": "name it .csv", "\t": "name it .tsv"}.get(divider, "put commas there")
            return f": its cells are divided by a {name}, not a {DIVIDERS[delimiter]}: {advice}"
    return ""


def parquet_records(path: Path) -> Iterator[Record]:
    """Yield the rows of a parquet file, ``ROWS_TOGETHER`` in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    broken = (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError, LookupError)

    def problem(error: BaseException) -> ValueError:
        return ValueError(f"{path}: row {row + 1}: broken parquet ({_reason(error)})")

    row = 0
    try:
        file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        schema = file.schema_arrow
    except broken as error:
        raise problem(error) from None
    with file:
        columns = _Columns.of(schema.names, str(path))
        wanted = [columns.data] + ([] if columns.name is None else [columns.name])
        _require_type(pa, schema.field(columns.data).type, columns.kind, path)
        try:
            _require_bounded_expansion(file.metadata, path)
            names = [schema.names[i] for i in wanted]
            batches = file.iter_batches(batch_size=ROWS_TOGETHER, columns=names)
        except broken as error:
            raise problem(error) from None
        while True:
            try:
                batch = next(batches, None)
                if batch is None:
                    return
                cells, titles = _batch_cells(batch, names, columns.kind)
            except broken as error:
                raise problem(error) from None
            for cell, title in zip(cells, titles, strict=True):
                row += 1
                place, name = f"{path.name} row {row}", title or f"row_{row}"
                if columns.kind == "input_ids":
                    if len(cell) > MAX_ROW_TOKENS:
                        raise ValueError(f"{path}: row {row}: over {MAX_ROW_TOKENS:,} tokens")
                    yield Record(name, place, ids=cell)
                else:
                    yield from _text_cell(cell, name, place, columns.kind, f"{path}: row {row}")


def _require_bounded_expansion(metadata: Any, path: Path) -> None:
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    unpacked = max((group.total_byte_size for group in groups), default=0)
    if unpacked > FREE_EXPANSION_BYTES and unpacked > MAX_EXPANSION * path.stat().st_size:
        raise ValueError(f"unpacks to more than {MAX_EXPANSION} times its size: {BOMB}")


def _batch_cells(batch: Any, names: Sequence[str], kind: str) -> tuple[list, list]:
    column = batch.column(names[0])
    if kind == "input_ids":
        values = column.flatten()
        if values.null_count:
            raise ValueError("a token is null")
        lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        cells = np.split(values.to_numpy(zero_copy_only=False), np.cumsum(lengths)[:-1])
    else:
        cells = [cell or "" for cell in column.to_pylist()]
    if len(names) == 1:
        return cells, [None] * len(cells)
    return cells, ["" if v is None else str(v) for v in batch.column(names[1]).to_pylist()]


def _require_type(pa: Any, actual: Any, kind: str, path: Path) -> None:
    types = pa.types
    if kind == "input_ids":
        is_list = types.is_list(actual) or types.is_large_list(actual)
        right = (is_list or types.is_fixed_size_list(actual)) and types.is_integer(
            actual.value_type
        )
        wanted = "lists of whole numbers"
    else:
        text = actual.value_type if types.is_dictionary(actual) else actual
        right = types.is_string(text) or types.is_large_string(text) or types.is_string_view(text)
        wanted = "text"
    if not right:
        raise ValueError(f"{path}: the column {kind} holds {actual}, not {wanted}")


def hub_records(source: str, split: str) -> Iterator[Record]:
    """Yield the rows of a data set on the hub, as a stream.

    Raises:
        ValueError: the package ``datasets`` or the network is missing, or the stream breaks.
    """
    try:
        from datasets import load_dataset

        rows = iter(load_dataset(source, split=split, streaming=True))
        first = next(rows, None)
    except Exception as error:  # the client may raise any error
        raise ValueError(hub_problem(source, error)) from None
    if first is None:
        raise ValueError(f"{source}: the part {split!r} on the hub is empty")
    keys = list(first)
    columns = _Columns.of(keys, f"{source} ({split})")
    number, row = 0, first
    while row is not None:
        number += 1
        place = f"{source} {split} row {number}"
        name = f"row_{number}" if columns.name is None else str(row[keys[columns.name]])
        cell = row[keys[columns.data]]
        if columns.kind == "input_ids":
            if len(cell or ()) > MAX_ROW_TOKENS:
                raise ValueError(f"{place}: over {MAX_ROW_TOKENS:,} tokens")
            yield Record(name, place, ids=np.asarray(cell or (), dtype=np.int64))
        else:
            yield from _text_cell(str(cell or ""), name, place, columns.kind, place)
        try:
            row = next(rows, None)
        except Exception as error:
            raise ValueError(f"{place}: the stream broke ({_reason(error)}): try again") from None


def hub_problem(source: str, error: Exception) -> str:
    """Return why a data set cannot be read from the hub and what to pass instead."""
    if isinstance(error, ImportError):
        why = "the package 'datasets' is not installed"
    else:
        why = f"no network, or no such data set: {type(error).__name__}"
    return (
        f"{source}: no such file or directory here, and it cannot be had from the hub ({why}): "
        f"pass --data FILE or --data {BUNDLED_DATA}"
    )


class _Columns(NamedTuple):
    """The columns of a table that hold the protein and its name."""

    kind: str
    data: int
    name: int | None

    @classmethod
    def of(cls, names: Sequence[str], place: str, advice: str = "") -> _Columns:
        lower = [name.strip().lower() for name in names]
        kind = next((k for k in ("sequence", "text", "input_ids") if k in lower), None)
        if kind is None:
            shown = printable(", ".join(str(name)[:30] for name in names[:8]))
            raise ValueError(
                f"{place}: no column 'sequence', 'text' or 'input_ids' among its columns ({shown})"
                f"{advice or ': rename the one with the residues'}"
            )
        title = next((k for k in NAME_COLUMNS if k in lower), None)
        for column in filter(None, (kind, title)):
            require_once(lower, column, place)
        return cls(kind, lower.index(kind), None if title is None else lower.index(title))


def _text_cell(text: str, name: str, place: str, kind: str, where: str) -> Iterator[Record]:
    """Yield the proteins in a cell; a laid-out text may hold several."""
    if kind == "text" and END_OF_TEXT in text:
        pieces = [piece for piece in text.split(END_OF_TEXT) if piece.strip()] or [""]
    else:
        pieces = [text]
    for number, piece in enumerate(pieces, start=1):
        if kind == "text":
            # Line breaks belong to the layout and are not counted as fixed.
            piece = _laid_out(piece)
        if len(piece) > MAX_RESIDUES:
            _refuse_long(where, number)
        yield Record(name if len(pieces) == 1 else f"{name}_{number}", place, piece)


def _laid_out(text: str) -> str:
    try:
        return residues_of(text)
    except ValueError:
        return "".join(text.splitlines())

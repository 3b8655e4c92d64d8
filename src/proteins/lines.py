"""Recognises the format of a file and reads the lines of text files safely."""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from src.common.cli import one_line
from src.proteins.layouts import END_OF_TEXT
from src.proteins.report import ReadReport

MAX_LINE_BYTES = 1 << 20
MAX_EXPANSION = 200
"""Compression shrinks proteins two- to fivefold; larger factors mean a decompression bomb."""
FREE_EXPANSION_BYTES = 1 << 24
LINES_A_CHECK = 1024
BOMB = "refused as a decompression bomb"
FIRST_LINES = 1000
"""Lines among which the first with content must be."""

FASTA, TEXT, LAID_OUT, TABLE = "FASTA", "text", "laid-out text", "table"
JSON_LINES, EXCEL, PARQUET = "JSON lines", "Excel", "parquet"
SUFFIXES = {
    **dict.fromkeys((".fasta", ".fa", ".faa", ".fas", ".a3m", ".a2m", ".afa", ".mfa"), FASTA),
    **dict.fromkeys((".txt", ".seq"), TEXT),
    **dict.fromkeys((".csv", ".tsv", ".tab"), TABLE),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), JSON_LINES),
    **dict.fromkeys((".xlsx", ".xlsm"), EXCEL),
    **dict.fromkeys((".parquet", ".pq"), PARQUET),
}
TABLES = (TABLE, JSON_LINES, EXCEL, PARQUET)
PACKED_BY = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer, not the file: fetch that with git lfs pull",
    b"\xd0\xcf\x11\xe0": "a table of an old Excel: save it as .xlsx or CSV",
    b"# STOCKHOLM": "a Stockholm alignment: convert it to FASTA (esl-reformat fasta)",
    b"CLUSTAL": "a Clustal alignment: save it as FASTA",
    b"LOCUS ": "a GenBank record: save its proteins as FASTA",
    **dict.fromkeys((b"<!", b"<html", b"<?xml"), "a web page or XML: download the file itself"),
    b"%PDF": "a PDF: export the proteins as FASTA",
}
COMPLEX = re.compile(rb"#\d+,[\d,]+\s")
"""First line of ColabFold's alignment of a complex: the chains' lengths."""
COMMENT_SIGNS = ("#", ";")
CRLF = "CRLF line ends"
UTF_16 = "UTF-16 text"
COMMENTS = "comment lines, skipped"


def kind_of(path: Path) -> str:
    """Return the format of a file, by its suffix and its first bytes and lines.

    Raises:
        ValueError: the file is empty, an archive, packed by another program than gzip, or of a
            format that is not read; the message says what to do.
    """
    head, packed = _head(path)
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        if not packed:
            raise ValueError(f"{path}: is named .gz but is not gzip: rename or pack it")
        suffixes.pop()
    kind = SUFFIXES.get(suffixes[-1]) if suffixes else None
    for magic, packer in PACKED_BY.items():
        if head.startswith(magic) and not (packer == "zip" and kind == EXCEL):
            raise ValueError(f"{path}: is packed by {packer}: unpack it, or pack it with gzip")
    if head[257:262] == b"ustar":
        raise ValueError(
            f"{path}: is a tar archive: unpack it (tar xf {path.name}) and give the files in it; "
            "--data takes several"
        )
    for sign, what in FOREIGN.items():
        if head.lstrip().startswith(sign):
            raise ValueError(f"{path}: is {what}")
    if COMPLEX.match(head):
        raise ValueError(f"{path}: is an alignment of joined chains: give that of each chain")
    if head.startswith(b"PAR1") or kind == PARQUET:
        return PARQUET
    if kind == EXCEL:
        return kind
    lines = islice(guarded_lines(path, ReadReport(), content=True), FIRST_LINES)
    full = (line.strip() for _, line in lines if line.strip())
    first = next(full, "")
    laid_out = kind in (None, TEXT, FASTA) and not first.startswith(">")
    if first.startswith(">"):
        return FASTA
    if laid_out and (END_OF_TEXT in first or any(END_OF_TEXT in line for line in full)):
        return LAID_OUT
    if kind in (None, TEXT) and first.startswith("{"):
        return JSON_LINES
    if kind == TEXT and any(sign in first for sign in "\t,;"):
        return TABLE
    if kind is None:
        raise ValueError(
            f"{path}: what it holds is not clear: name it .fasta, .txt, .csv, .jsonl or .parquet"
        )
    return kind


def _head(path: Path) -> tuple[bytes, bool]:
    """Return a file's first 512 bytes, unpacked if it is gzip, and whether it is."""
    with path.open("rb") as handle:
        head = handle.read(512)
    if not head:
        raise ValueError(f"{path}: the file is empty: give one with proteins")
    packed = head.startswith(b"\x1f\x8b")
    if packed:
        try:
            with gzip.open(path) as unpacked:
                head = unpacked.read(512)
        except (OSError, EOFError, zlib.error):
            head = b""  # the reader meets the same fault and names its line
    return head, packed


def is_comment(line: str) -> bool:
    """Return whether a line is a comment: it begins with ``#`` or ``;``."""
    return line.lstrip().startswith(COMMENT_SIGNS)


def guarded_lines(
    path: Path, report: ReadReport, content: bool = False
) -> Iterator[tuple[int, str]]:
    """Yield a text file's lines, numbered from 1 and without line ends, gzipped or not.

    Args:
        path: the file.
        report: counts CRLF line ends, UTF-16 and comments.
        content: skip comments, and of a line over ``MAX_LINE_BYTES`` yield the beginning, instead
            of refusing it.

    Yields:
        Number and text of each line; bytes that are no UTF-8 become replacement characters.

    Raises:
        ValueError: a NUL byte, a carriage return inside a line, a line over ``MAX_LINE_BYTES``,
            broken gzip, or gzip that unpacks to over ``MAX_EXPANSION`` times its size.
    """
    with path.open("rb") as raw:
        packed = raw.peek(2)[:2] == b"\x1f\x8b"
        stream: Any = raw
        if packed:
            stream = io.BufferedReader(gzip.GzipFile(fileobj=raw, mode="rb"), 1 << 18)  # type: ignore[arg-type]
        number = unpacked = 0
        read: Callable[[int], bytes] | None = None
        while True:
            number += 1
            try:
                read = read or _reader_of(stream, path, report)
                line = read(MAX_LINE_BYTES + 1)
                unpacked += len(line)
                if len(line) > MAX_LINE_BYTES and not content:
                    raise ValueError(
                        f"{path}:{number}: the line is longer than {MAX_LINE_BYTES:,} bytes: is "
                        "this a file of proteins?"
                    )
                rest = line if len(line) > MAX_LINE_BYTES else b""
                while rest and not rest.endswith(b"\n"):
                    rest = read(MAX_LINE_BYTES)
                    unpacked += len(rest)
                    _refuse_bomb(path, number, unpacked, raw.tell() if packed else unpacked)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(
                    f"{path}:{number}: broken or truncated gzip ({reason(error)}): copy or "
                    "download the file again"
                ) from None
            if not line:
                return
            if packed and number % LINES_A_CHECK == 0:
                _refuse_bomb(path, number, unpacked, raw.tell())
            if line == b"\n":
                yield number, ""
                continue
            text = _text_of_line(path, number, line, report)
            if content and not text.isalpha() and is_comment(text):
                report.fix(COMMENTS, f"{path.name}:{number}")
                continue
            yield number, text


def _refuse_bomb(path: Path, number: int, unpacked: int, size: int) -> None:
    if unpacked > max(FREE_EXPANSION_BYTES, MAX_EXPANSION * size):
        raise ValueError(
            f"{path}:{number}: unpacks to more than {MAX_EXPANSION} times its size: {BOMB}"
        )


def _reader_of(stream: Any, path: Path, report: ReadReport) -> Callable[[int], bytes]:
    """Return a function that reads a line of at most so many bytes, as UTF-8."""
    if stream.peek(2)[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        return stream.readline
    report.fix(UTF_16, f"{path.name}:1")
    text = io.TextIOWrapper(stream, encoding="utf-16", errors="replace", newline="\n")
    return lambda size: text.readline(size).encode("utf-8", errors="replace")


def _text_of_line(path: Path, number: int, line: bytes, report: ReadReport) -> str:
    if b"\0" in line:
        line = line.strip(b"\0")  # MMseqs2 ends each alignment of its .a3m files with one
        if b"\0" in line or not path.name.lower().endswith((".a3m", ".a3m.gz")):
            raise ValueError(
                f"{path}:{number}: a NUL byte: the file is binary or damaged; save it as plain text"
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


def reason(error: BaseException) -> str:
    """Return an error's message, short and in one line."""
    return one_line(error)[:150]

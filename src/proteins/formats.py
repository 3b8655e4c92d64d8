"""Recognises the format of a file and reads the lines of text files safely.

A new format is recognised here and read in :mod:`src.proteins.readers`.
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from src.common.cli import one_line, printable
from src.proteins.layouts import END_OF_TEXT
from src.proteins.reading import ReadReport

MAX_LINE_BYTES = 1 << 20
MAX_EXPANSION = 200
"""Compression shrinks proteins two- to fivefold; larger factors mean a decompression bomb."""
FREE_EXPANSION_BYTES = 1 << 22
GZIP = b"\x1f\x8b"
BROKEN = (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, tarfile.TarError)
"""What reading damaged gzip or an archive raises."""
LINES_A_CHECK = 1024
BOMB = "refused as a decompression bomb"
FIRST_LINES = 1000
"""Lines among which the first with content must be."""

FASTA, TEXT, LAID_OUT, TABLE = "FASTA", "text", "laid-out text", "table"
JSON_LINES, EXCEL, PARQUET = "JSON lines", "Excel", "parquet"
EXCEL_SUFFIXES = (".xlsx", ".xlsm")
SUFFIXES = {
    **dict.fromkeys((".fasta", ".fa", ".faa", ".fas", ".a3m", ".a2m", ".afa", ".mfa"), FASTA),
    **dict.fromkeys((".txt", ".seq"), TEXT),
    **dict.fromkeys((".csv", ".tsv", ".tab"), TABLE),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), JSON_LINES),
    **dict.fromkeys(EXCEL_SUFFIXES, EXCEL),
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
    **dict.fromkeys(
        (b"HEADER    ", b"ATOM  ", b"REMARK ", b"MODEL   ", b"CRYST1", b"TITLE   "),
        "a PDB structure: save its sequences as FASTA",
    ),
    **dict.fromkeys(
        (b"<!", b"<html", b"<HTML", b"<?xml"), "a web page or XML: download the file itself"
    ),
    **dict.fromkeys(
        (b"#NEXUS", b"MUSCLE (", b"T-COFFEE"), "an alignment: save its sequences as FASTA"
    ),
    b"HMMER3/": "a profile HMM: give the proteins themselves, as FASTA",
    b"ARROW1": "an Arrow file: save it as parquet (datasets: to_parquet)",
    b"{\\rtf": "rich text of a word processor: save it as plain text",
    b"%PDF": "a PDF: export the proteins as FASTA",
}
FOREIGN_LINES = {
    re.compile(rb"#\d+,[\d,]+\s"): "an alignment of joined chains: give that of each chain",
    re.compile(rb"data_[^\s,;|]*\s*\n"): "a structure in mmCIF: save its sequences as FASTA",
    re.compile(rb"ID   \S.*;"): "a record of UniProt or EMBL: save its proteins as FASTA",
}
"""First lines of files that are not read: of ColabFold's alignment of a complex, the chains'
lengths."""
OFFICE = {
    "word/document.xml": "a Word document: save it as plain text",
    "content.xml": "an OpenDocument file: save it as CSV UTF-8 or plain text",
    "xl/workbook.xml": "an Excel file: name it .xlsx",
}
"""A file in a zip archive that shows what it is."""
COMMENT_SIGNS = ("#", ";")
CRLF = "CRLF line ends"
UTF_16 = "UTF-16 text"
COMMENTS = "comment lines, skipped"


def kind_of(path: Path) -> str:
    """Return the format of a file, or of the one in an archive, by its name and first lines.

    Raises:
        ValueError: the file is empty, an archive of several, packed by another program than gzip,
            or of a format that is not read; the message says what to do.
    """
    if not path.stat().st_size:
        raise ValueError(f"{path}: the file is empty: give one with proteins")
    archived = bool(_archive(path))
    with opened(path) as (stream, name, packed):
        try:
            head = stream.peek(512)[:512]
        except (OSError, EOFError, zlib.error):
            head = b""  # the reader meets the same fault and names its line
    head = head.removeprefix(b"\xef\xbb\xbf")
    suffixes = [s.lower() for s in Path(name).suffixes]
    if suffixes[-1:] == [".gz"]:
        if not packed and not archived:
            raise ValueError(f"{path}: is named .gz but is not gzip: rename or pack it")
        suffixes.pop()
    kind = SUFFIXES.get(suffixes[-1]) if suffixes else None
    for magic, packer in PACKED_BY.items():
        if head.startswith(magic) and not (packer == "zip" and kind == EXCEL and not archived):
            raise ValueError(f"{path}: is packed by {packer}: unpack it, or pack it with gzip")
    if archived and kind in (EXCEL, PARQUET):
        raise ValueError(f"{path}: is an archive with {printable(name)}: unpack it")
    for sign, what in FOREIGN.items():
        if head.lstrip().startswith(sign):
            raise ValueError(f"{path}: is {what}")
    for line, what in FOREIGN_LINES.items():
        if line.match(head):
            raise ValueError(f"{path}: is {what}")
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
    if kind in (None, TEXT) and first.startswith(("{", "[")):
        return JSON_LINES
    if kind == TEXT and any(sign in first for sign in "\t,;"):
        return TABLE
    if kind is None:
        raise ValueError(
            f"{path}: what it holds is not clear: name it .fasta, .txt, .csv, .jsonl or .parquet"
        )
    return kind


def _archive(path: Path) -> str:
    """Return ``zip`` or ``tar`` where a file is such an archive, perhaps gzipped; else nothing."""
    with path.open("rb") as raw:
        head = raw.read(512)
    if head.startswith(GZIP):
        try:
            with gzip.open(path) as unpacked:
                head = unpacked.read(512)
        except (OSError, EOFError, zlib.error):
            return ""
    elif head.startswith(b"PK\x03\x04") and path.suffix.lower() not in EXCEL_SUFFIXES:
        return "zip"
    return "tar" if head[257:262] == b"ustar" else ""


@contextmanager
def opened(path: Path) -> Iterator[tuple[io.BufferedReader, str, Callable[[], int] | None]]:
    """Open a file, or the one file with proteins in an archive, unpacked where it is gzip.

    Yields:
        Its bytes, its name, and a function that returns how many packed bytes were read, None where
        nothing is packed.

    Raises:
        ValueError: the archive is broken, has a password, or holds no file or several.
    """
    archive = _archive(path)
    with ExitStack() as stack:
        raw: Any = stack.enter_context(path.open("rb"))
        name, size = path.name, path.stat().st_size
        consumed: Callable[[], int] | None = None
        try:
            if archive == "zip":
                packed = stack.enter_context(zipfile.ZipFile(raw))
                files = {i.filename: i for i in packed.infolist() if not i.is_dir()}
                member = _only(files, path, archive)
                raw, name = stack.enter_context(packed.open(member)), member.filename
            elif archive == "tar":
                tar = stack.enter_context(tarfile.open(fileobj=raw))
                members = {}
                for entry in tar:
                    refuse_bomb(path, len(members) + 1, entry.offset_data + entry.size, size)
                    members |= {entry.name: entry} if entry.isfile() else {}
                member = _only(members, path, archive)
                raw, name = tar.extractfile(member), member.name
        except (*BROKEN, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"{path}: broken or locked archive ({reason(error)})") from None
        if archive:
            raw, consumed = io.BufferedReader(raw), lambda: size
        if raw.peek(2)[:2] == GZIP:
            consumed = consumed or raw.tell
            raw = io.BufferedReader(gzip.GzipFile(fileobj=raw, mode="rb"), 1 << 18)  # type: ignore[arg-type]
        yield raw, Path(name).name, consumed


def _only(files: Mapping[str, Any], path: Path, packer: str) -> Any:
    """Return the one file of an archive that holds proteins by its name, or that is there."""
    seen = {n: f for n, f in files.items() if "__MACOSX" not in n and Path(n).name[:1] != "."}
    bare = {n: Path(n.lower().removesuffix(".gz")) for n in seen}
    fitting = {n: f for n, f in seen.items() if bare[n].suffix in SUFFIXES}
    chosen = fitting or seen
    for inside, what in OFFICE.items():
        if inside in files:
            raise ValueError(f"{path}: is {what}")
    if len(chosen) != 1:
        named = f" ({printable(', '.join(list(chosen)[:3]))}, ...)" if chosen else ""
        raise ValueError(
            f"{path}: is a {packer} archive of {len(chosen)} files{named}: unpack it and give the "
            "files in it; --data takes several"
        )
    return next(iter(chosen.values()))


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
    with opened(path) as (stream, name, packed):
        if name != path.name:
            report.note(f"read from the archive: {printable(name)}")
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
                    refuse_bomb(path, number, unpacked, packed() if packed else unpacked)
            except BROKEN as error:
                raise ValueError(
                    f"{path}:{number}: broken or truncated gzip ({reason(error)}): copy or "
                    "download the file again"
                ) from None
            if not line:
                return
            if packed and number % LINES_A_CHECK == 0:
                refuse_bomb(path, number, unpacked, packed())
            if line == b"\n":
                yield number, ""
                continue
            text = _text_of_line(path, number, line, report)
            if content and not text.isalpha() and is_comment(text):
                report.fix(COMMENTS, f"{path.name}:{number}")
                continue
            yield number, text


def refuse_bomb(path: Path, number: int, unpacked: int, size: int) -> None:
    """Raise ``ValueError`` where so many unpacked bytes came of so few packed ones."""
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

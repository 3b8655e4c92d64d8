r"""Reads and cleans proteins from files or the hub one at a time, and reports every change.

Sources of the flag ``--data``:

- a directory of parts: ``train``, ``validation``, ``test`` as any of the files below; parquet also
  in pieces (``train-00000-of-00004.parquet``);
- a file: FASTA (``.fasta .fa .faa .fas``), plain text with one protein a line (``.txt .seq``), CSV
  or TSV with a header line (``.csv .tsv``), each also gzipped; parquet (``.parquet .pq``). Plain
  text that begins with ``>`` is FASTA, and a file of another name is recognised by its first bytes;
- a data set on the hub: ``owner/name``, read as a stream.

Tables hold one protein a row in a column ``sequence``, or ``text`` (residues, or ProtGPT2's
layout), or ``input_ids`` (tokens); a column ``name``, ``id``, ``accession`` or ``entry`` names it.
A row of tokens is cut into proteins at its end-of-text markers. A first piece without a marker
before it is dropped, because its beginning is missing; a last piece without a marker after it is a
protein cut short. Rows are never joined.

Faults of an input are fixed, dropped or refused. ``ReadReport`` counts the first two kinds and
keeps the first place of each:

==================================================  ==============================================
fixed                                               lower case; ``*`` at the end; white space;
                                                    alignment gaps ``-`` and ``.``; CRLF line ends;
                                                    a byte-order mark (not counted)
dropped                                             no residues; ``*`` inside; ambiguous residues
                                                    (B J O U X Z, unless kept); anything else that
                                                    is no residue; a duplicate (by ``tokenise``); a
                                                    protein without its beginning (tokens)
refused, with file and line                         empty file; nothing usable; text before the
                                                    first header; NUL bytes; carriage returns
                                                    inside a line; a line over 1 MiB; a protein over
                                                    100,000 characters; broken or truncated gzip; a
                                                    gzip that unpacks to over 200 times its size,
                                                    and parquet likewise; broken CSV or parquet;
                                                    a row with more or fewer cells than the header;
                                                    columns that are missing or there twice
==================================================  ==============================================

Memory depends on the longest line or the rows read together, not on the size of a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.proteins.layouts import (
    AMBIGUOUS_RESIDUES,
    END_OF_TEXT,
    STANDARD_RESIDUES,
    layout,
)
from src.proteins.readers import PARQUET, SUFFIXES, Record, file_records, hub_problem, hub_records
from src.proteins.report import ReadReport

MAX_NAME = 200
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NO_RESIDUES = "no residues"
INNER_STOP = "'*' inside"
AMBIGUOUS = "ambiguous residues (B J O U X Z)"
NO_RESIDUE = "characters that are no residues"
HEADLESS = "the beginning is missing"
DUPLICATE = "duplicates"
LOWER_CASE = "lower case"
FINAL_STOP = "'*' at the end"
WHITE_SPACE = "white space inside"
GAPS = "alignment gaps"
CUT_IN_SOURCE = "cut short in the source"
OTHER_LAYOUT = "not in ProtGPT2's layout, kept as they are"

_STANDARD = STANDARD_RESIDUES.encode()
_LETTERS = (STANDARD_RESIDUES + AMBIGUOUS_RESIDUES).encode()


class Protein(NamedTuple):
    """A protein: its name and its residues, one upper-case letter each."""

    name: str
    residues: str


class SourceProtein(NamedTuple):
    """A protein, with token ids if the source is tokenised.

    ``whole`` is False if the tokens end before the protein does.
    """

    name: str
    residues: str
    ids: np.ndarray | None = None
    whole: bool = True


# Finding the files of a source


def is_hub_id(source: str) -> bool:
    """Return whether a source may be the name of a data set on the hub."""
    return bool(HUB_ID.fullmatch(source)) and Path(source).suffix.lower() not in {*SUFFIXES, ".gz"}


def part_files(folder: Path, split: str) -> list[Path]:
    """Return the files of one part of a directory, in order; none if the part is missing.

    Raises:
        ValueError: several different files have the part's name.
    """
    suffixes = [*SUFFIXES, *(f"{s}.gz" for s, kind in SUFFIXES.items() if kind != PARQUET)]
    files = [folder / f"{split}{s}" for s in suffixes if (folder / f"{split}{s}").is_file()]
    pieces = sorted(p for p in folder.glob(f"{split}-*.parquet") if p.is_file())
    if len(files) > 1 or (files and pieces):
        names = ", ".join(p.name for p in (files + pieces)[:3])
        raise ValueError(f"{folder}: several files for the part {split!r} ({names}): keep one")
    return files or pieces


def _path(source: str | Path) -> Path:
    """Return a source as a path. Raises ``ValueError`` for an empty name (it would mean ``.``)."""
    if not str(source).strip():
        raise ValueError("--data is an empty name: pass a file, a directory or a hub data set")
    return Path(source)


def local_files(source: str | Path, split: str | None) -> list[Path] | None:
    """Return the files to read, or None if the source is a data set on the hub.

    Args:
        source: a directory, a file or a hub id.
        split: the part; a single file has only the part ``train``.

    Raises:
        ValueError: there is no such file, directory or part.
    """
    path = _path(source)
    if path.is_dir():
        if split is None:
            raise ValueError(f"{path}: is a directory of parts: give one file of it")
        files = part_files(path, split)
        if not files:
            there = [p for p in ("train", "validation", "test") if part_files(path, p)]
            raise ValueError(
                f"{path}: no {split}.fasta.gz (or .fasta, .txt, .csv, .parquet); "
                f"{'it has ' + ', '.join(there) if there else 'it holds no part at all'}"
            )
        return files
    if path.is_file():
        if split not in (None, "train"):
            raise ValueError(
                f"{path}: is one file and has no {split} part: make a directory of parts with "
                "scripts/split_data.py"
            )
        return [path]
    if path.exists():
        raise ValueError(f"{path}: is neither a file nor a directory")
    if not is_hub_id(str(source)):
        raise ValueError(f"{source}: there is no such file or directory")
    return None


def has_split(source: str | Path, split: str) -> bool:
    """Return whether a source has a part of that name; a single file has only ``train``.

    Raises:
        ValueError: the source is missing, or the hub cannot be reached.
    """
    path = _path(source)
    if path.is_dir():
        return bool(part_files(path, split))
    if local_files(source, None) is not None:
        return split == "train"
    try:
        from datasets import get_dataset_split_names

        return split in get_dataset_split_names(str(source))
    except Exception as error:  # the client may raise any error
        raise ValueError(hub_problem(str(source), error)) from None


# From records to proteins


def clean(text: str, report: ReadReport, place: str, keep_ambiguous: bool = False) -> str | None:
    """Return the residues in a text, or None if the protein is dropped.

    Args:
        text: of the source.
        report: counts what was fixed, or why the protein was dropped.
        place: of the text, for the report.
        keep_ambiguous: keep B, J, O, U, X and Z.
    """
    raw = text.encode("utf-8", errors="replace")
    strange = raw.translate(None, _STANDARD)
    if raw and not strange:
        return text
    fixes = []
    residues = "".join(text.split())
    if residues != text:
        fixes.append(WHITE_SPACE)
    bare = residues.replace("-", "").replace(".", "")
    if bare != residues:
        fixes.append(GAPS)
    residues = bare.rstrip("*")
    if residues != bare:
        fixes.append(FINAL_STOP)
    if residues.isascii() and residues != residues.upper():
        fixes.append(LOWER_CASE)
        residues = residues.upper()
    left = residues.encode("utf-8", errors="replace").translate(None, _STANDARD)
    unknown = left.translate(None, _LETTERS)
    if not residues:
        report.drop(NO_RESIDUES, place)
    elif unknown.strip(b"*"):
        odd = next(c for c in residues if c not in STANDARD_RESIDUES + AMBIGUOUS_RESIDUES + "*")
        report.drop(NO_RESIDUE, f"{place}, {odd!r}")
    elif unknown:
        report.drop(INNER_STOP, place)
    elif left and not keep_ambiguous:
        report.drop(AMBIGUOUS, f"{place}, {chr(left[0])!r}")
    else:
        for fix in fixes:
            report.fix(fix, place)
        return residues
    return None


def read_entries(
    source: str | Path,
    *,
    split: str | None = None,
    report: ReadReport | None = None,
    tokenizer: Any = None,
    keep_ambiguous: bool = False,
) -> Iterator[SourceProtein]:
    """Yield the proteins of a source, with their tokens if the source has them.

    Arguments and errors are those of :func:`read_proteins`.
    """
    report = ReadReport() if report is None else report
    report.source = str(source) if split is None else f"{source} ({split})"
    files = local_files(source, split)
    records: Iterable[Record]
    if files is None:
        records = hub_records(str(source), split or "train")
    else:
        records = (record for path in files for record in file_records(path, report))
    for record in records:
        if record.ids is not None:
            yield from _token_entries(record, report, tokenizer, keep_ambiguous, str(source))
            continue
        report.read += 1
        residues = clean(record.text, report, record.place, keep_ambiguous)
        if residues is not None:
            report.kept += 1
            report.residues += len(residues)
            yield SourceProtein(_clean_name(record.name), residues)
    if not report.read:
        raise ValueError(f"{source}: there is no protein in it")
    if not report.kept:
        reasons = "; ".join(
            f"{entry['count']:,} dropped: {kind}, first at {entry['first']}"
            for kind, entry in report.dropped.items()
        )
        raise ValueError(f"{source}: none of its {report.read:,} proteins is usable ({reasons})")


def read_proteins(
    source: str | Path,
    *,
    split: str | None = None,
    report: ReadReport | None = None,
    tokenizer: Any = None,
    keep_ambiguous: bool = False,
) -> Iterator[Protein]:
    """Yield the proteins of a source one by one, cleaned.

    Args:
        source: directory of parts, file or hub id (see the top of this module).
        split: the part; required for a directory. For a single file ``train`` or None.
        report: filled while reading; complete after the last protein.
        tokenizer: decodes the residues if the source holds tokens.
        keep_ambiguous: keep proteins with B, J, O, U, X or Z.

    Yields:
        Proteins, in the order of the source, duplicates included.

    Raises:
        ValueError: the source is missing, broken or without a usable protein.
    """
    for entry in read_entries(
        source, split=split, report=report, tokenizer=tokenizer, keep_ambiguous=keep_ambiguous
    ):
        yield Protein(entry.name, entry.residues)


def _clean_name(name: str) -> str:
    name = "_".join(name.split())[:MAX_NAME]
    return name if name.isprintable() else "".join(c if c.isprintable() else "?" for c in name)


def token_pieces(ids: np.ndarray, marker: int) -> list[tuple[np.ndarray, bool, bool]]:
    """Cut a row of tokens at its end-of-text markers.

    Args:
        ids: token ids, shape ``(T,)``.
        marker: id of the end-of-text marker.

    Returns:
        For each non-empty piece its ids, and whether there is a marker before and after it.
    """
    edges = np.concatenate([[-1], np.flatnonzero(ids == marker), [len(ids)]])
    last = len(edges) - 2
    return [
        (ids[start + 1 : end], i > 0, i < last)
        for i, (start, end) in enumerate(zip(edges[:-1], edges[1:], strict=True))
        if end > start + 1
    ]


def _token_entries(
    record: Record, report: ReadReport, tokenizer: Any, keep_ambiguous: bool, source: str
) -> Iterator[SourceProtein]:
    if tokenizer is None:
        raise ValueError(f"{source}: holds tokens, not proteins: a tokenizer is needed to read it")
    assert record.ids is not None
    marker = tokenizer.eos_token_id
    ids = record.ids
    if len(ids) and (ids.min() < 0 or ids.max() >= len(tokenizer)):
        raise ValueError(
            f"{source}: {record.place}: token {ids.min() if ids.min() < 0 else ids.max()} is "
            f"outside the vocabulary of {len(tokenizer):,}: it was made by another tokenizer"
        )
    pieces = token_pieces(ids, marker)
    if not pieces:
        report.read += 1
        report.drop(NO_RESIDUES, record.place)
    for number, (piece, headed, whole) in enumerate(pieces, start=1):
        report.read += 1
        if not headed:
            report.drop(HEADLESS, record.place)
            continue
        body = tokenizer.decode(
            piece.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        joined = "".join(body.split())
        # Tokens are stored unchanged, so faults in them cannot be fixed.
        if joined.encode("utf-8", errors="replace").translate(None, _LETTERS):
            report.drop(NO_RESIDUE, record.place)
            continue
        residues = clean(joined, report, record.place, keep_ambiguous)
        if residues is None:
            continue
        # A protein may be cut right after a line break.
        expected = layout(residues).removeprefix(END_OF_TEXT).removesuffix(f"\n{END_OF_TEXT}")
        if body != f"{expected}\n" and (whole or body != expected):
            report.fix(OTHER_LAYOUT, record.place)
        report.kept += 1
        report.residues += len(residues)
        if not whole:
            report.fix(CUT_IN_SOURCE, record.place)
        ends = np.array([marker])
        kept = np.concatenate([ends, piece, ends] if whole else [ends, piece]).astype(np.int64)
        name = record.name if len(pieces) == 1 else f"{record.name}_{number}"
        yield SourceProtein(_clean_name(name), residues, kept, whole)

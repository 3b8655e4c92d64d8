"""Reads and cleans proteins from files or the hub one at a time, and reports every change.

docs/DATA.md says what a source may be, and which of its faults are fixed, dropped or refused.
``ReadReport`` counts what is fixed and dropped, with the first place of each. A row of tokens is
cut into proteins at its end-of-text markers: a piece without a marker before it is dropped, because
its beginning is missing; one without a marker after it is a protein cut short. Rows are never
joined.
Memory depends on the longest line or the rows read together, not on the size of a file.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.common.cli import printable
from src.proteins.layouts import (
    AMBIGUOUS_RESIDUES,
    END_OF_TEXT,
    STANDARD_RESIDUES,
    TaggedProtein,
    layout,
    layout_of,
    tag_in,
)
from src.proteins.locations import has_split, hub_split, local_files, on_hub, unread_files
from src.proteins.notation import OTHER_CODES, peptide
from src.proteins.readers import Record, file_records, hub_records
from src.proteins.reading import ReadReport

__all__ = [
    "Protein",
    "has_split",
    "local_files",
    "on_hub",
    "read_proteins",
    "read_proteins",
]

MAX_NAME = 200
NO_RESIDUES = "no residues"
INNER_STOP = "'*' inside"
AMBIGUOUS = "ambiguous residues (B J O U X Z)"
RUN_OF_X = "runs of X (a masked or unknown stretch)"
NUCLEIC = "nucleic acids, not proteins"
NO_RESIDUE = "characters that are no residues"
HEADLESS = "the beginning is missing"
DUPLICATE = "duplicates"
LOWER_CASE = "lower case"
FINAL_STOP = "'*' at the end"
WHITE_SPACE = "white space inside"
GAPS = "alignment gaps"
CUT_IN_SOURCE = "cut short in the source"
SAME_NAMES = "names that another protein has, made different"
OTHER_LAYOUT = "not in ProtGPT2's layout, kept as they are"

LONG_RUN = "X" * 5
WORDS = "words with a capital and small letters, no residues"
_WORDS = re.compile(r"[A-Z][a-z]{3,19}( [a-z]{1,19})*[.:]?")
NUCLEIC_SHARE, LEAST_NUCLEIC = 0.95, 15
"""Letters of A, C, G, T, U and N, and their number, from which a sequence is no protein: one of 15
residues of usual frequencies has them with a probability of 10⁻⁹."""
FIRST_LOOK = 200
"""Sequences after which a source that is nearly all nucleic acids is refused."""

_STANDARD = STANDARD_RESIDUES.encode()
_LETTERS = (STANDARD_RESIDUES + AMBIGUOUS_RESIDUES).encode()


class Protein(NamedTuple):
    """A protein: name and residues, one upper-case letter each; token ids if the source has them.

    ``whole`` is False if the tokens end before the protein does; ``title`` is the whole header.
    """

    name: str
    residues: str
    ids: np.ndarray | None = None
    whole: bool = True
    title: str = ""


# From records to proteins


def clean(text: str, report: ReadReport, place: str, keep_ambiguous: bool = False) -> str | None:
    """Return the residues in a text, or None if the protein is dropped.

    The report counts what was fixed, or why the protein was dropped. ``keep_ambiguous`` keeps B, J,
    O, U, X and Z.
    """
    raw = text.encode("utf-8", errors="replace")
    strange = raw.translate(None, _STANDARD)
    if raw and not strange and not is_nucleic(raw):
        return text
    fixes = []
    stripped = text.strip()
    if written := peptide(stripped):
        text, how = written
        if how == OTHER_CODES:
            report.drop(how, place)
            return None
        fixes.append(how)
    elif _WORDS.fullmatch(stripped):
        report.drop(WORDS, f"{place}, {printable(stripped[:30])!r}")
        return None
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
    elif is_nucleic(residues.encode("utf-8", errors="replace")):
        report.drop(NUCLEIC, place)
    elif unknown.strip(b"*"):
        odd = next(c for c in residues if c not in STANDARD_RESIDUES + AMBIGUOUS_RESIDUES + "*")
        report.drop(NO_RESIDUE, f"{place}, {odd!r}")
    elif unknown:
        report.drop(INNER_STOP, place)
    elif LONG_RUN in residues and not keep_ambiguous:
        report.drop(RUN_OF_X, place)
    elif left and not keep_ambiguous:
        report.drop(AMBIGUOUS, f"{place}, {chr(left[0])!r}")
    else:
        for fix in fixes:
            report.fix(fix, place)
        if LONG_RUN in residues:
            report.notice(RUN_OF_X, place)
        return residues
    return None


def is_nucleic(letters: bytes) -> bool:
    """Return whether capitals are DNA or RNA: nearly all A, C, G, T, U or N, no kind missing."""
    if len(letters) < LEAST_NUCLEIC:
        return False
    others = len(letters.translate(None, b"ACGTUN"))
    if others > (1 - NUCLEIC_SHARE) * len(letters):
        return False
    return all(letters.count(c) for c in b"ACG") and (b"T" in letters or b"U" in letters)


def require_proteins(report: ReadReport, enough: int = 1) -> None:
    """Check what was read of a source so far; nucleic acids decide from ``enough`` sequences on.

    Raises:
        ValueError: most are nucleic acids, or the source was read and none is usable.
    """
    nucleic = report.dropped.get(NUCLEIC, {"count": 0, "first": ""})
    if report.read >= enough and 2 * nucleic["count"] > report.read:
        column = advice = ""
        if report.column:
            column = f" of the column {report.column!r}"
            advice = ", or choose the column of proteins (often sequence_aa) with --sequence_column"
        raise ValueError(
            f"{report.source}: {nucleic['count']:,} of {report.read:,} sequences{column} are "
            f"nucleic acids, the first at {nucleic['first']}: translate them into "
            f"proteins{advice}"
        )
    if enough > 1 or report.kept:
        return
    if not report.read:
        raise ValueError(f"{report.source}: there is no protein in it")
    reasons = "; ".join(
        f"{entry['count']:,} dropped: {kind}, first at {entry['first']}"
        for kind, entry in report.dropped.items()
    )
    raise ValueError(f"{report.source}: none of its {report.read:,} proteins is usable ({reasons})")


def read_proteins(
    source: str | Path,
    *,
    split: str | None = None,
    report: ReadReport | None = None,
    tokenizer: Any = None,
    keep_ambiguous: bool = False,
    sequence_column: str | None = None,
    tag: str | None = None,
) -> Iterator[Protein]:
    """Yield the proteins of a source one by one, cleaned, with their tokens if the source has them.

    Args:
        source: directory of parts, file, several files or hub id (docs/DATA.md).
        split: the part; required for a directory. For files ``train`` or None.
        report: filled while reading; complete after the last protein.
        tokenizer: decodes the residues if the source holds tokens.
        keep_ambiguous: keep proteins with B, J, O, U, X or Z.
        sequence_column: column of residues where the source is a table; None: a usual one.
        tag: key or column of what a layout asks for; with a tokenizer its own.

    Yields:
        Proteins, in the order of the source, duplicates included.

    Raises:
        ValueError: the source is missing, broken or without a usable protein.
    """
    report = ReadReport() if report is None else report
    report.source = str(source) if split is None else f"{source} ({split})"
    tag = tag if tokenizer is None else layout_of(tokenizer).tag
    for record in _records(source, split, report, sequence_column, tag):
        if record.ids is not None:
            yield from _token_entries(record, report, tokenizer, keep_ambiguous, str(source))
            continue
        residues = usable(record, report, keep_ambiguous, tag)
        if residues is not None:
            yield Protein(clean_name(record.name), residues, title=record.title)
        if report.read == FIRST_LOOK:
            require_proteins(report, FIRST_LOOK)
    require_proteins(report)


def _records(
    source: str | Path,
    split: str | None,
    report: ReadReport,
    sequence_column: str | None,
    tag: str | None = None,
) -> Iterable[Record]:
    files = local_files(source, split)
    if files is None:
        part = split or "train"
        with contextlib.suppress(Exception):  # reading the part itself says what is wrong
            part = hub_split(str(source), part) or part
        return hub_records(str(source), part, report, sequence_column, tag)
    if os.path.isdir(source):
        unread = unread_files(Path(source))
        if unread:
            report.note(f"not read: {printable(', '.join(unread[:10]))}")
    return (record for path in files for record in file_records(path, report, sequence_column, tag))


def usable(
    record: Record, report: ReadReport, keep_ambiguous: bool = False, tag: str | None = None
) -> str | None:
    """Return a record's residues, with a tag if there is to be one, or None if it is of no use.

    The report counts it.
    """
    report.read += 1
    if record.fault:
        report.drop(record.fault, record.place)
        return None
    residues = clean(record.text, report, record.place, keep_ambiguous)
    if residues is not None and tag is not None:
        value = record.tag or tag_in(record.title, tag)
        if not value:
            report.drop(f"no {tag}=... in the header, or an empty cell {tag}", record.place)
            return None
        residues = TaggedProtein(residues, value)
    if residues is not None:
        report.kept += 1
        report.residues += len(residues)
    return residues


def read_distinct_names(source: str | Path, **options: Any) -> tuple[list[Protein], ReadReport]:
    """Return all proteins of a file, different ones under different names, and the report.

    A name that another protein has already is replaced by the whole header, or gets a number.
    Options and errors are those of :func:`read_proteins`.
    """
    report = ReadReport()
    residues_of_name: dict[str, str] = {}
    other_names: dict[tuple[str, str], str] = {}
    numbers: Counter[str] = Counter()
    proteins = []
    for name, residues, _, _, title in read_proteins(source, report=report, **options):
        if residues_of_name.setdefault(name, residues) != residues:
            title = clean_name(title or name)
            name = other_names.get((title, residues), title)
            while residues_of_name.setdefault(name, residues) != residues:
                numbers[title] += 1
                name = f"{title}_{numbers[title] + 1}"
            other_names[title, residues] = name
            report.fix(SAME_NAMES, name)
        proteins.append(Protein(name, residues))
    return proteins, report


def clean_name(name: str) -> str:
    """Return a name without white space and what cannot be printed, and not too long."""
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
) -> Iterator[Protein]:
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
        yield Protein(clean_name(name), residues, kept, whole)

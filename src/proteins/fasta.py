"""Writes FASTA with values in the headers: ``>name key=value``.

FASTA is read by :func:`src.proteins.readers.fasta_records`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from src.common.files import atomic_write
from src.proteins.layouts import lines_of


class FastaRecord(NamedTuple):
    """A FASTA entry: name, residues, and the ``key=value`` fields of its header."""

    name: str
    residues: str
    fields: Mapping[str, str | int | float | None] = {}


def format_header(record: FastaRecord) -> str:
    """Return the header line ``>name key=value key=value``, without a newline.

    Floats are written with six significant digits, None as ``none``. White space within a text
    becomes ``_``, so that a header can be split at blanks.
    """
    fields = (f"{_word(key)}={_value(value)}" for key, value in record.fields.items())
    return " ".join([f">{_word(record.name)}", *fields])


def _value(value: str | int | float | None) -> str:
    if value is None:
        return "none"
    return f"{value:.6g}" if isinstance(value, float) else _word(str(value))


def _word(text: str) -> str:
    return "_".join(text.split()) or "_"


def fasta_text(record: FastaRecord) -> str:
    """Return the entry: its header, then the residues in lines of 60."""
    return "".join(f"{line}\n" for line in (format_header(record), *lines_of(record.residues)))


def write_fasta(path: str | Path, records: Iterable[FastaRecord]) -> None:
    """Write entries to a file atomically, replacing an older one."""
    with atomic_write(path) as handle:
        for record in records:
            handle.write(fasta_text(record))

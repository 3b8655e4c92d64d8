"""Names of columns, and what the cells of a table hold."""

from __future__ import annotations

import re
from collections.abc import Sequence

from src.common.cli import printable
from src.proteins.layouts import PROTEIN_LETTERS

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
LEAST_PROTEIN = 15
"""Letters from which a cell is taken for a protein by its look."""


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
        matches = exact or [i for i, column in enumerate(keys) if column == key(name)]
        if len(matches) > 1:
            raise ValueError(
                f"{place}: {len(matches)} columns are named {printable(name)!r}: rename or drop "
                "all but one"
            )
        if matches:
            return matches[0]
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


def first_of(names: Sequence[str], columns: Sequence[str]) -> int | None:
    """Return the place of the first of some names that is a column, None without one."""
    keys = [key(column) for column in columns]
    return next((keys.index(key(name)) for name in names if key(name) in keys), None)


def may_be_protein(text: str) -> bool:
    """Return whether a text holds letters of proteins alone, or markers of a layout."""
    return "<" in text or PROTEIN_LETTERS.issuperset("".join(text.split()))


def is_header(row: Sequence[str], wanted: str | None) -> bool:
    """Return whether a row has the name of a known column, or the wanted one, and no protein."""
    known = {key(wanted)} if wanted else {*SEQUENCE_COLUMNS, *OTHER_COLUMNS}
    has_protein = any(cell.isupper() and looks_like_protein(cell) for cell in row)
    return not has_protein and any(key(cell) in known for cell in row)


def all_proteins(rows: Sequence[tuple[int, list[str]]], column: int) -> bool:
    """Return whether no row has something else than a protein in a column."""
    cells = [row[column] for _, row in rows if len(row) > column]
    return all(map(looks_like_protein, cells)) if cells else True


def number_of(cell: str, place: str, decimal_comma: bool = False) -> float:
    """Return the number in a cell, NaN where it is empty or says that there is none.

    With ``decimal_comma`` ``0,5`` is one half. ``place`` is for the message.

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

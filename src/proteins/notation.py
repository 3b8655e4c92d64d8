"""Reads peptides as chemists write them: ``Ac-MKV-NH2``, ``H-Met-Lys-Val-OH``, ``MET LYS VAL``.

Taken letter by letter these would be other proteins: ``ACMKV``, ``METLYSVAL``.
"""

from __future__ import annotations

import re

CODES = {
    "ALA": "A", "ARG": "R", "ASN": "N", "ASP": "D", "CYS": "C", "GLN": "Q", "GLU": "E",
    "GLY": "G", "HIS": "H", "ILE": "I", "LEU": "L", "LYS": "K", "MET": "M", "PHE": "F",
    "PRO": "P", "SER": "S", "THR": "T", "TRP": "W", "TYR": "Y", "VAL": "V", "SEC": "U",
    "PYL": "O", "XAA": "X", "ASX": "B", "GLX": "Z",
}  # fmt: skip
THREE_LETTERS = "three-letter codes, written as one letter"
TERMINI = "chemical groups at the ends (Ac-, -NH2), left out"
_BEFORE, _BEHIND = "Ac|Boc|Fmoc|Pal|Myr|Biotin|FITC", "OH|NH2|amide"
_LETTERS = re.compile(rf"(?:{_BEFORE})-([A-Z]+)(?:-(?:{_BEHIND}))?|(?:H-)?([A-Z]+)-(?:{_BEHIND})")
_CODE = "|".join(CODES)
_DIVIDED = re.compile(
    rf"(?:(?:{_BEFORE}|H)-)?((?:{_CODE})[-\s]+(?:(?:{_CODE})[-\s]*){{2,}})(?:{_BEHIND})?",
    re.IGNORECASE,
)
_JOINED = re.compile(f"((?:{'|'.join(code.capitalize() for code in CODES)}){{3,}})")


def peptide(text: str) -> tuple[str, str] | None:
    """Return a peptide's residues in one letter each and how it was written, else None.

    Codes of three letters are recognised where there are at least three of them, and a blank or a
    hyphen behind the first, or each has a capital.
    """
    if found := _JOINED.fullmatch(text) or _DIVIDED.fullmatch(text):
        codes = re.findall("[A-Za-z]{3}", found[1])
        return "".join(CODES[code.upper()] for code in codes), THREE_LETTERS
    found = _LETTERS.fullmatch(text)
    return (found[1] or found[2], TERMINI) if found else None

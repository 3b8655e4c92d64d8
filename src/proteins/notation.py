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
VARIANTS = {
    **dict.fromkeys(("HIE", "HID", "HIP", "HSD", "HSE", "HSP"), "H"), "CYX": "C", "CYM": "C",
    "ASH": "D", "GLH": "E", "LYN": "K", "MSE": "M",
}  # fmt: skip
"""Names of the same residues in force fields (their protonation), and selenomethionine, which
stands for methionine in crystals."""
KNOWN = {**CODES, **VARIANTS}
THREE_LETTERS = "three-letter codes, written as one letter"
TERMINI = "chemical groups at the ends (Ac-, -NH2), left out"
OTHER_CODES = "three-letter codes of which not all are known residues"
_BEFORE, _BEHIND = "Ac|Ace|Boc|Fmoc|Pal|Myr|Biotin|FITC", "OH|NH2|amide|COOH|CONH2|NMe"
_LETTERS = re.compile(rf"(?:{_BEFORE})-([A-Z]+)(?:-(?:{_BEHIND}))?|(?:H-)?([A-Z]+)-(?:{_BEHIND})")
_CAPITALS = "|".join(code.capitalize() for code in CODES)
_JOINED = re.compile(f"((?:{_CAPITALS}){{3,}})")
_WORD = re.compile(r"[-\s]+")
_FIRST, _LAST = (
    re.compile(rf"(?:{ends})", re.IGNORECASE) for ends in (f"{_BEFORE}|H", rf"{_BEHIND}|NME")
)


def peptide(text: str) -> tuple[str, str] | None:
    """Return a peptide's residues in one letter each and how it was written, else None.

    Codes of three letters are recognised where at least two words, and half of all, are such; or
    where three are joined and each has a capital. If one word is no code, the residues are empty
    and the second value is the fault: letter by letter they would be another protein.
    """
    if match := _JOINED.fullmatch(text):
        codes = re.findall("[A-Z][a-z]{2}", match[1])
        return "".join(CODES[code.upper()] for code in codes), THREE_LETTERS
    if match := _LETTERS.fullmatch(text):
        return match[1] or match[2], TERMINI
    words = [part for word in _WORD.split(text) for part in _codes(word.upper())]
    residues = [KNOWN.get(word, "") for word in words]
    if sum(map(bool, residues)) < max(2, len(words) / 2):
        return None
    if not residues[-1] and (_LAST.fullmatch(words[-1]) or not words[-1]):
        residues.pop()
    if not residues[0] and _FIRST.fullmatch(words[0]):
        residues.pop(0)
    return ("".join(residues), THREE_LETTERS) if all(residues) else ("", OTHER_CODES)


def _codes(word: str) -> list[str]:
    """Return a word's codes where it is several without anything between them, else the word."""
    parts = re.findall("...", word) if len(word) % 3 == 0 else []
    return parts if parts and all(part in KNOWN for part in parts) else [word]

"""Reads lists of mutants such as ``A12C:D45E`` and makes the proteins that they stand for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from src.proteins.columns import MUTANT_COLUMNS
from src.proteins.layouts import PROTEIN_LETTERS, STANDARD_RESIDUES
from src.proteins.notation import CODES

WILD_TYPE = ("wt", "wildtype", "wild-type", "wild type", "wild_type", "_wt", "_sy", "p.=", "=")
SEPARATORS = re.compile(r"\s*[:;/+,|&]\s*|\s+")
_ONE = re.compile(r"(?P<prefix>.*?)(?P<wild>[A-Z])(?P<number>-?\d+)(?P<new>[A-Z])$")
_BARE = r"[A-Z]\d+[A-Z]"
_CHAIN = re.compile(rf"{_BARE}(?:[_-]{_BARE})+")
"""Substitutions with ``_`` or ``-`` between them, which else may end a name before the first."""
_HIDDEN = re.compile(rf"(?<![A-Za-z0-9]){_BARE}(?![A-Za-z0-9])")
_INDEL = re.compile(r"(?<![A-Za-z])(?:del|ins|dup)[A-Z]?\d|\d(?:delins|del|ins|dup)(?![a-z])")
"""An insertion or a deletion, which is no name before a substitution."""
_SMALL = re.compile(r"[a-z]\d+[a-z]")
_THREE = re.compile(r"(?:p\.)?(?P<wild>[A-Z][a-z]{2})(?P<number>\d+)(?P<new>[A-Z][a-z]{2}|=)$")
_HGVS = re.compile(r"p\.[\[(](.*)[\])]")
_NAMES = {code.capitalize(): r for code, r in CODES.items() if r in STANDARD_RESIDUES}


class Substitution(NamedTuple):
    """One residue in place of another; ``number`` and ``prefix`` are as they were written.

    A prefix is what stands before the first residue: ``p.``, a chain or a protein's name.
    """

    wild: str
    number: int
    new: str
    prefix: str = ""


class Numbering(NamedTuple):
    """Where a list's numbers begin: residue ``number`` is ``residues[number - first]``.

    ``ambiguous``: from 0 would fit as well.
    """

    first: int
    ambiguous: bool = False

    def __str__(self) -> str:
        """Return it as a person says it."""
        if self.ambiguous:
            return "numbered from 1, but from 0 would fit as well: compare one mutant's sequence"
        if self.first in (0, 1):
            return f"numbered from {self.first}"
        return f"numbered so that the first residue is {self.first}"


def parse_mutant(text: str) -> list[Substitution]:
    """Return the substitutions of a mutant, none for the wild type.

    ``A12C``, ``A12C:D45E`` (also other signs or blanks between them), HGVS (``p.Ala12Cys``,
    ``p.[Ala12Cys;Asp45Glu]``, ``p.Ala12=``), and letters before the first residue (``SA12C``,
    ``chainA_A12C``), which are kept as its prefix.

    Raises:
        ValueError: a part is no substitution, or a residue is replaced by two others.
    """
    bare = _HGVS.sub(r"\1", text.strip())
    if bare.lower() in WILD_TYPE:
        return []
    substitutions = []
    for part in _parts(bare.rstrip(";,")):
        if _SMALL.fullmatch(part):
            part = part.upper()
        three = _THREE.match(part)
        if three and {three["wild"], three["new"]} <= {*_NAMES, "="}:
            wild = _NAMES[three["wild"]]
            new = _NAMES.get(three["new"], wild)
            substitutions.append(Substitution(wild, int(three["number"]), new))
            continue
        one = _ONE.match(part)
        hidden = one and (_HIDDEN.search(one["prefix"]) or _INDEL.search(one["prefix"]))
        if not one or hidden or not {one["wild"], one["new"]} <= PROTEIN_LETTERS:
            raise ValueError(
                f"{text[:40]!r} is no mutant: write A12C, or A12C:D45E for several substitutions "
                "(insertions and deletions: give whole sequences)"
            )
        wild, number, new = one["wild"], int(one["number"]), one["new"]
        substitutions.append(Substitution(wild, number, new, one["prefix"]))
    placed: dict[int, str] = {}
    for _, number, new, _ in substitutions:
        if placed.setdefault(number, new) != new:
            raise ValueError(
                f"{text[:40]!r} is no mutant: residue {number} becomes {placed[number]} and {new}"
            )
    return substitutions


def _parts(text: str) -> Iterator[str]:
    """Yield the parts of a mutant, one substitution each."""
    for part in SEPARATORS.split(text):
        yield from re.split("[_-]", part) if _CHAIN.fullmatch(part) else [part]


def numbering(mutants: Sequence[Sequence[Substitution]], residues: str) -> Numbering:
    """Find where the numbers begin, from the residues that the mutants say they replace.

    From 1 where that fits all of them, else from 0, else the only number that fits.

    Raises:
        ValueError: none fits, or several do.
    """
    places: dict[int, str] = {}
    for substitution in (s for mutant in mutants for s in mutant):
        if places.setdefault(substitution.number, substitution.wild) != substitution.wild:
            raise ValueError(
                f"mutants: residue {substitution.number} is {places[substitution.number]} in one "
                f"and {substitution.wild} in another"
            )
    low, high = min(places, default=1), max(places, default=1)
    fitting = [
        first
        for first in range(high - len(residues) + 1, low + 1)
        if all(residues[number - first] == wild for number, wild in places.items())
    ]
    for usual in (1, 0):
        if usual in fitting:
            return Numbering(usual, ambiguous=bool(places) and {0, 1} <= {*fitting})
    if len(fitting) == 1 and len(places) > 2:
        return Numbering(fitting[0])
    wrong = min(n for n, w in places.items() if not 1 <= n <= len(residues) or residues[n - 1] != w)
    there = residues[wrong - 1] if 1 <= wrong <= len(residues) else "beyond its end"
    raise ValueError(
        f"mutants: {places[wrong]}{wrong}: the wild type has {there} there, and no other numbering "
        "fits all of them: are they of this protein?"
    )


def mutated(residues: str, mutant: Sequence[Substitution], first: int = 1) -> str:
    """Return a wild type with substitutions, numbered from ``first``."""
    letters = list(residues)
    for substitution in mutant:
        letters[substitution.number - first] = substitution.new
    return "".join(letters)


def every_substitution(residues: str) -> list[Substitution]:
    """Return the 19 other standard residues at every position, numbered from 1."""
    return [
        Substitution(wild, number, new)
        for number, wild in enumerate(residues, start=1)
        for new in STANDARD_RESIDUES
        if new != wild
    ]


def read_mutants(given: str) -> list[str]:
    """Return the mutants of a file with one on each line, or of a list with commas between them.

    Raises:
        ValueError: there is none, or no such file, or it is not text.
    """
    if os.path.isfile(given):  # False, too, where it is too long for a name
        try:
            lines = Path(given).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"--mutants {given}: is not text") from None
        mutants = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if mutants and mutants[0].lower() in MUTANT_COLUMNS:  # of a table with one column
            del mutants[0]
    elif given.lower().endswith((".txt", ".csv", ".tsv", ".list")):
        raise ValueError(f"--mutants {given}: there is no such file")
    else:
        mutants = [part.strip() for part in given.split(",") if part.strip()]
    if not mutants:
        raise ValueError(f"--mutants {given}: no mutant in it")
    return mutants

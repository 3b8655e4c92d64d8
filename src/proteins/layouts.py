"""The alphabet of proteins and the text layout that the language models are trained on.

ProtGPT2 was trained on FASTA bodies (Ferruz et al. 2022, Nature Communications 13:4348, Methods):
an end-of-text marker, a newline, the residues with a newline after each 60, a newline, and the
end-of-text marker again. All code builds and reads such texts with :func:`layout`,
:func:`prompt_layout` and :func:`residues_of`.
"""

from __future__ import annotations

import random

END_OF_TEXT = "<|endoftext|>"
RESIDUES_PER_LINE = 60
STANDARD_RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
AMBIGUOUS_RESIDUES = "BJOUXZ"
"""Other letters of UniProt: ambiguity codes, selenocysteine and pyrrolysine."""
PROTEIN_LETTERS = frozenset(STANDARD_RESIDUES + AMBIGUOUS_RESIDUES)


def layout(residues: str) -> str:
    r"""Return a protein as text for a model.

    Args:
        residues: one-letter codes, without white space.

    Returns:
        ``<|endoftext|>\n`` + lines of 60 residues joined by ``\n`` + ``\n<|endoftext|>``.

    Raises:
        ValueError: ``residues`` is empty or holds a character that is no upper-case letter.
    """
    if not residues:
        raise ValueError("a protein needs at least one residue")
    if not (residues.isascii() and residues.isalpha() and residues.isupper()):
        bad = next(c for c in residues if not ("A" <= c <= "Z"))
        raise ValueError(f"{bad!r} is not a residue: clean the protein before laying it out")
    return f"{END_OF_TEXT}\n" + "\n".join(lines_of(residues)) + f"\n{END_OF_TEXT}"


def lines_of(residues: str) -> list[str]:
    """Return residues in lines of 60."""
    starts = range(0, len(residues), RESIDUES_PER_LINE)
    return [residues[start : start + RESIDUES_PER_LINE] for start in starts]


def prompt_layout(residues: str = "") -> str:
    """Return the beginning of a laid-out protein, for a model to continue.

    Args:
        residues: the first residues, possibly none.

    Returns:
        The text of :func:`layout` up to the last residue; without residues, the marker and the
        first newline.
    """
    if not residues:
        return f"{END_OF_TEXT}\n"
    return layout(residues).removesuffix(f"\n{END_OF_TEXT}")


def residues_of(text: str) -> str:
    """Return the residues of a laid-out protein: the inverse of :func:`layout`.

    Args:
        text: of one protein; the markers at its ends may be missing, and line breaks may be
            anywhere, as in generated text.

    Raises:
        ValueError: ``text`` has a marker between residues (more than one protein), or a character
            that is neither an upper-case letter nor white space.
    """
    body = text.strip().removeprefix(END_OF_TEXT).removesuffix(END_OF_TEXT)
    residues = "".join(body.split())
    if END_OF_TEXT in residues:
        raise ValueError("more than one protein in the text: split it at the end-of-text markers")
    if residues and not (residues.isascii() and residues.isalpha() and residues.isupper()):
        bad = next(c for c in residues if not ("A" <= c <= "Z"))
        raise ValueError(f"{bad!r} is not a residue")
    return residues


def shuffled(residues: str, seed: int = 0) -> str:
    """Return the residues in a random order that depends on them and the seed alone."""
    letters = list(residues)
    random.Random(f"{seed} {residues}").shuffle(letters)
    return "".join(letters)

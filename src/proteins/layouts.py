"""The alphabet of proteins and the text layouts that language models are trained on.

A layout is a template: text with ``{residues}`` in it, or ``{lines}`` (a newline after each 60
residues) or ``{spaced}`` (a space after each). ``{begin}`` and ``{end}`` are the tokenizer's
markers. Any other name is a tag: of each protein the value of that key in its FASTA header
(``>P1 EC=3.2.1.17``) or of that column of its table, up to a ``;``, ``,`` or ``|``. A marker must
stand between it and the residues.

:data:`LAYOUTS` is the one table of layouts; one more entry is all that a new layout needs. A
tokenizer carries its own (:func:`layout_of`, :func:`set_layout`), also on disk, in
``tokenizer_config.json``.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

END_OF_TEXT = "<|endoftext|>"
RESIDUES_PER_LINE = 60
STANDARD_RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
AMBIGUOUS_RESIDUES = "BJOUXZ"
"""Other letters of UniProt: ambiguity codes, selenocysteine and pyrrolysine."""
PROTEIN_LETTERS = frozenset(STANDARD_RESIDUES + AMBIGUOUS_RESIDUES)
LAYOUTS = {
    "protgpt2": f"{END_OF_TEXT}\n{{lines}}\n{END_OF_TEXT}",
    "zymctrl": "{EC}<sep><start>{residues}<end>",
    "progen": "1{residues}2",
    "plain": "{begin}{residues}{end}",
    "spaced": "{begin} {spaced} {end}",
}
"""Templates by name. ProtGPT2: Ferruz et al. 2022, Nature Communications 13:4348, Methods, a FASTA
body between end-of-text markers; ZymCTRL: Munsamy et al. 2022, NeurIPS MLSB; ProGen2: Nijkamp et
al. 2023, Cell Systems 14:968, ``1`` and ``2`` for the two ends."""
CONFIG_KEY = "protein_layout"
"""Of a tokenizer's configuration."""
_GUESS = "_protein_layout"
_BODIES = ("residues", "lines", "spaced")
_FIELD = re.compile(r"\{(\w+)\}")
_MARK = re.compile(r"[^A-Za-z\s]")
"""What no residue is: by it a tag's end is known."""


class TaggedProtein(str):
    """Residues with the tag that a layout asks for."""

    tag: str

    def __new__(cls, residues: str, tag: str) -> TaggedProtein:
        """Return residues that carry a tag."""
        protein = super().__new__(cls, residues)
        protein.tag = tag
        return protein

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        """Return what a copy is made from in another process."""
        return str(self), self.tag

    def __getitem__(self, index: Any) -> TaggedProtein:
        """Return a part, which has the same tag."""
        return TaggedProtein(super().__getitem__(index), self.tag)


@dataclass(frozen=True)
class Layout:
    r"""A template without ``{begin}`` and ``{end}``, which are spelt out.

    Raises:
        ValueError: the template has no residues, or more than one tag.
    """

    template: str

    def __post_init__(self) -> None:
        """Check the template."""
        names = _FIELD.findall(self.template)
        bodies = [name for name in names if name in _BODIES]
        one_body = len(bodies) == 1 and len(names) <= 2 and names[-1] in _BODIES
        if not one_body or (self.tag is not None and not _MARK.search(self.opening)):
            raise ValueError(
                f"--layout {self.template!r}: needs {{residues}} once (or {{lines}} or {{spaced}}) "
                "and at most one tag before it, with a marker between them, for example "
                "'{begin}{tag}<start>{residues}{end}'"
            )

    @property
    def name(self) -> str:
        """Its name in the table, or its template."""
        return next((n for n, t in LAYOUTS.items() if t == self.template), self.template)

    @cached_property
    def tag(self) -> str | None:
        """The key of the tag, or None."""
        return next((n for n in _FIELD.findall(self.template) if n not in _BODIES), None)

    @cached_property
    def body(self) -> str:
        """The kind of body: ``residues``, ``lines`` or ``spaced``."""
        return next(n for n in _FIELD.findall(self.template) if n in _BODIES)

    @cached_property
    def parts(self) -> tuple[str, str]:
        """The text before and after the residues, the tag's place still in the first."""
        before, after = self.template.split(f"{{{self.body}}}")
        return before, after

    @property
    def opening(self) -> str:
        """The text between the tag, or the beginning, and the residues."""
        return self.parts[0].rpartition(f"{{{self.tag}}}")[2]

    @property
    def untagged(self) -> Layout:
        """The same layout without its tag."""
        return Layout(self.template.replace(f"{{{self.tag}}}", ""))

    def text(self, residues: str) -> str:
        """Return a protein as text for a model.

        Args:
            residues: one-letter codes, without white space; a :class:`TaggedProtein` where the
                layout has a tag.

        Raises:
            ValueError: ``residues`` is empty, holds a character that is no upper-case letter, or
                has no tag.
        """
        if not residues:
            raise ValueError("a protein needs at least one residue")
        _require_letters(residues, ": clean the protein before laying it out")
        return self._before(residues) + self._body(residues) + self.parts[1]

    def prompt(self, residues: str = "") -> str:
        """Return the beginning of a protein, up to its last residue, for a model to continue."""
        if not residues:
            return self._before(residues)
        return self.text(residues).removesuffix(self.parts[1])

    def _before(self, residues: str) -> str:
        if self.tag is None:
            return self.parts[0]
        tag = getattr(residues, "tag", "")
        if not tag:
            raise ValueError(
                f"the layout {self.template} needs {self.tag} of each protein: '{self.tag}=...' in "
                f"its FASTA header, a column {self.tag} of its table, generate.py --tag; or one "
                "value for all, in its place in --layout"
            )
        return self.parts[0].replace(f"{{{self.tag}}}", tag)

    def _body(self, residues: str) -> str:
        if self.body == "lines":
            return "\n".join(lines_of(residues))
        return " ".join(residues) if self.body == "spaced" else str(residues)

    def read(self, text: str) -> str:
        """Return the residues of a laid-out protein, with its tag if it has one.

        Args:
            text: of one protein; the markers at its ends may be missing, and white space may be
                anywhere, as in generated text.

        Raises:
            ValueError: there is a marker between residues (more than one protein), or a character
                that is neither an upper-case letter nor white space.
        """
        before, after = ("".join(part.split()) for part in self.parts)
        joined, tag = "".join(text.split()), ""
        if self.tag is not None:
            front, before = before.split(f"{{{self.tag}}}")
            if before in joined:
                tag, _, joined = joined.removeprefix(front).rpartition(before)
        residues = joined.removeprefix(before).removesuffix(after)
        several = any(marker and marker in residues for marker in (before, after))
        if several or re.search(f"{re.escape(before)}[A-Z]+{re.escape(after)}", tag):
            raise ValueError("more than one protein in the text: split it at its markers")
        _require_letters(residues, "")
        return TaggedProtein(residues, tag) if tag else residues


def _require_letters(residues: str, advice: str) -> None:
    if residues and not (residues.isascii() and residues.isalpha() and residues.isupper()):
        bad = next(c for c in residues if not ("A" <= c <= "Z"))
        raise ValueError(f"{bad!r} is not a residue{advice}")


PROTGPT2 = Layout(LAYOUTS["protgpt2"])


def layout(residues: str) -> str:
    r"""Return a protein in ProtGPT2's layout.

    Returns:
        ``<|endoftext|>\n`` + lines of 60 residues joined by ``\n`` + ``\n<|endoftext|>``.

    Raises:
        ValueError: ``residues`` is empty or holds a character that is no upper-case letter.
    """
    return PROTGPT2.text(residues)


def lines_of(residues: str) -> list[str]:
    """Return residues in lines of 60."""
    starts = range(0, len(residues), RESIDUES_PER_LINE)
    return [residues[start : start + RESIDUES_PER_LINE] for start in starts]


def shuffled(residues: str, seed: int = 0) -> str:
    """Return the residues in a random order that depends on them and the seed alone."""
    letters = list(residues)
    random.Random(f"{seed} {residues}").shuffle(letters)
    return tagged_as(residues, "".join(letters))


def tagged_as(other: str, residues: str) -> str:
    """Return residues with the tag of another protein, if it has one."""
    return TaggedProtein(residues, other.tag) if isinstance(other, TaggedProtein) else residues


def tag_in(header: str, key: str) -> str:
    """Return the value of a key of a header (``EC=3.2.1.17``), the first; empty without one."""
    match = re.search(rf"(?:^|[\s|;,\[(]){re.escape(key)}[=:]\s*([^\s|;,\])]+)", header, re.I)
    return "" if match is None else match[1]


# The layout of a tokenizer


def spelt_out(template: str, tokenizer: Any) -> Layout:
    """Return a layout of the table, or a template, with a tokenizer's markers in it.

    Raises:
        ValueError: the template is none, or names a marker that the tokenizer lacks.
    """
    template = LAYOUTS.get(template, template).replace("\\n", "\n")
    begins = (tokenizer.bos_token, tokenizer.cls_token, tokenizer.eos_token)
    ends = (tokenizer.eos_token, tokenizer.sep_token)
    for field, markers in (("begin", begins), ("end", ends)):
        if f"{{{field}}}" in template:
            marker = next(filter(None, markers), None)
            if marker is None:
                raise ValueError(f"--layout: the tokenizer has no marker for {{{field}}}")
            template = template.replace(f"{{{field}}}", str(marker))
    return Layout(template)


def layout_of(tokenizer: Any) -> Layout:
    """Return the layout that a tokenizer carries; ProtGPT2's where it carries none."""
    template = stated_layout(tokenizer) or getattr(tokenizer, _GUESS, None)
    return Layout(template) if isinstance(template, str) else PROTGPT2


def stated_layout(tokenizer: Any) -> str | None:
    """Return the template that a tokenizer was saved with or given, None without one."""
    return getattr(tokenizer, "init_kwargs", {}).get(CONFIG_KEY)


def guess_layout(tokenizer: Any, guess: Layout) -> None:
    """Let a tokenizer carry a layout for as long as it is given no other."""
    setattr(tokenizer, _GUESS, guess.template)


def set_layout(tokenizer: Any, chosen: Layout, stated: bool = False) -> None:
    """Let a tokenizer carry a layout, also where it is saved.

    ProtGPT2's, which goes without saying else, is written down too where somebody ``stated`` it.
    """
    guess_layout(tokenizer, chosen)
    if chosen == PROTGPT2 and not stated:
        tokenizer.init_kwargs.pop(CONFIG_KEY, None)
    else:
        tokenizer.init_kwargs[CONFIG_KEY] = chosen.template


def stop_token(tokenizer: Any) -> int:
    """Return the id of the token that ends a protein: the first that follows its last line.

    Raises:
        ValueError: nothing follows, and the tokenizer has no end marker.
    """
    layout = layout_of(tokenizer)
    after = layout.parts[1].strip()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    if not ids and tokenizer.eos_token_id is None:
        raise ValueError(
            f"--layout {layout.template!r}: nothing ends a protein: write its marker behind "
            f"{{{layout.body}}}"
        )
    return int(ids[0]) if ids else int(tokenizer.eos_token_id)

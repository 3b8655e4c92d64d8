"""Filters for sampled proteins: repeats, identity to known proteins, duplicates.

Every filter judges one protein; :class:`Filters` puts them together and names the reason. The
limits and reasons stand here once, for ``scripts/generate.py`` and the candidates of
``scripts/specialise.py`` (:mod:`src.experiments.candidates`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from src.evaluation.composition import repeat_share
from src.proteins.encoding import token_letters
from src.proteins.layouts import PROTEIN_LETTERS, STANDARD_RESIDUES
from src.proteins.relatives import Relatives

SEEN = "sampled before"
TOO_CLOSE = "too close to a known protein"
REPEATED = "with repeats"
LOW_COMPLEXITY = "of low complexity"
NO_HIT = "not hit by the family's profile"
WHY = {
    SEEN: "a second copy costs an experiment and tells nothing",
    TOO_CLOSE: "the protein is known already: the model has copied it",
    REPEATED: "models fall into repeats, and natural proteins rarely have them",
    LOW_COMPLEXITY: "few kinds of residues in a row rarely fold",
    NO_HIT: "what the members have in common is missing, so the protein is hardly of the family",
}
"""Reasons to discard a protein, in the order in which they are checked, each with its why."""
MOST_REPEATS = 0.1
"""Largest share of residues in tandem repeats. Of 1,500 natural proteins of the bundled test part
1.3 % have more."""
MOST_LOW_COMPLEXITY = 0.25
"""Largest share of residues in windows of low complexity. Of 382 natural proteins of known families
1.3 % have more, and of 2,000 of new ones 1.1 %."""


def has_repeats(residues: str) -> bool:
    """Return whether more than a tenth of the residues stands in tandem repeats."""
    return repeat_share(residues) > MOST_REPEATS


def banned_tokens(tokenizer: Any, residues: str, vocabulary: int) -> Tensor:
    """Return which tokens hold one of these residues, ``(V,)`` bool.

    A protein whose every token avoids them has none of them, however many residues a token holds.

    Raises:
        ValueError: a letter is no residue, or no standard residue is left.
    """
    wrong = sorted(set(residues) - PROTEIN_LETTERS)
    if wrong:
        letters = "".join(sorted(PROTEIN_LETTERS))
        raise ValueError(f"--ban_residues: {wrong[0]!r} is none of {letters}")
    if set(residues) >= set(STANDARD_RESIDUES):
        raise ValueError("--ban_residues: leaves no residue")
    banned = torch.zeros(vocabulary, dtype=torch.bool)
    for token, letters in enumerate(token_letters(tokenizer)[:vocabulary] if residues else ()):
        banned[token] = not set(residues).isdisjoint(letters)
    return banned


@dataclass
class Filters:
    """Conditions on sampled proteins beside being whole and long enough.

    Attributes:
        drop_repeats: discard proteins with repeats (:func:`has_repeats`).
        max_identity: discard proteins that share more than this with one of ``against``: identical
            pairs of the best local alignment / residues of the sampled protein
            (:func:`src.proteins.relatives.nearest_identities`); None: no limit.
        against: the known proteins.
        distinct: keep the first of equal proteins.
    """

    drop_repeats: bool = False
    max_identity: float | None = None
    against: Sequence[str] = ()
    distinct: bool = False
    known: Relatives | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Index the known proteins. Raises ``ValueError``."""
        if (self.max_identity is None) != (not self.against):
            raise ValueError("--max_identity and --against go together: which proteins, how close")
        if self.max_identity is not None:
            if not 0 <= self.max_identity <= 1:
                raise ValueError(f"--max_identity must be in [0, 1], got {self.max_identity}")
            self.known = Relatives(self.against)

    def reason(self, residues: str) -> str | None:
        """Return why a protein is discarded, or None; duplicates are not checked here."""
        if self.drop_repeats and has_repeats(residues):
            return REPEATED
        if self.known is not None and self.max_identity is not None:
            identity = self.known.identities([residues])["identity"][0]
            if identity > self.max_identity:
                return TOO_CLOSE
        return None

"""Log-likelihoods of whole proteins under a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from src.evaluation.scoring import EvaluationSettings, protein_nll
from src.models.loading import ProteinModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ProteinScores:
    """Likelihoods of P proteins: ``nll`` in nats, ``residues`` and predicted ``tokens``, ``(P,)``.

    The NLL of a protein that does not fit the model or its tokenizer is NaN.
    """

    nll: np.ndarray
    residues: np.ndarray
    tokens: np.ndarray

    @property
    def perplexity_per_residue(self) -> list[float | None]:
        """exp(NLL / residues) of each protein; None where it does not fit the model."""
        values = np.exp(self.nll / self.residues)
        return [float(value) if math.isfinite(value) else None for value in values]


def score_proteins(
    model: PreTrainedModel,
    tokenizer: Any,
    proteins: Sequence[str],
    whole: Sequence[bool] | None = None,
    batch_size: int = 32,
    shared: bool = False,
) -> ProteinScores:
    """Score proteins under a model: -log p(the laid-out protein after its first token | that).

    Line breaks and, of a whole protein, the end are counted.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        proteins: residues of each.
        whole: of each, whether its end counts; None: of all.
        batch_size: proteins scored at a time; they are grouped by length.
        shared: all processes call this together, and each scores a share.

    Returns:
        Their likelihoods: NaN where a protein is longer than the model takes, or its tokens do not
        spell it, which would be another protein's.

    Raises:
        ValueError: the model does not know a token.
    """
    rows, takes = ProteinModel(model, tokenizer).rows(proteins, whole)
    fits, lengths = np.flatnonzero(takes), np.array([len(row) for row in rows], dtype=np.int64)
    nll = np.full(len(rows), np.nan)
    if len(fits):
        settings = EvaluationSettings(batch_size=batch_size)
        nll[fits] = protein_nll(model, [rows[i] for i in fits], settings, shared=shared)
    return ProteinScores(nll, np.array([len(p) for p in proteins]), lengths - 1)

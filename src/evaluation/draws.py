"""Draws tokens: penalty, temperature, top k and top p as transformers has them, one number a draw.

transformers' processors work on whole rows of the vocabulary. Here a top k leaves a short row of
candidates first, and the rest is done on these; what remains possible, and how likely it is, is
the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.generation.logits_process import TopPLogitsWarper

WHOLE_ROWS = 4096
"""Up to this vocabulary a top k is searched in the whole row."""


@dataclass(frozen=True)
class Warp:
    """Changes to logits before a draw, in transformers' order.

    Attributes:
        repetition_penalty: divides the logits of tokens that occurred (multiplies negative ones).
        temperature: divides the logits.
        top_k: leave so many likeliest tokens, and those as likely as the last of them; 0: all.
        top_p: leave the likeliest tokens that hold this share of the probability.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __call__(self, logits: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the scores of candidates, -inf where excluded, and their token ids.

        Args:
            logits: ``(B, V)``; may be changed in place.
            before: ``(B, n)`` the tokens that occurred in each row; needed for a penalty.

        Returns:
            ``(B, C)`` scores, and ``(B, C)`` ids in rising order; None where they are the columns.
        """
        if self.repetition_penalty != 1.0:
            assert before is not None
            seen = logits.gather(1, before)
            penalty = self.repetition_penalty
            seen = torch.where(seen < 0, seen * penalty, seen / penalty)
            logits = logits.scatter_(1, before, seen)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        scores, ids = likeliest(logits, self.top_k)
        if self.top_p < 1.0:
            scores = TopPLogitsWarper(self.top_p)(None, scores)  # type: ignore[arg-type]
        return scores, ids


def likeliest(scores: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
    """Leave the k largest scores of each row, and those that equal the smallest of these.

    Args:
        scores: ``(B, V)``.
        k: 0: leave all.

    Returns:
        As :meth:`Warp.__call__`. A long row is first cut to what reaches the k-th largest maximum
        of blocks of it: at least k scores do, and few others.
    """
    size = scores.shape[1]
    if k == 0 or k >= size:
        return scores, None
    if size <= WHOLE_ROWS:
        return scores.masked_fill(scores < _kth_largest(scores, k), -torch.inf), None
    width = max(1, size // (2 * k))
    blocks = size // width
    tops = scores[:, : blocks * width].reshape(-1, blocks, width).amax(-1)
    floor = _kth_largest(tops, k).clamp(min=torch.finfo(scores.dtype).min)
    rows, columns = (scores >= floor).nonzero(as_tuple=True)  # ids rise within a row
    counts = torch.bincount(rows, minlength=len(scores))
    starts = counts.cumsum(0) - counts
    places = torch.arange(len(rows), device=rows.device) - starts[rows]
    shape = (len(scores), max(k, int(counts.max())))
    short = scores.new_full(shape, -torch.inf)
    ids = columns.new_zeros(shape)
    short[rows, places] = scores[rows, columns]
    ids[rows, places] = columns
    return short.masked_fill_(short < _kth_largest(short, k), -torch.inf), ids


def _kth_largest(scores: Tensor, k: int) -> Tensor:
    """Return the k-th largest score of each row, ``(B, 1)``, from the shorter end."""
    others = scores.shape[1] - k
    if others < k:
        smallest = scores.topk(others + 1, dim=1, largest=False, sorted=False)
        return smallest.values.amax(1, keepdim=True)
    return scores.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)


def pick(scores: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one column a row by inverting the cumulative distribution.

    Args:
        scores: ``(B, C)`` warped logits, -inf where excluded.
        uniforms: ``(B,)`` numbers in [0, 1), in float64.

    Returns:
        ``(B,)`` the first column v with Σ_{w ≤ v} softmax(scores)_w above the number: v has
        probability softmax(scores)_v, and none that is excluded is ever drawn.

    Raises:
        ValueError: the scores of a row are not numbers, or all excluded.
    """
    cumulative = scores.softmax(-1).cumsum(-1, dtype=torch.float64)  # (B, C)
    total = cumulative[:, -1:]
    if not torch.isfinite(total).all():
        raise ValueError("the model's output is not a number: its weights are broken or overflow")
    # The sum is not exactly 1, so the number is scaled by it.
    return torch.searchsorted(cumulative, uniforms[:, None] * total, right=True).squeeze(-1)


def attempt_stream(seed: int, attempt: int, count: int) -> np.ndarray:
    """Return the uniform numbers in [0, 1) of an attempt: a function of seed and attempt alone."""
    return np.random.Generator(np.random.Philox(key=[seed, attempt])).random(count)

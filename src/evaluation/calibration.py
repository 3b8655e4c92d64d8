"""Measures calibration from sums over proteins, so that a bootstrap can reweight the proteins."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import fft, special

BINS = 15
WIDTH_EDGES = np.linspace(0.0, 1.0, BINS + 1)
"""Edges of bins of equal width, ``(B + 1,)``."""
SMOOTH_CELLS = 250
"""Cells of [0, 1] on which residuals are smoothed: finer than any bandwidth that matters."""


def equal_mass_edges(confidence: np.ndarray) -> np.ndarray:
    """Return the 16 edges that put the same number of confidences into each bin.

    Where many confidences are equal, bins can come out empty; an empty bin adds nothing.
    """
    edges = np.quantile(confidence, np.linspace(0, 1, BINS + 1))
    edges[0], edges[-1] = 0.0, 1.0
    return np.maximum.accumulate(edges)


def bin_sums(
    confidence: np.ndarray,
    correct: np.ndarray,
    edges: np.ndarray,
    groups: np.ndarray,
    count: int,
) -> np.ndarray:
    """Return counts, confidences and outcomes summed by bin of confidence and group.

    Args:
        confidence: ``(N,)`` in [0, 1].
        correct: ``(N,)`` 0 or 1.
        edges: ``(B + 1,)``; a bin holds its upper edge, the first also 0 (Guo et al. 2017,
            arXiv:1706.04599).
        groups: ``(N,)`` protein of each token, from 0.
        count: number of groups G.

    Returns:
        ``(G, B, 3)``: tokens, Σ confidence, Σ correct.
    """
    bins = len(edges) - 1
    which = np.searchsorted(edges[1:-1], confidence, side="left")
    place = np.asarray(groups, dtype=np.int64) * bins + which
    sums = [
        np.bincount(place, weights=values, minlength=count * bins)
        for values in (None, confidence, correct)
    ]
    return np.stack(sums, axis=-1).reshape(count, bins, 3).astype(np.float64)


def calibration_error(sums: np.ndarray) -> np.ndarray:
    """Return ECE = Σ_b n_b/N |accuracy_b - confidence_b|.

    Args:
        sums: ``(..., B, 3)`` of :func:`bin_sums`, summed over groups.

    Returns:
        ``(...)`` in [0, 1] (Guo et al. 2017, arXiv:1706.04599, eq. 3).
    """
    share, gap, _variance = _bins(sums)
    return (share * np.abs(gap)).sum(-1)


def debiased_calibration_error(sums: np.ndarray) -> np.ndarray:
    """Return the ECE less what chance adds to it.

    Even of a perfectly calibrated model |accuracy - confidence| is above 0 in a finite bin. With
    the gap of a bin taken as normal with variance accuracy (1 - accuracy) / n, the expected excess
    of its absolute value is subtracted (Kumar, Liang & Ma 2019, arXiv:1909.10155, section 5; their
    sampling from the normal is replaced by its closed form).

    Args:
        sums: ``(..., B, 3)``.

    Returns:
        ``(...)``, not below 0.
    """
    share, gap, variance = _bins(sums)
    spread = np.sqrt(variance)
    ratio = np.divide(gap, spread, out=np.zeros_like(gap), where=spread > 0)
    folded = spread * math.sqrt(2 / math.pi) * np.exp(-(ratio**2) / 2) + gap * special.erf(
        ratio / math.sqrt(2)
    )
    folded = np.where(spread > 0, folded, np.abs(gap))
    return np.maximum(0.0, (share * (2 * np.abs(gap) - folded)).sum(-1))


def _bins(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each bin's share of tokens, accuracy - confidence, and the variance of accuracy."""
    n, confidence, correct = np.moveaxis(np.asarray(sums, dtype=np.float64), -1, 0)
    total = n.sum(-1, keepdims=True)
    filled = np.where(n > 0, n, 1.0)
    accuracy = correct / filled
    share = n / np.where(total > 0, total, 1.0)
    variance = accuracy * (1 - accuracy) / np.maximum(n - 1, 1.0)
    return share, accuracy - confidence / filled, np.maximum(variance, 0.0)


def residual_sums(
    confidence: np.ndarray,
    correct: np.ndarray,
    groups: np.ndarray,
    count: int,
) -> np.ndarray:
    """Sum correct - confidence in fine cells of confidence: ``(G, cells)``, for the smooth ECE."""
    cells = SMOOTH_CELLS
    which = np.minimum((confidence * cells).astype(np.int64), cells - 1)
    place = np.asarray(groups, dtype=np.int64) * cells + which
    residual = np.asarray(correct, dtype=np.float64) - confidence
    return np.bincount(place, weights=residual, minlength=count * cells).reshape(count, cells)


def smooth_calibration_error(residuals: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the smooth ECE of Błasiok & Nakkiran (2023, arXiv:2309.12236).

    With residuals smoothed by a Gaussian of width σ that is reflected at 0 and 1, smECE_σ is the
    integral of their absolute value over [0, 1]; it falls as σ grows, and smECE is where it equals
    σ (their section 3.2). Reflected Gaussian smoothing is diffusion in a closed box, so each cosine
    mode k decays by exp(-σ² π² k² / 2): one cosine transform serves every σ.

    Args:
        residuals: ``(..., cells)`` of :func:`residual_sums`, summed over groups.
        tokens: ``(...)`` number of tokens.

    Returns:
        ``(...)`` in [0, 1].
    """
    residuals = np.asarray(residuals, dtype=np.float64)
    n = np.asarray(tokens, dtype=np.float64)[..., None]
    modes = np.asarray(fft.dct(residuals / np.where(n > 0, n, 1.0), axis=-1, norm="ortho"))
    decay = -((math.pi * np.arange(residuals.shape[-1])) ** 2) / 2
    low = np.zeros(residuals.shape[:-1])
    high = np.ones(residuals.shape[:-1])
    for _ in range(20):  # to one part in a million
        middle = (low + high) / 2
        damped = modes * np.exp(decay * middle[..., None] ** 2)
        smoothed = np.asarray(fft.idct(damped, axis=-1, norm="ortho"))
        above = np.abs(smoothed).sum(-1) > middle
        low = np.where(above, middle, low)
        high = np.where(above, high, middle)
    return (low + high) / 2


def reliability_curve(sums: np.ndarray, edges: np.ndarray) -> dict[str, list]:
    """Return the curve of a reliability diagram.

    Args:
        sums: ``(B, 3)``.
        edges: ``(B + 1,)``.

    Returns:
        ``edges``, and for each bin ``count`` and the means ``confidence`` and ``accuracy`` (None
        in an empty bin).
    """
    count = [int(n) for n in sums[:, 0]]

    def means(column: int) -> list[float | None]:
        return [
            float(s / n) if n else None for s, n in zip(sums[:, column], sums[:, 0], strict=True)
        ]

    return {
        "edges": [float(edge) for edge in edges],
        "count": count,
        "confidence": means(1),
        "accuracy": means(2),
    }


@dataclass(frozen=True)
class CalibrationSums:
    """Per-protein sums from which all calibration measures of one model follow.

    Attributes:
        width: ``(P, B, 3)`` in bins of equal width.
        mass: ``(P, B, 3)`` in bins of equal mass; edges from all proteins, kept when resampling.
        residuals: ``(P, cells)``.
    """

    width: np.ndarray
    mass: np.ndarray
    residuals: np.ndarray

    @classmethod
    def collect(
        cls,
        confidence: np.ndarray,
        correct: np.ndarray,
        groups: np.ndarray,
        count: int,
    ) -> CalibrationSums:
        """Sum ``(N,)`` confidences and outcomes by the protein ``(N,)`` that they belong to."""
        confidence = np.asarray(confidence, dtype=np.float64)
        return cls(
            bin_sums(confidence, correct, WIDTH_EDGES, groups, count),
            bin_sums(confidence, correct, equal_mass_edges(confidence), groups, count),
            residual_sums(confidence, correct, groups, count),
        )

    def arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """Return the sums by name, as a bootstrap takes them."""
        return {
            f"{prefix}width": self.width,
            f"{prefix}mass": self.mass,
            f"{prefix}residuals": self.residuals,
        }


Sums = Mapping[str, np.ndarray]


def _tokens(sums: Sums, prefix: str) -> np.ndarray:
    return sums[f"{prefix}width"][..., 0].sum(-1)


def _mean(column: int) -> Callable[[Sums, str], np.ndarray]:
    def mean(sums: Sums, prefix: str) -> np.ndarray:
        tokens = _tokens(sums, prefix)
        return sums[f"{prefix}width"][..., column].sum(-1) / np.where(tokens > 0, tokens, 1.0)

    return mean


MEASURES: dict[str, Callable[[Sums, str], np.ndarray]] = {
    "ece": lambda sums, prefix: calibration_error(sums[f"{prefix}width"]),
    "ece_equal_mass": lambda sums, prefix: calibration_error(sums[f"{prefix}mass"]),
    "ece_debiased": lambda sums, prefix: debiased_calibration_error(sums[f"{prefix}mass"]),
    "smooth_ece": lambda sums, prefix: smooth_calibration_error(
        sums[f"{prefix}residuals"], _tokens(sums, prefix)
    ),
    "accuracy": _mean(2),
    "mean_confidence": _mean(1),
}
"""Each measure from (weighted) sums ``{prefix}width`` and ``{prefix}mass`` ``(..., B, 3)`` and
``{prefix}residuals`` ``(..., cells)``: ``(...)``. ``ece`` has bins of equal width, the other errors
bins of equal mass."""

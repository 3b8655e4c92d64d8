"""What is measured at each token and over many: likelihood, divergence, calibration, composition.

Sums over proteins come first and figures second, so that a bootstrap over clusters of proteins can
recompute any figure from weighted sums. All logarithms are natural: figures are in nats unless
their name says bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import fft, special
from torch import Tensor

from src.loss.reference import at_least_float32, check_vocabularies, divergence, entropy
from src.proteins.layouts import STANDARD_RESIDUES

BINS = 15
SMOOTH_CELLS = 250
"""Cells of [0, 1] on which residuals are smoothed: finer than any bandwidth that matters."""
LOW_COMPLEXITY_WINDOW = 12
LOW_COMPLEXITY_BITS = 2.2
"""Window and entropy of SEG's first pass (Wootton & Federhen 1993, Computers & Chemistry 17:149)"""
LONG_RUN = 6
"""Residues of one kind in a row that count as a repeat."""
PSEUDOCOUNT = 0.5

SWISSPROT_PERCENT = {
    "A": 8.25, "R": 5.53, "N": 4.06, "D": 5.45, "C": 1.37, "Q": 3.93, "E": 6.75, "G": 7.07,
    "H": 2.27, "I": 5.96, "L": 9.66, "K": 5.84, "M": 2.42, "F": 3.86, "P": 4.70, "S": 6.56,
    "T": 5.34, "W": 1.08, "Y": 2.92, "V": 6.87,
}  # fmt: skip
"""Amino-acid composition of UniProtKB/Swiss-Prot in percent, from the statistics in the notes of
release 2013_04 (A. Bairoch; also ExPASy ProtScale, scale "A.A. composition in Swiss-Prot")."""


def token_statistics(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Return what is measured at each predicted token, at temperature 1 and in float32 or better.

    Takes about six times the memory of one model's logits while it works: 1.3 GB for 1,024 tokens
    of ProtGPT2's 50,257.

    Args:
        student_logits: ``(N, V)``.
        teacher_logits: ``(N, V)``.
        targets: ``(N,)`` ids of the tokens that came.

    Returns:
        ``(N,)`` each: ``kl`` KL(teacher‖student), ``reverse_kl`` KL(student‖teacher), ``js`` their
        Jensen-Shannon divergence (at most ln 2), ``agree`` (both rank the same token first); and
        for ``student`` and ``teacher`` the keys of :func:`model_statistics` with that ending,
        ``nll_student`` for example.

    Raises:
        ValueError: the vocabularies differ.
    """
    check_vocabularies(student_logits.shape[-1], teacher_logits.shape[-1])
    log_q = at_least_float32(student_logits).log_softmax(-1)  # (N, V)
    log_p = at_least_float32(teacher_logits).log_softmax(-1)
    statistics = {
        # Rounding can push the divergence of two equal distributions a hair below 0.
        "kl": divergence(log_p, log_q, "forward_kl").clamp(min=0),
        "reverse_kl": divergence(log_p, log_q, "reverse_kl").clamp(min=0),
        "js": divergence(log_p, log_q, "jsd", 0.5).clamp(min=0),
        "agree": (log_p.argmax(-1) == log_q.argmax(-1)).to(log_q.dtype),
    }
    for name, log_probs in (("student", log_q), ("teacher", log_p)):
        for key, value in model_statistics(log_probs, targets).items():
            statistics[f"{key}_{name}"] = value
    return statistics


def model_statistics(log_probs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return what is measured of one model at each predicted token.

    Args:
        log_probs: ``(N, V)``.
        targets: ``(N,)``.

    Returns:
        ``(N,)`` each: ``nll`` -log p(target); ``confidence`` max p; ``correct`` (the most probable
        token came); ``brier`` Σ_v (p_v - [v = target])², in [0, 2] (Brier 1950, Monthly Weather
        Review 78:1); ``entropy``.
    """
    confidence, top = log_probs.max(-1)
    picked = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    squares = (2.0 * log_probs).exp().sum(-1)
    return {
        "nll": -picked,
        "confidence": confidence.exp(),
        "correct": (top == targets).to(log_probs.dtype),
        "brier": squares - 2.0 * picked.exp() + 1.0,
        "entropy": entropy(log_probs),
    }


def bits_per_residue(nll: float, residues: float) -> float:
    """Return Σ NLL / (ln 2 · Σ residues), from nats summed over tokens, line breaks and ends."""
    return nll / (math.log(2) * residues)


def equal_width_edges(bins: int = BINS) -> np.ndarray:
    """Return the ``(bins + 1,)`` edges of bins of one width over [0, 1]."""
    return np.linspace(0.0, 1.0, bins + 1)


def equal_mass_edges(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Return the ``(bins + 1,)`` edges that put the same number of confidences into each bin.

    Where many confidences are equal, bins can come out empty; an empty bin adds nothing.
    """
    edges = np.quantile(confidence, np.linspace(0, 1, bins + 1))
    edges[0], edges[-1] = 0.0, 1.0
    return np.maximum.accumulate(edges)


def bin_sums(
    confidence: np.ndarray,
    correct: np.ndarray,
    edges: np.ndarray,
    groups: np.ndarray,
    count: int,
) -> np.ndarray:
    """Sum what calibration needs within each bin of confidence and each group.

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


def l2_calibration_error(sums: np.ndarray, debiased: bool = True) -> np.ndarray:
    """Return the root of Σ_b n_b/N (accuracy_b - confidence_b)².

    Args:
        sums: ``(..., B, 3)``.
        debiased: subtract accuracy (1 - accuracy) / (n - 1), what chance adds to each square
            (Kumar et al. 2019, arXiv:1909.10155, definition 5.1).

    Returns:
        ``(...)``; 0 where the debiased sum is negative.
    """
    share, gap, variance = _bins(sums)
    squares = gap**2 - variance if debiased else gap**2
    return np.sqrt(np.maximum(0.0, (share * squares).sum(-1)))


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
    cells: int = SMOOTH_CELLS,
) -> np.ndarray:
    """Sum correct - confidence in fine cells of confidence: ``(G, cells)``, for the smooth ECE."""
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
    """Per-protein sums from which every calibration figure of one model follows.

    Attributes:
        width: ``(P, B, 3)`` in bins of one width.
        mass: ``(P, B, 3)`` in bins of one mass; edges from all proteins, kept when resampling.
        residuals: ``(P, cells)``.
        width_edges: ``(B + 1,)``.
        mass_edges: ``(B + 1,)``.
    """

    width: np.ndarray
    mass: np.ndarray
    residuals: np.ndarray
    width_edges: np.ndarray
    mass_edges: np.ndarray

    @classmethod
    def collect(
        cls,
        confidence: np.ndarray,
        correct: np.ndarray,
        groups: np.ndarray,
        count: int,
        bins: int = BINS,
    ) -> CalibrationSums:
        """Sum ``(N,)`` confidences and outcomes by the protein ``(N,)`` that they belong to."""
        confidence = np.asarray(confidence, dtype=np.float64)
        width, mass = equal_width_edges(bins), equal_mass_edges(confidence, bins)
        return cls(
            bin_sums(confidence, correct, width, groups, count),
            bin_sums(confidence, correct, mass, groups, count),
            residual_sums(confidence, correct, groups, count),
            width,
            mass,
        )

    def arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """Return the sums by name, as a bootstrap takes them."""
        return {
            f"{prefix}width": self.width,
            f"{prefix}mass": self.mass,
            f"{prefix}residuals": self.residuals,
        }


def calibration_figures(sums: Mapping[str, np.ndarray], prefix: str = "") -> dict[str, np.ndarray]:
    """Return every calibration figure from (weighted) sums over proteins.

    Args:
        sums: ``{prefix}width`` and ``{prefix}mass`` ``(..., B, 3)``, ``{prefix}residuals``
            ``(..., cells)``.
        prefix: of the names.

    Returns:
        ``(...)`` each: ``ece`` (15 bins of one width, the classic), ``ece_equal_mass``,
        ``ece_debiased``, ``l2``, ``l2_debiased`` (bins of one mass), ``smooth_ece``, ``accuracy``
        and ``mean_confidence``.
    """
    width, mass = sums[f"{prefix}width"], sums[f"{prefix}mass"]
    tokens = width[..., 0].sum(-1)
    safe = np.where(tokens > 0, tokens, 1.0)
    return {
        "ece": calibration_error(width),
        "ece_equal_mass": calibration_error(mass),
        "ece_debiased": debiased_calibration_error(mass),
        "l2": l2_calibration_error(mass, debiased=False),
        "l2_debiased": l2_calibration_error(mass),
        "smooth_ece": smooth_calibration_error(sums[f"{prefix}residuals"], tokens),
        "accuracy": width[..., 2].sum(-1) / safe,
        "mean_confidence": width[..., 1].sum(-1) / safe,
    }


def residue_counts(proteins: Iterable[str]) -> np.ndarray:
    """Count the 20 standard residues, in the order of ``STANDARD_RESIDUES``; others are left out.

    Args:
        proteins: residues of each protein.

    Returns:
        ``(20,)``.
    """
    counts = np.zeros(len(STANDARD_RESIDUES), dtype=np.int64)
    for residues in proteins:
        counts += [residues.count(letter) for letter in STANDARD_RESIDUES]
    return counts


def swissprot_frequencies() -> np.ndarray:
    """Return the published frequencies ``(20,)``, scaled to add up to one."""
    percent = np.array([SWISSPROT_PERCENT[letter] for letter in STANDARD_RESIDUES])
    return percent / percent.sum()


def composition_kl(generated: np.ndarray, natural: np.ndarray) -> np.ndarray:
    """Return KL(generated‖natural) of two amino-acid compositions, in nats.

    Args:
        generated: ``(..., 20)`` counts; half a count is added to each residue (Jeffreys), so that
            a residue never generated adds a finite amount.
        natural: ``(20,)`` counts, smoothed alike, or frequencies that add up to one, taken as they
            are.

    Returns:
        ``(...)``. A sample of N residues of the natural composition itself scores about 19 / (2 N).
    """
    p = _shares(np.asarray(generated, dtype=np.float64))
    natural = np.asarray(natural, dtype=np.float64)
    q = natural if np.isclose(natural.sum(), 1.0) else _shares(natural)
    return special.rel_entr(p, q).sum(-1)


def _shares(counts: np.ndarray) -> np.ndarray:
    smoothed = counts + PSEUDOCOUNT
    return smoothed / smoothed.sum(-1, keepdims=True)


def low_complexity_share(residues: str) -> float:
    """Return the share of residues in a window of 12 with an entropy of at most 2.2 bits.

    The first pass of SEG (Wootton & Federhen 1993). Proteins shorter than the window are one
    window. Returns a share in [0, 1].
    """
    letters = np.frombuffer(residues.encode("ascii"), np.uint8)
    if not len(letters):
        return 0.0
    width = min(LOW_COMPLEXITY_WINDOW, len(letters))
    one_hot = letters[:, None] == np.unique(letters)  # (L, kinds)
    running = np.vstack([np.zeros(one_hot.shape[1], np.int64), one_hot.cumsum(0)])
    share = (running[width:] - running[:-width]) / width  # (windows, kinds)
    bits = special.entr(share).sum(-1) / math.log(2)
    low = (bits <= LOW_COMPLEXITY_BITS).astype(np.int64)
    # A residue is covered when any of the windows that hold it is low.
    starts = np.concatenate([[0], low.cumsum()])
    position = np.arange(len(letters))
    first = np.maximum(0, position - width + 1)
    last = np.minimum(len(low), position + 1)
    return float((starts[last] > starts[first]).mean())


def longest_run(residues: str) -> int:
    """Return the length of the longest stretch of one residue; 0 of an empty protein."""
    longest = current = 0
    before = ""
    for letter in residues:
        current = current + 1 if letter == before else 1
        before = letter
        longest = max(longest, current)
    return longest


def distinct_share(proteins: Iterable[str], width: int = 4) -> float:
    """Return distinct words of ``width`` residues over all of them (distinct-n); 0 without any.

    Falls as more is generated: compare sets of the same size.
    """
    words = [p[i : i + width] for p in proteins for i in range(len(p) - width + 1)]
    return len(set(words)) / len(words) if words else 0.0

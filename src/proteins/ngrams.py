"""Baselines that any protein language model must beat: uniform and n-gram models of residues.

They are measured in nats per residue, like the language models: the end of a protein is predicted
like a residue, but not counted in the denominator. A model of tokens must also predict line breaks,
which cost a good model almost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

SYMBOLS = 27
"""The letters A to Z, and the mark before the first and after the last residue."""
EDGE = 26
UNIFORM_NATS = math.log(20)
"""Nats per residue of a model that gives each of the 20 residues 1/20 and the end nothing."""
NAMES = {1: "unigram", 2: "bigram", 3: "trigram"}
CHUNK_PROTEINS = 20_000
HELD_OUT_SHARE = 0.05
EM_ROUNDS = 500


@dataclass(frozen=True)
class NgramModel:
    """An interpolated n-gram model.

    Attributes:
        order: 1, 2 or 3.
        log_probs: ``(27,) * order`` log p(symbol | the order - 1 symbols before it).
        weights: ``(order + 1,)`` shares of uniform, unigram, … in the mixture.
    """

    order: int
    log_probs: np.ndarray
    weights: np.ndarray

    @property
    def name(self) -> str:
        """``unigram``, ``bigram`` or ``trigram``."""
        return NAMES[self.order]

    def nll(self, proteins: Sequence[str]) -> np.ndarray:
        """Return the negative log-likelihood of each protein with its end, ``(P,)`` in nats."""
        flat = self.log_probs.reshape(-1)
        parts = [np.zeros(0)]
        for context, symbol, starts in _windows(proteins):
            place = symbol + SYMBOLS * (context % SYMBOLS ** (self.order - 1))
            parts.append(-np.add.reduceat(flat[place], starts))
        return np.concatenate(parts)


def _windows(proteins: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield, for chunks of proteins, the two symbols before, each symbol, and the proteins' starts.

    The context is 27 × (symbol before last) + (last symbol), both the edge at a protein's start.
    """
    edge = chr(ord("A") + EDGE)
    for first in range(0, len(proteins), CHUNK_PROTEINS):
        chunk = proteins[first : first + CHUNK_PROTEINS]
        text = edge.join(chunk) + edge
        try:
            symbols = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int32) - ord("A")
        except UnicodeEncodeError:
            raise ValueError("a protein holds a character that is no letter A to Z") from None
        lengths = np.fromiter(map(len, chunk), np.int64, len(chunk)) + 1
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        if symbols.min() < 0 or symbols.max() > EDGE or (symbols == EDGE).sum() != len(chunk):
            raise ValueError("a protein holds a character that is no letter A to Z")
        last = np.concatenate([[EDGE], symbols[:-1]])
        before = np.concatenate([[EDGE], last[:-1]])
        before[last == EDGE] = EDGE  # symbols before the edge belong to another protein
        yield before * SYMBOLS + last, symbols, starts


def trigram_counts(proteins: Sequence[str]) -> np.ndarray:
    """Count every symbol after every pair of symbols: ``(27, 27, 27)``, the last the symbol."""
    counts = np.zeros(SYMBOLS**3, dtype=np.int64)
    for context, symbol, _starts in _windows(proteins):
        counts += np.bincount(context * SYMBOLS + symbol, minlength=SYMBOLS**3)
    return counts.reshape(SYMBOLS, SYMBOLS, SYMBOLS)


def fit_ngrams(proteins: Sequence[str], seed: int = 0) -> dict[str, NgramModel]:
    """Fit unigram, bigram and trigram models.

    Each mixes the relative frequencies of all orders up to its own and the uniform distribution
    over the 27 symbols; the shares are fitted by expectation maximisation on the 5 % of proteins
    that are held out from the counts (Jelinek & Mercer 1980), then all proteins are counted.

    Returns:
        The models under the names ``unigram``, ``bigram`` and ``trigram``.

    Raises:
        ValueError: fewer than two proteins, or a character that is no upper-case letter.
    """
    if len(proteins) < 2:
        raise ValueError(f"{len(proteins)} training proteins are too few for the n-gram floors")
    order = np.random.default_rng(seed).permutation(len(proteins))
    count = min(len(proteins) - 1, max(1, round(HELD_OUT_SHARE * len(proteins))))
    shuffled: list[str] = [proteins[int(i)] for i in order]
    held_out, counted = trigram_counts(shuffled[:count]), trigram_counts(shuffled[count:])
    models = {}
    for n in (1, 2, 3):
        weights = _fit_weights(_relative_frequencies(counted, n), _of_order(held_out, n))
        mixture = np.tensordot(weights, _relative_frequencies(counted + held_out, n), axes=1)
        models[NAMES[n]] = NgramModel(n, np.log(mixture), weights)
    return models


def _of_order(counts: np.ndarray, order: int) -> np.ndarray:
    """Sum trigram counts over the symbols too far back for ``order``."""
    return counts.sum(axis=tuple(range(3 - order)))


def _relative_frequencies(counts: np.ndarray, order: int) -> np.ndarray:
    """Return ``(order + 1, 27, …)``: p by uniform, unigram, …, each spread over all contexts.

    A context without counts gets the frequencies of the next lower order.
    """
    shape = (SYMBOLS,) * order
    layers = [np.full(shape, 1 / SYMBOLS)]
    for n in range(1, order + 1):
        table = _of_order(counts, n).astype(np.float64)
        total = table.sum(-1, keepdims=True)
        lower = layers[-1][(0,) * (order - n)]
        frequency = np.divide(table, total, out=lower.copy(), where=total > 0)
        layers.append(np.broadcast_to(frequency, shape).copy())
    return np.stack(layers)


def _fit_weights(layers: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Return the mixture weights that make the held-out counts most likely, by EM."""
    components = layers.reshape(len(layers), -1)
    counts = held_out.reshape(-1)
    seen = counts > 0
    components, counts = components[:, seen], counts[seen]
    weights = np.full(len(layers), 1 / len(layers))
    for _ in range(EM_ROUNDS):
        joint = weights[:, None] * components
        weights = (joint / joint.sum(0)) @ counts / counts.sum()
        # The uniform part must stay, or a symbol without counts would have probability 0.
        weights = np.maximum(weights, 1e-9)
        weights /= weights.sum()
    return weights

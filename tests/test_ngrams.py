from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from src.proteins.ngrams import EDGE, SYMBOLS, UNIFORM_NATS, fit_ngrams, trigram_counts


def plain_nll(model, protein: str) -> float:
    """Score a protein symbol by symbol, straight from the definition."""
    codes = [EDGE, EDGE, *(ord(c) - ord("A") for c in protein), EDGE]
    total = 0.0
    for i in range(2, len(codes)):
        context = tuple(codes[i - model.order + 1 : i])
        total -= float(model.log_probs[(*context, codes[i])])
    return total


def test_counts_of_two_proteins_by_hand():
    counts = trigram_counts(["MA", "M"])
    expected = Counter(
        {
            (EDGE, EDGE, 12): 2,  # M begins both
            (EDGE, 12, 0): 1,
            (12, 0, EDGE): 1,
            (EDGE, 12, EDGE): 1,  # the second begins anew, whatever stood before it
        }
    )
    assert {tuple(map(int, i)): counts[tuple(i)] for i in np.argwhere(counts)} == dict(expected)


@pytest.mark.parametrize("order", ["unigram", "bigram", "trigram"])
def test_models_are_distributions_and_score_as_defined(order, random_proteins):
    model = fit_ngrams(random_proteins(60, seed=2))[order]
    np.testing.assert_allclose(np.exp(model.log_probs).sum(-1), 1.0, rtol=1e-12)
    assert model.weights.sum() == pytest.approx(1.0)
    assert np.isfinite(model.log_probs).all()
    fresh = random_proteins(7, seed=3) + ["M", "XUB"]
    np.testing.assert_allclose(model.nll(fresh), [plain_nll(model, p) for p in fresh], rtol=1e-12)


def test_unigram_is_the_relative_frequency():
    proteins = ["AAC", "ACD"] * 50
    model = fit_ngrams(proteins)["unigram"]
    assert math.exp(model.log_probs[0]) == pytest.approx(3 / 8, abs=1e-6)
    assert math.exp(model.log_probs[EDGE]) == pytest.approx(2 / 8, abs=1e-6)


def nats_per_residue(model, proteins: list[str]) -> float:
    return model.nll(proteins).sum() / sum(map(len, proteins))


def test_longer_context_pays_where_there_is_structure_and_costs_little_where_there_is_none(
    random_proteins,
):
    ordered = [("ACDEFGHIKLMNPQRSTVWY" * 6)[start : start + 80] for start in range(20)] * 5
    models = fit_ngrams(ordered)
    assert nats_per_residue(models["bigram"], ordered) < 0.15
    assert nats_per_residue(models["unigram"], ordered) > 2.9
    plain = random_proteins(400, seed=4)
    models = fit_ngrams(plain)
    fresh = random_proteins(100, seed=5)
    floor = nats_per_residue(models["unigram"], fresh)
    assert nats_per_residue(models["trigram"], fresh) == pytest.approx(floor, abs=0.02)
    assert floor > UNIFORM_NATS  # random residues, and the end costs something


def test_chunks_do_not_matter(random_proteins, monkeypatch):
    proteins = random_proteins(50, seed=6)
    whole = fit_ngrams(proteins)["trigram"]
    monkeypatch.setattr("src.proteins.ngrams.CHUNK_PROTEINS", 7)
    pieces = fit_ngrams(proteins)["trigram"]
    np.testing.assert_array_equal(whole.log_probs, pieces.log_probs)
    np.testing.assert_array_equal(whole.nll(proteins), pieces.nll(proteins))


@pytest.mark.parametrize("bad", ["AcD", "A[D", "A D", "AÄD", "A*"])
def test_what_is_no_residue_is_refused(bad):
    with pytest.raises(ValueError, match="no letter A to Z"):
        fit_ngrams(["ACD", bad, "ACD"])


def test_too_few_proteins_are_refused():
    with pytest.raises(ValueError, match="too few"):
        fit_ngrams(["ACD"])


def test_shapes():
    model = fit_ngrams(["ACD", "CCD", "MKV"])["trigram"]
    assert model.log_probs.shape == (SYMBOLS, SYMBOLS, SYMBOLS)
    assert len(model.nll([])) == 0

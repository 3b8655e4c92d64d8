"""Variants of one protein: as if each were scored alone. Long proteins: every residue once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from src.evaluation import variants as v
from src.evaluation.likelihoods import score_proteins
from src.evaluation.mutants import every_substitution, mutated
from src.models.loading import ProteinModel


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_shared_beginnings_change_nothing(
    tiny_lm, tiny_tokenizer, random_proteins, monkeypatch, rows
):
    monkeypatch.setattr(v, "BATCH_ROWS", rows)
    model = tiny_lm().double()
    wild = random_proteins(1, 70, 70, seed=3)[0]
    chosen = every_substitution(wild)[:: 29 if rows > 1 else 290]
    others = [mutated(wild, [s]) for s in chosen]
    others += [wild, wild[:30], wild + "MK", "M", *random_proteins(3, 5, 90), "A" * 2000]
    found = v.variant_nll(ProteinModel(model, tiny_tokenizer), wild, others)
    expected = score_proteins(model, tiny_tokenizer, others).nll
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert np.isnan(found[-1])
    assert not np.isnan(found[:-1]).any()


def test_a_wild_type_that_does_not_fit_is_no_obstacle(tiny_lm, tiny_tokenizer):
    model = tiny_lm(n_positions=30)
    found = v.variant_nll(ProteinModel(model, tiny_tokenizer), "MKTAYIAKQR" * 20, ["MKTAY", "MKV"])
    expected = score_proteins(model, tiny_tokenizer, ["MKTAY", "MKV"]).nll
    np.testing.assert_allclose(found, expected)


def test_values_of_tokens_by_residue():
    values, sizes = np.array([1.0, 6.0, 2.0, 4.0, 8.0]), np.array([0, 3, 0, 1, 0])
    np.testing.assert_allclose(v.by_residue(values, sizes), [3.0, 2.0, 4.0, 12.0])


def test_windows_count_every_residue_once():
    assert v.window_residues(512) == 480
    assert v.window_residues(126) == 120
    with pytest.raises(ValueError, match="hold no two lines"):
        v.window_residues(125)
    for length in (1, 119, 120, 121, 180, 181, 1000):
        counted: list[int] = []
        for start, stop, first in v.windows_of(length, 120):
            assert start % 60 == 0
            assert stop - start <= 120
            assert first == 0 or first - start >= 60
            counted = counted[:first] + list(range(first, stop))
        assert counted == list(range(length))


def test_windows_of_a_short_protein_are_the_protein(tiny_lm, tiny_tokenizer, random_proteins):
    model = tiny_lm().double()
    for protein in random_proteins(4, 5, 100):
        values = v.windowed_nll(ProteinModel(model, tiny_tokenizer), protein)
        assert values.shape == (len(protein),)
        total = score_proteins(model, tiny_tokenizer, [protein]).nll[0]
        assert values.sum() == pytest.approx(total, rel=1e-9)


def test_a_window_shows_a_residue_what_stands_before_it(tiny_lm, tiny_tokenizer, random_proteins):
    """The counted half of the second window is that of the window scored alone."""
    model = tiny_lm(n_positions=140).double()
    (protein,) = random_proteins(1, 200, 200)
    values = v.windowed_nll(ProteinModel(model, tiny_tokenizer), protein)
    assert [w[:2] for w in v.windows_of(200, 120)] == [(0, 120), (60, 180), (120, 200)]
    alone = v.windowed_nll(ProteinModel(model, tiny_tokenizer), protein[120:])
    np.testing.assert_allclose(values[180:], alone[60:])
    ids = tiny_tokenizer("<|endoftext|>\n" + protein[:60] + "\n" + protein[60:120])["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
    assert values[:120].sum() == pytest.approx(float(nll))

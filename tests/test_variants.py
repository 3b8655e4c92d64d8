"""Variants of one protein: as if each were scored alone. Long proteins: every residue once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from src.evaluation import variants as v
from src.evaluation.mutants import every_substitution, mutated
from src.evaluation.scoring import score_proteins
from src.models.loading import ProteinModel
from src.proteins.encoding import Spelling, encode


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


def test_shares_of_tokens_that_are_counted():
    sizes = np.array([0, 3, 0, 2, 0])
    expected = {
        0: [1, 1, 1, 1, 1],
        1: [0, 2 / 3, 1, 1, 1],
        3: [0, 0, 0, 1, 1],
        4: [0, 0, 0, 0.5, 1],
    }
    for skipped, shares in expected.items():
        np.testing.assert_allclose(v.counted_shares(sizes, skipped), shares)


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
    loaded = ProteinModel(tiny_lm().double(), tiny_tokenizer)
    proteins = random_proteins(4, 5, 100)
    expected = score_proteins(*loaded, proteins).nll
    np.testing.assert_allclose(v.windowed_nll(loaded, proteins), expected, rtol=1e-9)


def test_windows_of_variants_are_those_of_each_alone(tiny_lm, tiny_tokenizer, random_proteins):
    loaded = ProteinModel(tiny_lm(n_positions=140).double(), tiny_tokenizer)
    (wild,) = random_proteins(1, 230, 230)
    variants = [wild, *(mutated(wild, [s]) for s in every_substitution(wild)[::371])]
    proteins = [*variants, wild[:130], *random_proteins(3, 100, 300)]
    alone = [float(v.windowed_nll(loaded, [protein])[0]) for protein in proteins]
    np.testing.assert_allclose(v.windowed_nll(loaded, proteins), alone, rtol=1e-9)


def test_a_window_shows_a_residue_what_stands_before_it(tiny_lm, tiny_tokenizer, random_proteins):
    """Only the half of a second window that the first has not is counted."""
    model = tiny_lm(n_positions=140).double()
    loaded = ProteinModel(model, tiny_tokenizer)
    (protein,) = random_proteins(1, 200, 200)
    assert [w[:2] for w in v.windows_of(200, 120)] == [(0, 120), (60, 180), (120, 200)]
    texts = [protein[:120], protein[60:180], protein[120:]]
    rows = encode(tiny_tokenizer, texts, [False, False, True])
    total = 0.0
    for number, ids in enumerate(rows):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        sizes = Spelling(tiny_tokenizer).sizes(ids)
        at = 0  # the residue that a token begins at
        for size, value in zip(sizes[1:].tolist(), nll.tolist(), strict=True):
            residues = range(at, at + size) if size else [max(at - 1, 0)]
            counted = [r for r in residues if number == 0 or r >= 60]
            total += value * len(counted) / len(residues)
            at += size
    assert v.windowed_nll(loaded, [protein])[0] == pytest.approx(total, rel=1e-7)

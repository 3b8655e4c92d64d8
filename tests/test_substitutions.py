"""Mutated copies of proteins: what is substituted, how often, and by what."""

from __future__ import annotations

import numpy as np
import pytest

from src.proteins.layouts import STANDARD_RESIDUES
from src.proteins.sources import read_proteins
from src.proteins.substitutions import mutated_copies, substitution_probabilities
from tests.conftest import write_parts
from tools.mutate_proteins import main

PARTS = ("train", "validation", "test")


def test_probabilities_are_those_of_blosum62():
    frequencies = np.arange(1, 21) / 210
    found = substitution_probabilities(frequencies)
    np.testing.assert_allclose(found.sum(1), 1)
    assert (np.diag(found) == 0).all()
    place = STANDARD_RESIDUES.index
    i, v, g = place("I"), place("V"), place("G")  # BLOSUM62: I/V 3, I/G -4
    assert found[i, v] / found[i, g] == pytest.approx(
        frequencies[v] / frequencies[g] * 2 ** ((3 + 4) / 2)
    )


def test_copies_have_the_rates_and_residues_of_the_model(random_proteins):
    proteins = ["X".join(random_proteins(40, 2000, 2000))] * 20
    copies = mutated_copies(proteins, 0.1, 0.4, np.random.default_rng(0))
    counts = np.array([proteins[0].count(a) for a in STANDARD_RESIDUES])
    expected = substitution_probabilities(counts / counts.sum())
    pairs = np.zeros((20, 20))
    rates = []
    for protein, copy in zip(proteins, copies, strict=True):
        assert len(copy) == len(protein)
        assert copy.count("X") == protein.count("X")
        changed = [(a, b) for a, b in zip(protein, copy, strict=True) if a != b]
        rates.append(len(changed) / len(protein))
        for a, b in changed:
            pairs[STANDARD_RESIDUES.index(a), STANDARD_RESIDUES.index(b)] += 1
    assert 0.09 < min(rates) < 0.2 < 0.3 < max(rates) < 0.41
    totals = pairs.sum(1, keepdims=True)
    errors = (pairs - totals * expected) / np.sqrt(totals * expected + 1)
    assert np.abs(errors).max() < 5
    assert copies == mutated_copies(proteins, 0.1, 0.4, np.random.default_rng(0))


def test_the_tool_adds_copies_and_keeps_the_other_parts(random_proteins, tmp_path, capsys):
    parts = {part: random_proteins(20, 40, 90, seed=i) for i, part in enumerate(PARTS)}
    write_parts(data := tmp_path / "data", parts)
    out = tmp_path / "mutated"
    given = ["--data", str(data), "--output", str(out)]
    assert main([*given, "--copies", "2", "--most", "0.2"]) == 0
    before = list(read_proteins(data / "train.fasta.gz", keep_ambiguous=True))
    after = list(read_proteins(out / "train.fasta.gz", keep_ambiguous=True))
    assert after[: len(before)] == before
    assert [len(p.residues) for p in after] == [len(p.residues) for p in before] * 3
    assert len({p.name for p in after}) == len(after)
    for part in ("validation", "test"):
        name = f"{part}.fasta.gz"
        assert (out / name).read_bytes() == (data / name).read_bytes()
    assert f"{len(after):,} training proteins" in capsys.readouterr().out
    assert main(given) == 2
    assert "not empty" in capsys.readouterr().err
    assert main([*given, "--least", "0.6"]) == 2
    assert "--least 0.6 is above --most 0.5" in capsys.readouterr().err

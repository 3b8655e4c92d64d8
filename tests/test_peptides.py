"""Short peptides are compared exactly, in the split and in the report of leaks."""

from __future__ import annotations

import random

from src.proteins.homology import SearchSettings, alignments
from src.proteins.layouts import STANDARD_RESIDUES
from src.proteins.peptides import SHORT, peptide_hits
from src.proteins.splits import SplitSettings, leakage, split_by_homology


def peptides(count, size, seed):
    rng = random.Random(seed)
    return ["".join(rng.choices(STANDARD_RESIDUES, k=size)) for _ in range(count)]


def changed(peptide, place):
    new = STANDARD_RESIDUES[(STANDARD_RESIDUES.index(peptide[place]) + 1) % 20]
    return peptide[:place] + new + peptide[place + 1 :]


def test_twins_fragments_and_overhanging_peptides_are_found():
    (long,) = peptides(1, 200, 0)
    proteins = {
        "short": long[50:62],
        "long": long,
        "twin": changed(long[50:62], 3),
        "before": "MKW" + long[50:59],  # nine of twelve, three places further
        "other": peptides(1, 12, 9)[0],
        "unlike": peptides(1, 200, 5)[0],
    }
    targets = [name for name in proteins if name != "short"]
    found = {hit[1]: hit[2:] for hit in peptide_hits(proteins, ["short"], targets, 1e-3)}
    assert found == {"long": (1.0, 1.0), "twin": (11 / 12, 1.0), "before": (9 / 12, 1.0)}
    (hit,) = peptide_hits(proteins, ["long", "unlike"], ["short"], 1e-3)
    assert hit == ("long", "short", 1.0, 12 / 200)
    assert peptide_hits(proteins, ["long"], ["unlike"], 1e-3) == []


def test_unrelated_peptides_are_no_relatives():
    """The expected number of chance hits is below 1e-3 for each query."""
    names = {f"p{i}": p for i, p in enumerate(peptides(600, 14, 3))}
    half = list(names)
    assert len(peptide_hits(names, half[:300], half[300:], 1e-3)) <= 2


def test_the_leak_report_sees_twins_of_ten_residues():
    train = {f"t{i}": p for i, p in enumerate(peptides(60, 10, 1))}
    held = {f"h{i}": changed(p, i % 10) for i, p in enumerate(list(train.values())[:20])}
    held |= {f"n{i}": p for i, p in enumerate(peptides(20, 10, 2))}
    proteins = train | held
    report = leakage(proteins, list(held), list(train), SearchSettings())
    assert report["identity_50"] == report["any_hit"] == 20


def test_a_split_of_peptides_has_no_twins():
    base = peptides(120, 12, 4)
    proteins = {
        f"{i}{k}": p for i, a in enumerate(base) for k, p in (("a", a), ("b", changed(a, 2)))
    }
    settings = SplitSettings(validation_proteins=5, test_proteins=10)
    split = split_by_homology(proteins, settings)
    assert all(len(p) < SHORT for p in proteins.values())
    for part in ("validation", "test"):
        assert not alignments(proteins, split.parts[part], split.parts["train"], settings)
        assert split.report["leakage"][part]["any_hit"] == 0

"""Splitting within families: the draw, the record, and the script with MMseqs2."""

from __future__ import annotations

import gzip
import io
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyhmmer
import pytest

from src.proteins import families as fam
from src.proteins import splits
from src.proteins.families import FamilySplitSettings, read_families, split_within_families
from src.proteins.homology import Hit, read_clusters
from src.proteins.relatives import open_profiles, profile_key
from src.proteins.sources import read_proteins
from src.proteins.split_files import check_split
from tests.conftest import needs_mmseqs

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def members(count: int, size: int, seed: int = 0) -> tuple[dict[str, str], dict[str, str]]:
    """Return proteins of made-up families and their families; half of a family is alike."""
    rng = random.Random(seed)
    proteins, families = {}, {}
    for number in range(count):
        ancestor = rng.choices(LETTERS, k=100)
        for member in range(size):
            share = 0.6 if member % 2 else 0.05
            residues = [rng.choice(LETTERS) if rng.random() < share else c for c in ancestor]
            name = f"s{seed}f{number}m{member}"
            proteins[name], families[name] = "".join(residues), f"F{seed}{number}"
    return proteins, families


@pytest.fixture
def made_up_search(monkeypatch):
    """Neighbours by number are relatives, instead of MMseqs2: m0 and m1, m2 and m3 ..."""

    def neighbours(proteins, queries, targets, settings, most=1000):
        pair = {
            name: (name.rstrip("0123456789"), int(name.split("m")[-1]) // 2) for name in proteins
        }
        return [Hit(q, t, 0.5, 0.5) for q in queries for t in targets if pair[q] == pair[t]]

    monkeypatch.setattr(fam, "alignments", neighbours)


ROOMY = FamilySplitSettings(
    validation_per_family=1, test_per_family=2, largest_share=0.8, largest_neighbourhood=0.2
)


def test_a_held_out_protein_has_no_relative_in_any_part(made_up_search):
    proteins, families = members(5, 12)
    split = split_within_families(proteins, families, replace(ROOMY, least_test=2))
    parts = split.parts
    assert {part: len(names) for part, names in parts.items()} == {
        "train": 30,
        "validation": 5,
        "test": 10,
    }
    assert split.report["left_out"] == {"relative of a held-out protein": 15}
    assert split.report["families"] == {"train": 5, "validation": 5, "test": 5}
    assert split.clusters == families
    held_out = [*parts["validation"], *parts["test"]]
    pairs = [(name.split("m")[0], int(name.split("m")[1]) // 2) for name in held_out]
    assert len(set(pairs)) == len(pairs)
    assert not set(pairs) & {(n.split("m")[0], int(n.split("m")[1]) // 2) for n in parts["train"]}


def test_the_seed_decides_and_the_draw_is_pinned(made_up_search):
    """The order of draws is part of the format: models trained on a split depend on it."""
    proteins, families = members(3, 12)

    def test_part(seed: int) -> list[str]:
        settings = replace(ROOMY, seed=seed, least_test=2)
        return split_within_families(proteins, families, settings).parts["test"]

    assert test_part(0) == PINNED
    assert test_part(0) == test_part(0) != test_part(1)


PINNED = ["s0f0m4", "s0f0m9", "s0f1m2", "s0f1m10", "s0f2m4", "s0f2m3"]


def test_a_family_keeps_most_of_its_members_in_train(made_up_search):
    proteins, families = members(1, 20)
    settings = replace(ROOMY, test_per_family=9, largest_share=0.4, least_test=1)
    parts = split_within_families(proteins, families, settings).parts
    assert len(parts["train"]) == 12
    assert len(parts["test"]) + len(parts["validation"]) == 4
    alone = replace(settings, largest_neighbourhood=0.05)
    with pytest.raises(ValueError, match="lower --least_score"):
        split_within_families(proteins, families, alone)


def test_a_family_with_few_test_proteins_is_left_out(made_up_search):
    proteins, families = members(2, 20)
    for member in range(4, 20):
        del proteins[f"s0f1m{member}"]
    settings = replace(ROOMY, largest_neighbourhood=0.5, least_test=2)
    said: list[str] = []
    split = split_within_families(proteins, families, settings, announce=said.append)
    assert {families[name] for names in split.parts.values() for name in names} == {"F00"}
    assert any("1 families are left out whole" in line and "F01" in line for line in said)
    assert split.report["left_out"]["in a family with too few members to hold out"] == 4


def test_relatives_in_other_families_are_kept_out_of_train_too(monkeypatch):
    proteins, families = members(2, 10)
    monkeypatch.setattr(
        fam,
        "alignments",
        lambda p, queries, *more: [Hit(q, "s0f1m9", 0.9, 1.0) for q in queries if q < "s0f1"],
    )
    settings = replace(ROOMY, test_per_family=1, validation_per_family=0, least_test=1, seed=1)
    parts = split_within_families(proteins, families, settings).parts
    assert "s0f1m9" not in parts["train"]


def test_other_proteins_are_added_without_relatives_of_held_out_ones(made_up_search, monkeypatch):
    proteins, families = members(2, 12)
    split = split_within_families(proteins, families, replace(ROOMY, least_test=2))
    others = {f"other{n}": "M" * (30 + n) for n in range(20)} | {"s0f0m0": "MK"}
    bad = {"other3", "other7"}
    searched = []

    def hits(together, queries, targets, settings):
        searched.extend(targets)
        return [Hit(q, targets[0], 0.2, 0.1) for q in queries if q in bad]

    monkeypatch.setattr(fam, "alignments", hits)
    before = set(split.parts["train"])
    held_out = {*split.parts["validation"], *split.parts["test"]}
    together = fam.add_other_proteins(split, proteins, others, 15, ROOMY)
    added = set(split.parts["train"]) - before
    assert len(added) == 15
    assert set(searched) == held_out
    assert not added & {*bad, "s0f0m0"}
    assert all(split.clusters[name] == name and together[name] == others[name] for name in added)
    with pytest.raises(ValueError, match="2 proteins can be added, not 15|can be added"):
        fam.add_other_proteins(split, together, others, 15, ROOMY)


def test_the_leak_report_counts_proteins_that_were_added_to_train(made_up_search, monkeypatch):
    proteins, families = members(2, 12)
    split = split_within_families(proteins, families, replace(ROOMY, least_test=2))
    assert "leakage" not in split.report
    split.parts["train"].append("leak")
    asked = []

    def identities(together, held_out, train, settings, least_coverage):
        assert least_coverage == ROOMY.coverage
        asked.append(len(train))
        return {name: 0.4 for name in held_out if "leak" in train}

    monkeypatch.setattr(splits, "best_identities", identities)
    fam.report_leakage(split, {**proteins, "leak": "MK"}, ROOMY)
    assert asked == [len(split.parts["train"])] * 2
    for part in ("validation", "test"):
        count = len(split.parts[part])
        assert split.report["leakage"][part] == {
            "proteins": count, "any_hit": count, "identity_30": count, "identity_50": 0,
        }  # fmt: skip


def test_profiles_search_each_protein_once(monkeypatch):
    searched = []

    def scores(proteins, profiles):
        searched.append(list(proteins))
        return {"P": np.array([float(len(p) - 1) for p in proteins])}

    monkeypatch.setattr(fam, "profile_scores", scores)
    search = fam.ProfileSearch(Path("x.hmm"))
    assert search.best({"a": "MK", "b": "M", "c": "MKV", "d": "MK"}) == {
        "a": 1.0, "b": 0.0, "c": 2.0, "d": 1.0,
    }  # fmt: skip
    assert search.scores(["MKV", "MKVL"])["P"].tolist() == [2.0, 3.0]
    assert search.scores(["M"]) == {}
    assert searched == [["MK", "M", "MKV"], ["MKVL"]]


def fasta(path, proteins, families):
    path.write_text("".join(f">{n} family={families[n]} x\n{p}\n" for n, p in proteins.items()))
    return path


def test_families_are_read_from_headers(tmp_path):
    proteins, families = members(3, 4)
    path = fasta(tmp_path / "a.fasta", proteins, families)
    assert read_families(path, proteins) == families
    with pytest.raises(ValueError, match="a.fasta: other has no 'family=NAME' in its header"):
        read_families(path, {"other": "MK"})


def test_families_are_chosen_by_what_their_profiles_tell():
    proteins = {"a": "M" * 60, "b": "M" * 100, "c": "M" * 100, "d": "M" * 50, "e": "M" * 100}
    families = {"a": "X", "b": "X", "c": "Y", "d": "Z", "e": "W"}
    scores = {"a": 10.0, "b": 70.0, "c": 60.0, "d": 50.0, "e": 49.0}
    assert fam.described_families(proteins, families, scores, 0.5) == ["Y", "X"]
    assert fam.described_families(proteins, families, scores, 0.5, 50) == ["Z", "Y", "X"]
    assert fam.described_families(proteins, families, scores, 0.49) == ["Y", "X", "W"]


@needs_mmseqs
def test_the_script_splits_within_families(tmp_path, monkeypatch, capsys):
    from scripts import split_data

    monkeypatch.setenv("MMSEQS_NUM_THREADS", "1")
    known, new = members(4, 40), members(2, 6, seed=1)
    data = fasta(tmp_path / "known.fasta", *known)
    other = fasta(tmp_path / "new.fasta", *new)
    rest = fasta(tmp_path / "rest.fasta", *members(1, 9, seed=2))
    profiles = tmp_path / "profiles.hmm"
    profiles.write_bytes(b"".join(profile_of(known[0][f"s0f{n}m0"], f"P{n}") for n in range(4)))
    folder = tmp_path / "split"
    flags = ["--data", str(data), "--output", str(folder), "--within_families"]
    flags += ["--validation_per_family", "1", "--test_per_family", "2"]
    flags += ["--profiles", str(profiles), "--new_families", str(other)]
    assert split_data.main([*flags, "--others", str(rest), "--num_others", "5"]) == 0
    record = check_split(folder)
    shown = capsys.readouterr().out
    assert f"test: {record['parts']['test']['proteins']} proteins" in shown
    assert record["families"] == {"train": 4, "validation": 4, "test": 4, "test_new": 2}
    assert record["others"]["added"] == 5
    assert record["settings"]["test_per_family"] == 2
    assert record["source"]["new_families"]["file"] == "new.fasta"
    assert [record["leakage"][p]["identity_50"] for p in ("validation", "test", "test_new")] == [
        0
    ] * 3
    families = known[1] | new[1]
    clusters = read_clusters(folder / "clusters.tsv.gz")
    headers = {
        part: gzip.decompress((folder / f"{part}.fasta.gz").read_bytes()).decode()
        for part in record["parts"]
    }
    headers = {part: re.findall(r">(\S+) family=", text) for part, text in headers.items()}
    for part in record["parts"]:
        for protein in read_proteins(folder, split=part):
            assert clusters[protein.name] == families.get(protein.name, protein.name)
            assert (protein.name in families) == (protein.name in headers[part])
    assert [p.name for p in read_proteins(folder, split="test_new")] == list(new[0])
    table = [line.split("\t") for line in (folder / "families.tsv").read_text().splitlines()]
    assert table[0] == ["family", *record["parts"], "profile", "score_per_residue"]
    assert [row[-2] for row in table[1:5]] == ["P0", "P1", "P2", "P3"]
    assert [row[-2:] for row in table[5:]] == [["-", "0.000"]] * 2  # no profile hits a new family
    with open_profiles(folder / "families.hmm.gz") as file:
        assert {profile_key(profile) for profile in file} == {"P0", "P1", "P2", "P3"}


def profile_of(residues: str, name: str) -> bytes:
    """Return an HMM of one sequence."""
    alphabet = pyhmmer.easel.Alphabet.amino()
    sequence = pyhmmer.easel.TextSequence(name=name, sequence=residues).digitize(alphabet)
    hmm, _, _ = pyhmmer.plan7.Builder(alphabet).build(sequence, pyhmmer.plan7.Background(alphabet))
    handle = io.BytesIO()
    hmm.write(handle)
    return handle.getvalue()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--within_families", "--test_proteins", "3"], "--test_proteins has no effect with"),
        (["--others", "x"], "--others needs --within_families"),
        (["--within_families", "--least_score", "1"], "--least_score needs --profiles"),
        (["--within_families"], "m0 has no 'family=NAME'"),
    ],
)
def test_flags_and_headers_that_do_not_fit(tmp_path, refusal, flags, message):
    from scripts import split_data

    (tmp_path / "a.fasta").write_text(">m0\nMKV\n")
    paths = ["--data", str(tmp_path / "a.fasta"), "--output", str(tmp_path / "o")]
    assert message in refusal(split_data.main([*paths, *flags]))


def test_new_families_are_new(made_up_search):
    proteins, families = members(2, 10)
    split = split_within_families(proteins, families, replace(ROOMY, least_test=1))
    for new, of, message in (
        (dict(list(proteins.items())[:1]), families, "s0f0m0 is among"),
        ({"x": "MK"}, {"x": "F00"}, "the family F00 is among"),
    ):
        with pytest.raises(ValueError, match=message):
            fam.add_new_families(split, proteins, new, of)

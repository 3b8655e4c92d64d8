"""Splitting within families: the draw, the record, and the script with MMseqs2."""

from __future__ import annotations

import random
import shutil

import pytest

from src.proteins import families as fam
from src.proteins.families import FamilySplitSettings, read_families, split_within_families
from src.proteins.homology import read_clusters
from src.proteins.sources import read_proteins
from src.proteins.split_files import check_split, read_named

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
needs_mmseqs = pytest.mark.skipif(shutil.which("mmseqs") is None, reason="MMseqs2 is not on PATH")


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
    """Clusters of pairs, and no relatives, instead of MMseqs2."""

    def pairs(proteins, settings, connected):
        assert connected
        return {name: name[:-1] + str(int(name[-1]) // 2) for name in proteins}

    monkeypatch.setattr(fam, "homology_clusters", pairs)
    monkeypatch.setattr(fam, "covering_identities", lambda *a: {})


def test_whole_clusters_of_each_family_are_held_out(made_up_search):
    proteins, families = members(5, 10)
    settings = FamilySplitSettings(validation_per_family=2, test_per_family=2, largest_share=0.4)
    split = split_within_families(proteins, families, settings)
    assert {part: len(names) for part, names in split.parts.items()} == {
        "train": 30,
        "validation": 10,
        "test": 10,
    }
    assert split.report["families"] == {"train": 5, "validation": 5, "test": 5}
    assert split.clusters == families
    assert sorted(n for names in split.parts.values() for n in names) == sorted(proteins)
    where = {(n[:-1], int(n[-1]) // 2): part for part, names in split.parts.items() for n in names}
    for part, names in split.parts.items():
        assert all(where[n[:-1], int(n[-1]) // 2] == part for n in names)


def test_the_seed_decides_and_the_draw_is_pinned(made_up_search):
    """The order of draws is part of the format: models trained on a split depend on it."""
    proteins, families = members(3, 10)

    def test_part(seed: int) -> list[str]:
        settings = FamilySplitSettings(seed, test_per_family=2, largest_share=0.8)
        return split_within_families(proteins, families, settings).parts["test"]

    assert test_part(0) == PINNED
    assert test_part(0) == test_part(0) != test_part(1)


PINNED = ["s0f0m4", "s0f0m5", "s0f1m0", "s0f1m1", "s0f2m2", "s0f2m3"]


def test_relatives_of_training_proteins_are_left_out(made_up_search, monkeypatch):
    proteins, families = members(2, 10)
    monkeypatch.setattr(
        fam, "covering_identities", lambda p, names, *more: {names[0]: 0.5, names[1]: 0.49}
    )  # fmt: skip
    settings = FamilySplitSettings(validation_per_family=2, test_per_family=2, largest_share=0.4)
    split = split_within_families(proteins, families, settings)
    assert set(split.report["left_out"].values()) == {1}
    assert [len(split.parts[p]) for p in ("validation", "test")] == [3, 3]


@pytest.mark.parametrize(
    ("name", "value"),
    [("identity", 0.0), ("coverage", 1.1), ("largest_share", 0), ("test_per_family", -1)],
)
def test_settings_check_themselves(name, value):
    with pytest.raises(ValueError, match=f"--{name}"):
        FamilySplitSettings(**{name: value})


def fasta(path, proteins, families):
    path.write_text("".join(f">{n} family={families[n]} x\n{p}\n" for n, p in proteins.items()))
    return path


def test_families_are_read_from_headers(tmp_path):
    proteins, families = members(3, 4)
    path = fasta(tmp_path / "a.fasta", proteins, families)
    assert read_families(path, proteins) == families
    with pytest.raises(ValueError, match="a.fasta: other has no 'family=NAME' in its header"):
        read_families(path, {"other": "MK"})
    assert fam.largest_families({"a": "X", "b": "Y", "c": "Y", "d": "Z"}, 2) == ["Y", "X"]


@needs_mmseqs
def test_the_script_splits_within_families(tmp_path, monkeypatch, capsys):
    from scripts import split_data

    monkeypatch.setenv("MMSEQS_NUM_THREADS", "1")
    known, new = members(4, 20), members(2, 6, seed=1)
    del known[0]["s0f3m0"]  # the smallest family is dropped by --num_families
    data = fasta(tmp_path / "known.fasta", *known)
    other = fasta(tmp_path / "new.fasta", *new)
    folder = tmp_path / "split"
    flags = ["--data", str(data), "--output", str(folder), "--within_families"]
    flags += ["--validation_per_family", "1", "--test_per_family", "2", "--num_families", "3"]
    assert split_data.main([*flags, "--new_families", str(other)]) == 0
    record = check_split(folder)
    shown = capsys.readouterr().out
    assert f"test: {record['parts']['test']['proteins']} proteins" in shown
    assert "3 families" in shown
    assert record["families"] == {"train": 3, "validation": 3, "test": 3, "test_new": 2}
    assert record["settings"]["test_per_family"] == 2
    assert record["source"]["new_families"]["file"] == "new.fasta"
    assert [record["leakage"][p]["identity_50"] for p in ("validation", "test", "test_new")] == [
        0
    ] * 3
    families = known[1] | new[1]
    assert read_clusters(folder / "clusters.tsv.gz") == {
        p.name: families[p.name]
        for part in record["parts"]
        for p in read_proteins(folder, split=part)
    }
    for part in record["parts"]:
        path = folder / f"{part}.fasta.gz"
        names = [p.name for p in read_proteins(path)]
        assert read_families(path, dict.fromkeys(names, "")) == {n: families[n] for n in names}
    assert [p.name for p in read_proteins(folder, split="test_new")] == list(new[0])

    # What is written is what split_within_families draws from the same proteins.
    named, _ = read_named(data)
    chosen = {n: p for n, p in named.items() if not n.startswith("s0f3")}
    settings = FamilySplitSettings(validation_per_family=1, test_per_family=2)
    split = split_within_families(chosen, {n: families[n] for n in chosen}, settings)
    for part, names in split.parts.items():
        assert [p.name for p in read_proteins(folder, split=part)] == names


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--within_families", "--test_proteins", "3"], "--test_proteins has no effect with"),
        (["--num_families", "3"], "--num_families needs --within_families"),
        (["--within_families"], "m0 has no 'family=NAME'"),
    ],
)
def test_flags_and_headers_that_do_not_fit(tmp_path, capsys, flags, message):
    from scripts import split_data

    (tmp_path / "a.fasta").write_text(">m0\nMKV\n")
    paths = ["--data", str(tmp_path / "a.fasta"), "--output", str(tmp_path / "o")]
    assert split_data.main([*paths, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_new_families_are_new(made_up_search):
    proteins, families = members(2, 10)
    split = split_within_families(proteins, families, FamilySplitSettings())
    for new, of, message in (
        (dict(list(proteins.items())[:1]), families, "s0f0m0 is among"),
        ({"x": "MK"}, {"x": "F00"}, "the family F00 is among"),
    ):
        with pytest.raises(ValueError, match=message):
            fam.add_new_families(split, proteins, new, of, FamilySplitSettings())

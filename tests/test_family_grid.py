"""The experiment on specialists, tiny: tuning, choice, every start, resuming, and its plan."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

pytest.importorskip("pyhmmer")

from src.common.settings import StudentSettings
from src.experiments import family_grid as g
from src.experiments import specialist as s
from src.models.loading import config_of
from src.proteins.homology import Hit
from src.proteins.profiles import align_family, profile_of, write_profiles
from src.proteins.sources import Protein
from tests.test_profiles import RESIDUES, mutants
from tools.family_experiment import build_parser, main, starts


@pytest.fixture
def grid(tmp_path, tiny_lm, saved_model, monkeypatch):
    saved_model(tmp_path / "model", tiny_lm(initializer_range=0.02))
    members = mutants((RESIDUES * 3)[:50], 16, 0.2, 5)
    text = "".join(f">p{i} family=F\n{m}\n" for i, m in enumerate(members))
    (tmp_path / "new.fasta").write_text(text)
    write_profiles(tmp_path / "p.hmm", [profile_of(align_family(members), "P")])
    (tmp_path / "families.tsv").write_text("family\tprofile\nF\tP\n")

    def alignments(proteins, queries, targets, settings):
        return [Hit(a, b, 1.0 if a == b else 0.5, 1.0) for a in queries for b in targets]

    monkeypatch.setattr("src.proteins.family_split.alignments", alignments)
    monkeypatch.setattr(g, "DISTILLED", 4)
    model = str(tmp_path / "model")
    return g.FamilyGrid(
        tmp_path / "new.fasta",
        tmp_path / "p.hmm",
        tmp_path / "families.tsv",
        None,
        tmp_path / "results",
        tmp_path / "work",
        (
            g.Start("teacher", model),
            g.Start("random", model, random=True),
            g.Start("specialist", model, student=StudentSettings(1, 2, 8)),
        ),
        members=(5,),
        draws=1,
        samples=4,
        fit=s.FitSettings(epochs=1, least_steps=2, evaluate_each=1, patience=2, dropout=0.1),
        distillation=s.FitSettings(epochs=1, least_steps=2, evaluate_each=1, patience=2),
        rates=(1e-4, 1e-3, 1e-2),
        announce=lambda line: None,
    )


def test_the_experiment_is_tuned_run_and_resumed(grid, monkeypatch):
    cells = grid.cells()
    assert [cell.start for cell in cells] == ["teacher", "random", "specialist", "profile"]
    with pytest.raises(ValueError, match=r"no rate for teacher 5: run with --tune, then --choose"):
        grid.run(cells)
    with pytest.raises(ValueError, match="6 cells of the tuning are missing"):
        grid.choose()
    tuning = grid.cells(tuning=True)
    assert {(cell.start, cell.rate) for cell in tuning} == {
        (start, rate) for start in ("teacher", "random") for rate in (1e-4, 1e-3, 1e-2)
    }
    while len(tuning := grid.cells(tuning=True)) > len(list(grid.results.glob("cells/*.json"))):
        grid.run(tuning)
    rates = grid.choose()
    assert set(rates) == {"teacher 5", "random 5"}
    with pytest.raises(ValueError, match="chosen once"):
        grid.choose()

    more = replace(grid, members=(5, 6))  # another N later: what was chosen stays
    with pytest.raises(ValueError, match="6 cells of the tuning are missing, F-n6"):
        more.choose()

    grid.run(cells[:2])
    assert grid.plan(cells)[0] == "  F-n5-d0: 2 cells (profile, specialist)"
    grid.run(cells)
    assert grid.plan(cells) == ["0 of 4 cells to run, 0.0 hours (from finished cells)"]
    monkeypatch.setattr(g.FamilyGrid, "_measure", None)
    grid.run(cells)
    teacher, random, specialist = grid.starts
    other = replace(grid, starts=(replace(random, name="teacher"), random, specialist))
    with pytest.raises(ValueError, match=r"starts.json: teacher was another model"):
        other.run(cells)
    rows = grid.write_table()
    assert len(rows) == len(tuning) + 4
    shutil.rmtree(grid.results / "cells")
    again = replace(grid)  # the table alone says what is finished
    assert again.plan(cells) == ["0 of 4 cells to run, 0.0 hours (from finished cells)"]
    again.run(cells)
    assert again.write_table() == rows == pq.read_table(grid.results / g.TABLE).to_pylist()
    done = {row["start"]: row for row in rows if row["rate"] is None}
    assert set(done) == {"teacher", "random", "specialist", "profile"}
    assert done["specialist"]["parameters"] < done["teacher"]["parameters"]
    assert all(row["train"] == 5 and row["nll"] > 0 for row in done.values())
    assert done["profile"]["nll"] < done["random"]["nll"]
    before = {start: row["nll_before"] for start, row in done.items()}
    assert before["teacher"] > done["teacher"]["nll"]
    assert before["random"] is before["specialist"] is before["profile"] is None
    assert all(row["nll"] is None for row in rows if row["rate"] is not None)
    assert not (grid.work / "F-n5-d0").exists()


def test_a_family_without_a_profile_is_told(grid):
    grid.table.write_text("family\tprofile\nG\tP\n")
    with pytest.raises(ValueError, match="has no family F"):
        _ = replace(grid).profile_keys


def test_members_that_do_not_fit_a_model_are_judged_by_none(grid):
    positions = config_of(grid.starts[0].model).n_positions
    members = [Protein("a", "M" * 10), Protein("b", "MK" * positions), Protein("c", "K" * 20)]
    assert [q.name for q in grid.judged(members)] == ["a", "c"]


def test_related_members_are_left_out(grid, tmp_path):
    (tmp_path / "related.tsv").write_text("member\ttrain\np3\tx\np5\ty\n")
    left = replace(grid, related=tmp_path / "related.tsv").proteins["F"]
    assert set(grid.proteins["F"]) - set(left) == {"p3", "p5"}


def test_a_dry_run_lists_cells_and_hours_and_makes_nothing(grid, capsys):
    flags = ["--families", grid.families, "--profiles", grid.profiles, "--table", grid.table]
    flags += ["--results", grid.results, "--start", f"teacher={grid.starts[0].model}", "--dry_run"]
    assert main([str(flag) for flag in flags]) == 0
    shown = capsys.readouterr().out
    assert "F-n10-d0: 2 cells (profile, teacher)" in shown
    assert "12 of 12 cells to run, hours not known until one is finished" in shown
    assert not grid.results.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --start NAME=MODEL"),
        (["--start", "a"], "give NAME=MODEL"),
        (["--start", "a=b", "--random_start", "a=b"], "the name a is taken"),
        (["--specialist", "s=m:4,4,16"], "must be a --start, too"),
        (["--start", "a=m", "--specialist", "s=m:4"], "NAME=MODEL:L,H,E"),
    ],
)
def test_starts_of_another_form(flags, message):
    with pytest.raises(ValueError, match=message):
        starts(build_parser().parse_args([*flags, "--results", "r"]))


def test_equal_samples_are_one_hit():
    assert g.distinct_hits(["MK", "MK", "AA", "CC"], np.array([1.0, 1.0, 2.0, -1.0])) == 2


def test_rates_beyond_an_end_are_tried(grid):
    def finish(rate, loss):
        cell = g.Cell("F", 5, g.TUNING_DRAW, "teacher", rate)
        g.write_json(grid.file_of(cell), {"validation_loss": loss})

    for rate in grid.rates:
        assert grid.wanted_rates("teacher", 5, ["F"]) == [1e-4, 1e-3, 1e-2]
        finish(rate, 3.0 - rate)
    assert grid.wanted_rates("teacher", 5, ["F"]) == [1e-4, 1e-3, 1e-2, 1e-1]
    finish(1e-1, 2.0)
    assert grid.wanted_rates("teacher", 5, ["F"]) == [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    finish(1.0, 1.0)  # no further than two rates
    assert grid.wanted_rates("teacher", 5, ["F"]) == [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    finish(1e-3, 0.5)
    assert grid.wanted_rates("teacher", 5, ["F"]) == [1e-4, 1e-3, 1e-2]


def test_the_answers_are_printed_and_written(tmp_path, capsys):
    rows = [
        {"start": start, "members": 5, "family": family, "draw": 0, "rate": None, "residues": 100}
        | {"nll": 100 * nats, "train_seconds": 1.0}
        for family, shift in (("F", 0.0), ("G", 0.1), ("H", 0.2))
        for start, nats in (("teacher", 2.0), ("student27", 1.5 + shift), ("profile", 1.0))
    ]
    g.write_per_protein(tmp_path / g.TABLE, {name: [r[name] for r in rows] for name in rows[0]})
    flags = ["--analyse", "--members", "5", "--results", str(tmp_path)]
    assert main(flags) == 0
    shown = capsys.readouterr().out
    assert "student27 | -0.4000 [-0.6484, -0.1516]" in shown
    assert (tmp_path / "analysis.md").read_text() in shown
    assert main(["--analyse", "--results", str(tmp_path / "none")]) == 2
    assert "no cell of the experiment is finished" in capsys.readouterr().err

"""Grids: every cell once, resumable, equal to training alone, chosen on validation."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scripts import ablation as script
from src.common.files import read_json, write_json
from src.common.settings import StudentSettings, TrainSettings
from src.evaluation.results import read_results
from src.experiments import ablation, cells
from src.experiments.ablation import GridRun, tuned_rates
from src.experiments.grids import ARMS, GRIDS, PUBLISHED, RATES_FILE, Cell, Grid, settings_key
from src.models.loading import load_causal_lm, model_fingerprint
from tests.conftest import make_proteins, write_parts
from tests.spoiling import refusals

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_lm, saved_model):
    """A teacher and proteins as directories."""
    folder = tmp_path_factory.mktemp("world")
    saved_model(folder / "teacher", tiny_lm(n_embd=24, initializer_range=0.3))
    counts = {"train": 60, "validation": 12, "test": 16}
    parts = {p: make_proteins(n, 20, 60, i) for i, (p, n) in enumerate(counts.items())}
    write_parts(folder / "proteins", parts)
    return folder


@pytest.fixture(scope="module")
def grid(world) -> Grid:
    shared = TrainSettings(
        data=str(world / "proteins"),
        teacher_model=str(world / "teacher"),
        train_size_prop=1.0,
        batch_size=4,
        max_steps=6,
        precision="fp32",
        eval_steps=3,
        save_steps=2,
        validation_proteins=6,
        cached_teacher=True,
    )
    return Grid(
        "small",
        "a test",
        {name: ARMS[name] for name in ("baseline", "both", "hard_only")},
        {"s": StudentSettings(1, 2, 16), "m": StudentSettings(1, 2, 24)},
        (1, 2),
        rates=(1e-3, 1e-2),
        shared=shared,
    )


def job(grid, folder, world, **options) -> GridRun:
    return GridRun(
        grid,
        folder / "results",
        folder / "work",
        cache_dir=str(world / "tokens"),
        **options,
    )


@pytest.fixture
def one(grid) -> Grid:
    """The grid's first group alone."""
    return replace(grid, sizes={"s": grid.sizes["s"]}, seeds=(1,))


@pytest.fixture(scope="module")
def finished(grid, world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    assert job(grid, folder, world).run() == {"cells": 24, "done": 24}
    return folder


def test_data_without_the_measured_part_is_refused_before_any_training(
    grid, world, tmp_path, monkeypatch
):
    one_file = tmp_path / "x.fasta"
    one_file.write_text("".join(f">a{i}\n{p}\n" for i, p in enumerate(make_proteins(20))))
    whole = job(replace(grid, shared=replace(grid.shared, data=str(one_file))), tmp_path, world)
    monkeypatch.setattr(whole, "_run_group", lambda *_: pytest.fail("a group was begun"))
    with pytest.raises(ValueError, match=r"x\.fasta has no \w+ part.*scripts/split_data\.py"):
        whole.run()


def test_every_cell_is_written_and_says_what_it_is(finished, grid):
    files = sorted((finished / "results").glob("*.json"))
    assert len(files) == 24
    for cell in grid.cells():
        results = read_results(finished / "results" / f"{cell.name}.json")
        about = results["settings"]
        assert (about["arm"], about["size"], about["seed"]) == (cell.arm, cell.size, cell.seed)
        assert about["key"] == settings_key(grid.settings(cell))
        assert results["training"]["together"] == 6
        curve = results["training"]["curve"]
        assert [r["step"] for r in curve if "eval_loss" in r] == [3, 6]
        assert all(r["grad_norm"] > 0 for r in curve if "eval_loss" not in r)
        assert results["run"]["versions"]["torch"]


def test_tables_of_single_proteins_hold_the_experiments_columns(finished):
    tables = [pq.read_table(p) for p in sorted((finished / "results").glob("*.parquet"))]
    assert len(tables) == 4
    names = "arm seed size learning_rate split protein cluster residues tokens nll_student "
    assert set((names + "nll_teacher kl").split()) == set(tables[0].column_names)
    assert sum(len(table) for table in tables) == 24 * 12
    assert set(tables[0].column("arm").to_pylist()) == {"baseline", "both", "hard_only"}


def test_a_cell_is_what_train_makes_of_its_settings(finished, grid, world, tmp_path):
    from src.training.stages import train

    cell = Cell("both", "m", 2, 1e-2)
    train(
        grid.settings(cell),
        tmp_path / "alone",
        cache_dir=str(world / "tokens"),
        teacher_cache=finished / "work" / "teacher_cache",
        skip_teacher_check=True,
        announce=lambda line: None,
    )
    results = read_results(finished / "results" / f"{cell.name}.json")
    alone = model_fingerprint(load_causal_lm(tmp_path / "alone"))
    assert results["run"]["student"]["fingerprint"] == alone


def test_finished_cells_are_never_run_again(finished, grid, world, monkeypatch):
    monkeypatch.setattr(GridRun, "_run_group", lambda *a: pytest.fail("ran a finished group"))
    assert job(grid, finished, world).run()["done"] == 24


def test_packed_cells_count_as_the_files_did(finished, grid, world, tmp_path, monkeypatch):
    before, after = finished / "results", tmp_path / "results"
    shutil.copytree(before, after)
    assert job(grid, tmp_path, world).pack() == 24
    assert {path.name for path in after.iterdir()} == {cells.CELLS, cells.PROTEINS}
    assert cells.cell_files(after) == cells.cell_files(before)
    for cell in grid.cells():
        packed = cells.read_cell(after, grid.file_of(cell))
        assert packed == read_results(before / grid.file_of(cell))
    assert ablation.tuned_rates(after, grid) == ablation.tuned_rates(before, grid)
    columns = (("arm", "protein", "cluster"), ("seed", "residues"), ("learning_rate", "kl"))
    old, new = (
        pd.concat(frame for _, frame in cells.read_tables(folder, "small", *columns))
        .sort_values(["seed", "residues", "arm", "learning_rate", "protein", "kl"])
        .reset_index(drop=True)
        for folder in (before, after)
    )
    assert old.equals(new[old.columns])

    monkeypatch.setattr(GridRun, "_run_group", lambda *a: pytest.fail("ran a finished group"))
    assert job(grid, tmp_path, world).run()["done"] == 24
    assert job(grid, tmp_path, world).pack() == 0


def test_cells_that_follow_join_the_packed_ones(finished, one, world, tmp_path):
    shutil.copytree(finished / "results", tmp_path / "results")
    packed = job(one, tmp_path, world)
    packed.pack()
    rows = pq.read_table(tmp_path / "results" / cells.PROTEINS)
    part = replace(one, rates=(2e-2,), arms={"both": one.arms["both"]})
    more = job(part, tmp_path, world)
    assert more.run()["done"] == 1
    assert more.pack() == 1
    joined = pq.read_table(tmp_path / "results" / cells.PROTEINS)
    own = pa.array([rate != 2e-2 for rate in joined["learning_rate"].to_pylist()])
    assert joined.filter(own).equals(rows)
    assert joined.num_rows == rows.num_rows + 12
    assert cells.read_cell(tmp_path / "results", part.file_of(part.cells()[0]))


def test_a_broken_packed_file_is_named(tmp_path):
    for name in (cells.CELLS, cells.PROTEINS):
        (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=f"{cells.CELLS}: broken"):
        cells.cell_files(tmp_path)
    with pytest.raises(ValueError, match=f"{cells.PROTEINS}: broken"):
        next(cells.read_tables(tmp_path, "small", (), ("residues",), ()))


def test_missing_cells_alone_are_run_and_come_out_the_same(
    finished, grid, world, tmp_path, monkeypatch
):
    """Also after the work directory is gone: cells do not depend on their company."""
    folder = tmp_path / "copy"
    shutil.copytree(finished / "results", folder / "results")
    lost = [Cell("both", "s", 1, 1e-3), Cell("baseline", "m", 2, 1e-2)]
    before = [read_results(folder / "results" / f"{c.name}.json") for c in lost]
    for cell in lost:
        (folder / "results" / f"{cell.name}.json").unlink()
    ran = []
    real = GridRun._run_group
    monkeypatch.setattr(
        GridRun, "_run_group", lambda self, name, cells: ran.append(name) or real(self, name, cells)
    )
    again = job(grid, folder, world)
    # Parquet of a rerun must not take the place of the whole group's.
    tables = {p.name: p.read_bytes() for p in (folder / "results").glob("*.parquet")}
    assert again.run()["done"] == 24
    assert ran == ["s-seed1", "m-seed2"]
    for cell, old in zip(lost, before, strict=True):
        new = read_results(folder / "results" / f"{cell.name}.json")
        assert new["run"]["student"]["fingerprint"] == old["run"]["student"]["fingerprint"]
        assert new["perplexity_ratio"] == pytest.approx(old["perplexity_ratio"], rel=1e-9)
    for name, raw in tables.items():
        assert (folder / "results" / name).read_bytes() == raw


def test_cells_of_fewer_proteins_are_not_taken_for_others(finished, one, world, tmp_path):
    shutil.copytree(finished / "results", tmp_path / "results")
    with pytest.raises(ValueError, match="holds a cell of other settings"):
        job(one, tmp_path, world, max_proteins=5).run()


def test_a_part_of_a_grid_leaves_the_rows_of_the_rest(finished, one, world, tmp_path):
    shutil.copytree(finished / "results", tmp_path / "results")
    part = replace(one, rates=(2e-2,), arms={"both": one.arms["both"]})
    assert job(part, tmp_path, world).run()["done"] == 1
    name = "per_protein-small-s-seed1.parquet"
    before = pq.read_table(finished / "results" / name)
    after = pq.read_table(tmp_path / "results" / name)
    assert after.num_rows == before.num_rows * 7 // 6
    old = pa.array([rate != 2e-2 for rate in after["learning_rate"].to_pylist()])
    assert after.filter(old).equals(before)


def test_a_killed_group_goes_on_to_the_same_cells(finished, one, world, tmp_path, monkeypatch):
    step = ablation.CohortTrainer.training_step

    def dying(self, *rest):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return step(self, *rest)

    monkeypatch.setattr(ablation.CohortTrainer, "training_step", dying)
    with pytest.raises(KeyboardInterrupt):
        job(one, tmp_path, world).run()
    monkeypatch.setattr(ablation.CohortTrainer, "training_step", step)
    assert job(one, tmp_path, world).run()["done"] == 6
    for cell in one.cells():
        ours, whole = (
            read_results(folder / "results" / f"{cell.name}.json")
            for folder in (tmp_path, finished)
        )
        assert ours["run"]["student"] == whole["run"]["student"]
        assert ours["training"]["curve"] == whole["training"]["curve"]


def test_a_group_under_way_elsewhere_is_left_alone(one, world, tmp_path):
    from src.common.runs import locked

    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + (
        "from pathlib import Path\nfrom src.common.runs import locked\n"
        f"with locked(Path({str(tmp_path / 'work' / 's-seed1')!r})):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert job(one, tmp_path, world).run() == {"cells": 6, "done": 0}
        holder.communicate("")
    with locked(tmp_path / "work" / "s-seed1"):
        pass


@pytest.mark.parametrize("place", ["work", "results"])
def test_a_grid_does_not_go_on_with_other_proteins(one, world, finished, tmp_path, place):
    """Neither a group under way nor finished cells are mixed with those of other inputs."""
    first, second, *_ = one.cells()
    if place == "work":
        shutil.copytree(finished / "work" / "s-seed1", tmp_path / "work" / "s-seed1")
        path, key = tmp_path / "work" / "s-seed1" / "group.json", ("inputs", "data")
    else:
        shutil.copytree(finished / "results", tmp_path / "results")
        (tmp_path / "results" / one.file_of(second)).unlink()
        path, key = tmp_path / "results" / one.file_of(first), ("run", "data", "train")
    record = inner = json.loads(path.read_text())
    for name in key[:-1]:
        inner = inner[name]
    inner[key[-1]] = "other"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"was made with another data: .*another --{place}"):
        job(one, tmp_path, world).run()


@pytest.mark.parametrize("content", ["[]", "{}", '{"members": 3}', '{"members": {}, "inputs": []}'])
def test_a_groups_file_that_is_none_is_named(one, world, tmp_path, content):
    folder = tmp_path / "work" / "s-seed1"
    folder.mkdir(parents=True)
    (folder / "group.json").write_text(content)
    with pytest.raises(ValueError, match=f"{folder}.*: choose another --work"):
        job(one, tmp_path, world).run()


def test_files_of_others_in_the_way_of_a_group_are_left_alone(one, world, tmp_path):
    thesis = tmp_path / "work" / "s-seed1" / "checkpoint-1" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    with pytest.raises(ValueError, match="no run of ours wrote: choose another --work"):
        job(one, tmp_path, world).run()
    assert thesis.read_text() == "years of work"


def test_learning_rates_are_chosen_on_validation(finished, grid, world, tmp_path):
    chosen = tuned_rates(finished / "results", grid)
    for size, arms in chosen["rates"].items():
        for arm, rate in arms.items():
            tried = chosen["nats_per_residue"][size][arm]
            assert rate == float(min(tried, key=tried.get))
        lowest = {
            arm: min(tried.values()) for arm, tried in chosen["nats_per_residue"][size].items()
        }
        assert lowest[chosen["best_arm"][size]] == min(lowest.values())
    with pytest.raises(ValueError, match="choose on validation only"):
        tuned_rates(finished / "results", replace(grid, split="test"))
    (tmp_path / "results").mkdir()
    write_json(tmp_path / "results" / RATES_FILE, chosen)
    confirm = replace(grid, tuned=True, split="test", rates=())
    cells = job(confirm, tmp_path, world).cells
    assert len(cells) == 12
    assert all(c.learning_rate == chosen["rates"][c.size][c.arm] for c in cells)
    path = tmp_path / "spoiled" / "results" / RATES_FILE
    path.parent.mkdir(parents=True)
    messages = refusals(chosen, path, lambda: job(confirm, tmp_path / "spoiled", world), of_each=4)
    assert messages
    unlike = [m for m in messages if not m.startswith(f"{path}: ") or "choose again" not in m]
    assert all("needs a tuned learning rate" in message for message in unlike), unlike
    with pytest.raises(ValueError, match="needs a tuned learning rate for both at s"):
        confirm.cells({"s": {"baseline": 1e-3}})


def test_rates_beyond_the_range_are_taken_into_the_choice(finished, grid, tmp_path):
    shutil.copytree(finished / "results", tmp_path / "results")
    narrow = replace(grid, rates=(1e-2,), arms={"both": grid.arms["both"]})
    chosen = tuned_rates(tmp_path / "results", narrow)
    assert set(chosen["nats_per_residue"]["s"]["both"]) == {"0.001", "0.01"}
    whole = tuned_rates(finished / "results", grid)
    assert chosen["rates"]["s"]["both"] == whole["rates"]["s"]["both"]


def test_results_of_other_settings_are_not_taken_for_done(finished, grid, world):
    other = replace(grid, shared=replace(grid.shared, max_steps=7))
    with pytest.raises(ValueError, match="holds a cell of other settings"):
        job(other, finished, world).run()


def test_the_provided_grids_are_the_issues():
    assert set(GRIDS) == {
        "owner", "synergy-tuning", "synergy", "synergy-random-tuning", "synergy-random",
        "temperature", "alpha", "smoothing",
    }  # fmt: skip
    owner = GRIDS["owner"]
    files = {owner.file_of(cell) for cell in owner.cells()}
    assert files == {f"ablation_{arm}.json" for arm in PUBLISHED}
    temperatures = [loss.temperature for loss in GRIDS["temperature"].arms.values()]
    assert temperatures == [1, 2, 4, 6, 8, 10]
    assert [loss.alpha for loss in GRIDS["alpha"].arms.values()] == [0.1, 0.3, 0.5, 0.7, 0.9]
    smoothing = GRIDS["smoothing"].arms.values()
    assert [loss.smoothing_factor for loss in smoothing] == [0.01, 0.05, 0.1, 0.2]
    assert all(loss.use_calibration_smoothing for loss in smoothing)
    for name in ("temperature", "alpha", "smoothing", "synergy-tuning"):
        assert GRIDS[name].split == "validation"
    for name in ("synergy", "synergy-random"):
        confirm, tuning = GRIDS[name], GRIDS[f"{name}-tuning"]
        assert len(confirm.seeds) >= 5
        assert not set(confirm.seeds) & set(tuning.seeds)
        assert confirm.arms == tuning.arms == ARMS
        assert confirm.shared == tuning.shared
        assert (confirm.split, tuning.split) == ("test", "validation")


def test_every_arm_can_be_trained_in_its_group():
    """Cells of one group have the same training arguments: a cohort has one set of them."""
    for grid in GRIDS.values():
        cells = grid.cells({size: dict.fromkeys(grid.arms, 1e-3) for size in grid.sizes})
        groups: dict[str, set[str]] = {}
        for cell in cells:
            own = replace(
                grid.settings(cell), loss=grid.shared.loss, learning_rate=1.0, init_from=None
            )
            groups.setdefault(grid.group_of(cell), set()).add(settings_key(own))
        assert all(len(kinds) == 1 for kinds in groups.values())


def test_another_teacher_and_presets_change_the_grid():
    """Students that are cut from the teacher are cut from the one that was asked for."""
    line = "--grid synergy --teacher_model T --sizes hf-tiny s11 --train_size_prop 0.01"
    line += " --layout plain"
    asked = line.split()
    changed = script.chosen(script.build_parser().parse_args(asked))
    assert changed.shared.teacher_model == changed.shared.init_from == "T"
    assert changed.shared.train_size_prop == 0.01
    assert changed.shared.layout == "plain"
    assert changed.sizes["hf-tiny"] == StudentSettings(4, 4, 512)
    asked[1] = "synergy-random"
    assert script.chosen(script.build_parser().parse_args(asked)).shared.init_from is None


def test_the_script(grid, world, tmp_path, capsys, refusal):
    assert script.main(["--list"]) == 0
    assert "synergy-tuning" in capsys.readouterr().out
    for wrong, message in (
        ("", "--list"),
        ("--grid owner --arms nonsense", "the grid owner has baseline"),
        ("--grid synergy --rates 1e-3", "reads each arm's rate"),
    ):
        assert message in refusal(script.main(wrong.split()))
    arguments = (
        f"--grid owner --teacher_model {world / 'teacher'} --data {world / 'proteins'} "
        f"--max_steps 2 --arms baseline both --results {tmp_path / 'results'} "
        f"--work {tmp_path / 'work'} --cache_dir {world / 'tokens'}"
    ).split()
    assert script.main(arguments) == 0
    for arm in ("baseline", "both"):
        found = json.loads((tmp_path / "results" / f"ablation_{arm}.json").read_text())
        assert found["perplexity_ratio"] > 0
        assert found["student_ece"]["ece"] >= 0
    assert script.main([*arguments, "--status"]) == 0
    assert "2 of 2 cells done" in capsys.readouterr().out
    assert read_json(tmp_path / "work" / "s27-seed42" / "group.json")["members"]

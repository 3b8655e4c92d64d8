"""The experiment on recipes for students: curves, tuned rates, compute to a given quality."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from src.experiments import students
from src.experiments.students import compute_ratios, reached
from tools.student_experiment import main


def curve(*points):
    return [{"step": s, "seconds": 2.0 * s, "kl_per_residue": kl} for s, kl in points]


def test_where_a_quality_is_reached():
    """On a power law, interpolation in logarithms is exact."""
    law = curve(*((step, step**-0.5) for step in (1, 4, 100)))
    for step in (1, 2, 4, 9, 64, 100):
        assert reached(law, step**-0.5, "step") == pytest.approx(step)
        assert reached(law, step**-0.5, "seconds") == pytest.approx(2 * step)
    assert reached(law, 5.0, "step") == 1  # better from its first point on
    assert reached(law, 0.09, "step") is None
    from_start = curve((0, 1.0), (10, 0.25))
    assert reached(from_start, 1.0, "step") == 0
    assert reached(from_start, 0.5, "step") == pytest.approx(5)


def test_the_ratio_of_compute():
    slow = {"curve": curve((10, 1.0), (100, 0.5)), "tokens_per_step": 3, "operations_per_token": 8}
    fast = {"curve": curve((5, 0.5), (100, 0.1)), "tokens_per_step": 3, "operations_per_token": 2}
    assert compute_ratios(slow, fast) == {"seconds": 20, "operations": 80}
    assert compute_ratios(slow, slow) == {
        "seconds": pytest.approx(1),
        "operations": pytest.approx(1),
    }
    assert compute_ratios(fast, slow) is None
    cut = {**fast, "curve": [{"step": 0, "seconds": 4, "kl_per_residue": 0.4}]}
    cut["operations_of_start"] = 1200
    assert compute_ratios(slow, cut) == {"seconds": 50, "operations": 2}


def test_a_curve_begins_before_the_first_step_and_goes_on(tmp_path, monkeypatch):
    """The clock counts from the curve's creation and stands still while it measures."""
    now = [0.0]
    monkeypatch.setattr(students, "clock", lambda: now[0])

    def measure(model):
        now[0] += 1000
        return {"kl_per_residue": 1.0}

    def state(step):
        return SimpleNamespace(global_step=step)

    model = torch.nn.Linear(1, 1)
    first = students.Curve([2, 4], measure, tmp_path / "curve.json")
    now[0] += 10  # reading and cutting
    first.on_train_begin(None, state(0), None, model)
    for step in (1, 2, 3):
        now[0] += 5
        first.on_step_end(None, state(step), None, model)
    assert [(p["step"], p["seconds"]) for p in first.points] == [(0, 10), (2, 20)]
    second = students.Curve([2, 4], measure, tmp_path / "curve.json")
    now[0] += 7  # reading again, which the run that was not stopped had not to do
    second.on_train_begin(None, state(3), None, model)
    now[0] += 5
    second.on_step_end(None, state(4), None, model)
    assert [(p["step"], p["seconds"]) for p in second.points] == [(0, 10), (2, 20), (4, 30)]


@pytest.fixture
def teacher(tiny_lm, tiny_tokenizer, tmp_path, random_proteins):
    """Write a teacher and proteins in parts."""
    model = tiny_lm(n_embd=72, n_head=4, seed=4, initializer_range=0.2)
    model.save_pretrained(tmp_path / "teacher")
    tiny_tokenizer.save_pretrained(tmp_path / "teacher")
    (tmp_path / "data").mkdir()
    for seed, part in enumerate(("train", "validation")):
        lines = (f">{part}{i}\n{p}" for i, p in enumerate(random_proteins(40, 20, 40, seed=seed)))
        (tmp_path / "data" / f"{part}.fasta").write_text("\n".join(lines))
    return tmp_path


def options(folder, *more):
    return [
        "--teacher_model", str(folder / "teacher"), "--data", str(folder / "data"),
        "--results", str(folder / "results"), "--work", str(folder / "work"),
        "--sizes", "s05", "--steps", "20", *more,
    ]  # fmt: skip


def test_an_experiment_tunes_trains_and_goes_on(teacher, capsys, monkeypatch):
    monkeypatch.setitem(
        students.COMPARED, "plain", students.Recipe(students.LossSettings(), {}, (1e-3, 2e-3))
    )
    monkeypatch.setitem(
        students.COMPARED,
        "recommended",
        students.Recipe.named("recommended", (1e-3,), batch_size=8),
    )
    monkeypatch.setattr(students, "BEYOND", 0)
    wanted = options(teacher, "--recipes", "plain", "recommended")
    assert main([*wanted, "--summary"]) == 2
    assert "leave out --summary" in capsys.readouterr().err
    assert main(wanted) == 0
    files = sorted(path.name for path in (teacher / "results").iterdir())
    rate = min(
        (json.loads(path.read_text()) for path in (teacher / "results").glob("plain*steps2-*")),
        key=lambda run: run["curve"][-1]["kl_per_residue"],
    )["rate"]
    assert files == sorted(
        [
            "compute_20.png",
            "plain-s05-steps2-seed1000-lr0.001.json",
            "plain-s05-steps2-seed1000-lr0.002.json",
            f"plain-s05-steps20-seed1-lr{rate:g}.json",
            "recommended-s05-steps2-seed1000-lr0.001.json",
            "recommended-s05-steps20-seed1-lr0.001.json",
        ]
    )
    run = json.loads((teacher / "results" / files[-1]).read_text())
    assert run["settings"]["batch_size"] == 8
    assert run["curve"][-1]["step"] == run["settings"]["max_steps"] == 40  # as many proteins
    assert run["settings"]["loss"]["alpha"] == 0
    assert run["settings"]["init_from"] == str(teacher / "teacher")
    seconds = [point["seconds"] for point in run["curve"]]
    assert seconds == sorted(seconds)
    assert run["curve"][0]["step"] == 0
    assert seconds[0] > 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in (teacher / "results").iterdir()}
    assert main([*wanted, "--summary"]) == 0
    assert "== " not in capsys.readouterr().out
    assert main([*wanted, "--summary", "--data", str(teacher / "other")]) == 2
    assert "was made with other settings (data)" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (teacher / "results").iterdir()} == before


def test_a_cached_teacher_counts_once(teacher, monkeypatch):
    """The operations count the filling of the cache; the students are the same."""
    for name in ("recommended", "cached"):
        monkeypatch.setitem(
            students.COMPARED, name, replace(students.COMPARED[name], rates=(1e-3,))
        )
    monkeypatch.setattr(students, "BEYOND", 0)
    assert main(options(teacher, "--recipes", "recommended", "cached")) == 0
    online, cached = (
        json.loads((teacher / "results" / f"{name}-s05-steps20-seed1-lr0.001.json").read_text())
        for name in ("recommended", "cached")
    )
    ends = [run["curve"][-1]["kl_per_residue"] for run in (online, cached)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)
    student, weights = online["student"]["parameters"], 2 * teacher_parameters(teacher)
    assert online["operations_per_token"] == 6 * student + weights
    assert cached["operations_per_token"] == 6 * student
    tokens = cached["tokens_per_step"] * 40 / 4  # 40 proteins
    assert cached["operations_of_start"] - online["operations_of_start"] == pytest.approx(
        weights * tokens
    )
    assert not list((teacher / "work").glob("*.cache"))


def teacher_parameters(folder):
    return sum(t.numel() for t in load_file(folder / "teacher" / "model.safetensors").values())


def test_unknown_names(teacher, capsys):
    assert main(options(teacher, "--recipes", "magic")) == 2
    assert "--recipes: must be some of published" in capsys.readouterr().err
    assert main(options(teacher, "--recipes", "plain", "--sizes", "3x88")) == 2
    assert "--sizes 3x88: must be one of s27" in capsys.readouterr().err


def test_a_shape_and_a_rate_of_ones_own(teacher):
    """Layers, heads and width instead of a size; a given rate is not tuned."""
    wanted = options(teacher, "--recipes", "plain", "--learning_rate", "3e-3")
    assert main([*wanted, "--sizes", "1x2x16"]) == 0
    (path,) = (teacher / "results").glob("*.json")
    assert path.name == "plain-1x2x16-steps20-seed1-lr0.003.json"
    shape = json.loads(path.read_text())["settings"]["student"]
    assert (shape["n_layer"], shape["n_head"], shape["n_embd"]) == (1, 2, 16)


def test_a_start_that_is_not_the_teacher(teacher):
    """Cut students come from it, random ones do not; the targets stay the teacher's."""
    shutil.copytree(teacher / "teacher", teacher / "start")
    wanted = options(teacher, "--recipes", "plain", "cut", "--learning_rate", "3e-3")
    assert main([*wanted, "--init_from", str(teacher / "start")]) == 0
    starts = {
        path.name.split("-")[0]: json.loads(path.read_text())["settings"]
        for path in (teacher / "results").glob("*.json")
    }
    assert starts["cut"]["init_from"] == str(teacher / "start")
    assert starts["cut"]["teacher_model"] == str(teacher / "teacher")
    assert starts["plain"]["init_from"] is None

"""The scripts on two processes: one speaks, locks and records, all work, and one is like two."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from small_runs import timeless
from test_distributed import run_jobs

from src.common import processes
from src.common.runs import FINISHED, read_run
from src.common.settings import TrainSettings
from src.models.sizes import total_steps
from src.trainer.callbacks import read_metrics
from src.trainer.checkpoints import read_tensors
from src.training.stages import batches_of_each


def statuses(lines: list[str]) -> list[str]:
    """Return the lines that tell how jobs ended."""
    return [line for line in lines if re.fullmatch(r"\w+: \[[-\d, ]+\]", line)]


def files(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()}
    return {str(n): p.read_bytes() for n, p in found.items() if p.name != ".lock"}


def assert_like(one: Path, other: Path) -> None:
    """Compare two runs of 13 steps within what another order of float32 sums makes of them.

    The last step is left out: its last batch is not full, and two processes fill it up.
    """
    records = [read_run(folder) for folder in (one, other)]
    assert [record["status"] for record in records] == [FINISHED] * 2
    assert [record["steps"] for record in records] == [13] * 2
    logs = [[timeless(r) for r in read_metrics(folder)] for folder in (one, other)]
    assert [r["step"] for r in logs[0]] == [r["step"] for r in logs[1]]
    assert [r["step"] for r in logs[0] if "loss" in r] == [*range(1, 14)]
    for first, second in zip(*logs, strict=True):
        assert first.keys() == second.keys()
        for name in first.keys() - {"total_flos", "epoch"} if first["step"] < 13 else ():
            assert first[name] == pytest.approx(second[name], rel=1e-5), name
    a, b = (read_tensors(folder / "checkpoint-10" / "model.safetensors") for folder in (one, other))
    flat = [torch.cat([t[name].flatten() for name in sorted(t)]) for t in (a, b)]
    assert (flat[0] - flat[1]).norm() / flat[0].norm() < 1e-6


@pytest.mark.slow
def test_the_scripts_run_on_two_processes_as_on_one(tmp_path, capfd):
    lines = run_jobs(tmp_path, "inputs", "train", "again", "evaluate", "cache")
    assert statuses(lines) == [
        "inputs: [0]",
        "train: [0]",
        "train: [0, 0]",
        "again: [0, 0]",
        "again: [2, 2]",
        "evaluate: [0, 0]",
        "cache: [0]",
        "cache: [0, 0]",
    ]
    assert_like(tmp_path / "train-1", tmp_path / "train-2")
    record = read_run(tmp_path / "train-2")
    assert record["processes"] == 2
    assert json.loads((tmp_path / "results.json").read_text())["student_perplexity"] > 1
    assert files(tmp_path / "cache-1") == files(tmp_path / "cache-2")
    assert any(name.endswith("manifest.json") for name in files(tmp_path / "train-2-cache"))
    shown = capfd.readouterr().out
    assert shown.count("nothing to do") <= 1
    assert shown.count("other settings (seed)") <= 1


def test_shards_of_a_cache_are_shared_out_and_are_those_of_one_process(tmp_path):
    lines = run_jobs(tmp_path, "shards")
    counts = {}
    for line in lines:
        if found := re.fullmatch(r"rank (\d): (\d+) shards", line):
            counts.setdefault(found[1], []).append(int(found[2]))
    assert statuses(lines) == ["shards: [0]", "shards: [0, 0]"]
    alone, together = max(counts["0"]), min(counts["0"])
    assert together + counts["1"][0] == alone
    assert abs(together - counts["1"][0]) <= 1
    assert together > 3
    assert files(tmp_path / "shards-1") == files(tmp_path / "shards-2")


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_steps_on_more_and_on_fewer_processes(tmp_path):
    lines = run_jobs(tmp_path, "inputs", "train", "fewer", "more", "odd")
    assert statuses(lines)[3:] == [
        "fewer: [-9, -9]",
        "fewer: [0]",
        "more: [-9]",
        "more: [0, 0]",
        "odd: [-9]",
        "odd: [2, 2]",  # one batch a step cannot be shared by two
    ]
    for name in ("fewer", "more"):
        assert_like(tmp_path / "train-1", tmp_path / name)
        assert len(read_run(tmp_path / name)["resumed"]) == 1
    assert read_run(tmp_path / "fewer")["processes"] == 2
    assert read_run(tmp_path / "more")["processes"] == 1


def test_alone_nothing_is_agreed_with_anybody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert (processes.rank(), processes.count(), processes.is_first()) == (0, 1, True)
    processes.join("no such device")
    assert processes.agreed(lambda: 7) == 7
    with pytest.raises(ValueError, match="as it is"):
        processes.agreed(lambda: (_ for _ in ()).throw(ValueError("as it is")))


@pytest.mark.parametrize(
    ("accumulation", "together", "now", "each"),
    [(1, 1, 1, 1), (2, 1, 2, 1), (1, 2, 1, 2), (3, 2, 6, 1), (1, 1, 2, None), (1, 2, 3, None)],
)
def test_batches_of_a_step_are_shared_out_or_refused(
    monkeypatch, accumulation, together, now, each
):
    monkeypatch.setenv("WORLD_SIZE", str(now))
    settings = TrainSettings(gradient_accumulation_steps=accumulation)
    if each is None:
        with pytest.raises(ValueError, match=f"cannot be shared by {now} processes"):
            batches_of_each(settings, together)
    else:
        assert batches_of_each(settings, together) == each


def test_steps_are_those_of_all_processes_together():
    settings = TrainSettings(batch_size=4, gradient_accumulation_steps=2, num_train_epochs=3)
    assert total_steps(settings, 100) == 3 * 13
    assert total_steps(settings, 100, 2) == 3 * 7
    assert total_steps(settings, 100, 8) == 3 * 2

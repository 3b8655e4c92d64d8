"""Two processes train like one, and checkpoints go from one number of processes to another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import history

from scripts import generate
from src.common.files import sha256_file
from src.evaluation.generation import Begun
from src.trainer.checkpoints import checkpoints_of, read_tensors
from tests.two_processes import SERVED, SERVING

ROOT = Path(__file__).resolve().parents[1]


def run_jobs(folder: Path, *jobs: str) -> list[str]:
    """Run jobs of tests/two_processes.py; return the lines that tell exit statuses."""
    done = subprocess.run(
        [sys.executable, "tests/two_processes.py", str(folder), *jobs],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stderr)  # shown where a test fails
    return [line for line in done.stdout.splitlines() if line.startswith((*jobs, "rank"))]


def weights(folder: Path) -> torch.Tensor:
    tensors = read_tensors(folder / "checkpoint-9" / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def assert_alike(one: Path, other: Path) -> None:
    """Compare weights and logs of two runs within the rounding of float64 and of the log."""
    a, b = weights(one), weights(other)
    assert (a - b).norm() / a.norm() < 1e-9
    logs = [history(folder / "checkpoint-9") for folder in (one, other)]
    assert len(logs[0]) == len(logs[1]) == 6
    for first, second in zip(*logs, strict=True):
        assert first.keys() == second.keys()
        for name in first.keys() - {"total_flos"}:
            assert first[name] == pytest.approx(second[name], rel=1e-6), name


def test_two_processes_train_like_one_with_twice_the_accumulation(tmp_path):
    lines = run_jobs(tmp_path, "one", "two")
    assert lines == ["one: [0]", "two: [0, 0]"]
    assert_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_checkpoints_go_from_two_processes_to_one_and_back(tmp_path):
    lines = run_jobs(tmp_path, "one", "two then one", "one then two")
    assert lines == [
        "one: [0]",
        "two then one: [-9, -9]",
        "two then one: [0]",
        "one then two: [-9]",
        "one then two: [0, 0]",
    ]
    assert_alike(tmp_path / "one", tmp_path / "two then one")
    assert_alike(tmp_path / "one", tmp_path / "one then two")


@pytest.mark.slow
def test_two_processes_survive_kills_and_signals_bit_by_bit(tmp_path):
    lines = run_jobs(tmp_path, "dropout", "dropout, killed", "dropout, stopped")
    assert lines[1:] == [
        "dropout, killed: [-9, -9]",
        "dropout, killed: [0, 0]",
        # One process was asked; both left together, after the step in which both knew.
        "dropout, stopped: [143, 143]",
        "dropout, stopped: [0, 0]",
    ]
    whole = tmp_path / "dropout" / "checkpoint-9"
    names = ["model", "optimizer", "process-0", "process-1"]
    for other in ("dropout, killed", "dropout, stopped"):
        for name in names:
            file = f"{name}.safetensors"
            assert sha256_file(whole / file) == sha256_file(
                tmp_path / other / "checkpoint-9" / file
            ), f"{other}: {file}"
        assert history(whole) == history(tmp_path / other / "checkpoint-9")
    stopped = {path.name for path in (tmp_path / "dropout, stopped").glob("checkpoint-*")}
    assert "checkpoint-4" in stopped


@pytest.mark.slow
def test_a_bad_number_in_one_process_stops_both(tmp_path):
    lines = run_jobs(tmp_path, "nan")
    assert lines[-1] == "nan: [2, 2]"
    assert all("step 6: " in line for line in lines[:-1])
    folder = tmp_path / "nan" / "failure-step-6"
    found = [json.loads((folder / f"failure-{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0]["first_bad_tensor"] is None
    assert found[1]["first_bad_tensor"] == "the parameter transformer.ln_f.bias"
    assert checkpoints_of(tmp_path / "nan")[0].name == "checkpoint-4"


@pytest.mark.slow
def test_two_processes_sample_and_score_what_one_does(tmp_path, random_proteins, monkeypatch):
    """The two go on with a sampling that was stopped in one."""
    add = Begun.add

    def stopping(self, protein, tally):
        add(self, protein, tally)
        if tally.kept == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Begun, "add", stopping)
    sampled = SERVED.format(folder=tmp_path / "sampled-2") + SERVING["sampled"][1]
    assert generate.main(sampled.split()) == 130
    assert len((tmp_path / "sampled-2.begun").read_text().splitlines()) == 6
    proteins = [*random_proteins(30, 20, 200), *random_proteins(2, 1500, 1600)]
    text = "".join(f">p{i}\n{residues}\n" for i, residues in enumerate(proteins))
    (tmp_path / "in.fasta").write_text(text)
    lines = run_jobs(tmp_path, "serve")
    assert lines == ["serve: [0]", "serve: [0, 0]"] * 3
    for name, least in (("sampled", 24), ("scored", 33), ("scanned", 32 * 19 + 1)):
        one, two = ((tmp_path / f"{name}-{n}").read_text() for n in (1, 2))
        assert one == two
        assert len(one.splitlines()) >= least

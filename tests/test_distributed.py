"""Two processes train, sample, score and run the scripts like one, also with a spread teacher."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import history, timeless

from scripts import generate
from src.common import processes
from src.common.files import sha256_file
from src.common.runs import FINISHED, read_run
from src.common.settings import TrainSettings
from src.evaluation.generation import Begun
from src.models import sharding
from src.models.sizes import total_steps
from src.trainer.callbacks import read_metrics
from src.trainer.checkpoints import checkpoints_of, read_tensors
from src.training.stages import batches_of_each
from tests.two_processes import SERVED, SERVING

ROOT = Path(__file__).resolve().parents[1]
STATUS = re.compile(r"([\w ,]+): \[[-\d, ]+\]")
QUICK = ("one", "two", "shards", "sharded", "sharded_shards", "sharded_nan")


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


def statuses(lines: list[str]) -> list[str]:
    """Return the lines that tell how jobs ended."""
    return [line for line in lines if STATUS.fullmatch(line)]


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[Path, dict[str, list[str]]]:
    """Run the quick jobs together, which saves imports; return their folder and lines of each."""
    folder = tmp_path_factory.mktemp("quick")
    lines: dict[str, list[str]] = {job: [] for job in QUICK}
    said: list[str] = []
    for line in run_jobs(folder, *QUICK):
        said.append(line)
        if ended := STATUS.fullmatch(line):
            lines[ended[1]] += said
            said = []
    return folder, lines


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


def test_two_processes_train_like_one_with_twice_the_accumulation(quick):
    folder, lines = quick
    assert (lines["one"], lines["two"]) == (["one: [0]"], ["two: [0, 0]"])
    assert_alike(folder / "one", folder / "two")


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


def test_shards_of_a_cache_are_shared_out_and_are_those_of_one_process(quick):
    folder, lines = quick
    counts = {}
    for line in lines["shards"]:
        if found := re.fullmatch(r"rank (\d): (\d+) shards", line):
            counts.setdefault(found[1], []).append(int(found[2]))
    assert statuses(lines["shards"]) == ["shards: [0]", "shards: [0, 0]"]
    alone, together = max(counts["0"]), min(counts["0"])
    assert together + counts["1"][0] == alone
    assert abs(together - counts["1"][0]) <= 1
    assert together > 3
    assert files(folder / "shards-1") == files(folder / "shards-2")


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


def test_a_spread_teacher_gives_the_same_bits_and_half_its_blocks_are_held(quick):
    lines = quick[1]["sharded"]
    assert sorted(lines) == ["rank 0: alike", "rank 1: alike", "sharded: [0, 0]"]


def test_a_cache_of_unequal_shares_is_that_of_one_process(quick):
    folder, lines = quick
    assert statuses(lines["sharded_shards"]) == ["sharded_shards: [0, 0]"]
    assert {"rank 0: 16 shards", "rank 1: 15 shards"} <= set(lines["sharded_shards"])
    assert files(folder / "sharded-shards") == files(folder / "shards-1")


def test_a_bad_number_in_the_first_of_two_batches_of_one_process_stops_both(quick):
    lines = quick[1]["sharded_nan"]
    assert statuses(lines) == ["sharded_nan: [2, 2]"]
    told = {line.split(":")[0]: line for line in lines if line.startswith("rank")}
    assert "student: output of transformer.wte of batch 0 is not finite" in told["rank 1"]


@pytest.mark.slow
def test_a_training_is_the_one_with_the_teacher_whole(tmp_path):
    lines = run_jobs(tmp_path, "inputs", "sharded_training")
    assert statuses(lines)[1:] == [
        "sharded_training: [0, 0]",
        "sharded_training: [0, 0]",
        "sharded_training: [0, 0]",
        "sharded_training: [2]",
    ]
    whole, sharded, cached = (tmp_path / name for name in ("whole", "sharded", "cached"))
    weights = [(folder / "model.safetensors").read_bytes() for folder in (whole, sharded)]
    assert weights[0] == weights[1]
    logs = [[timeless(record) for record in read_metrics(folder)] for folder in (whole, sharded)]
    assert logs[0] == logs[1]
    records = [read_run(folder) for folder in (whole, sharded, cached)]
    assert len({record["teacher"]["fingerprint"] for record in records}) == 1
    losses = [record["final"]["eval_loss"] for record in records]
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-6)


def test_one_process_or_a_model_without_blocks_is_refused(tiny_lm):
    with pytest.raises(ValueError, match="start them with torchrun"):
        sharding.load_sharded(lambda: (tiny_lm(), None), torch.device("cpu"))
    model = tiny_lm()
    assert not sharding.is_sharded(model)
    with sharding.in_step(model, 3), sharding.in_step(None, 3):
        pass
    model.transformer.h = torch.nn.Identity()
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no list of blocks"):
        sharding.shard(model, None, torch.device("cpu"))  # type: ignore[arg-type]

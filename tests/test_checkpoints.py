"""Checkpoints: whole or not used, no pickle, and a resumed run that ends in the same bits."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from src.batching import PaddingCollator, ProteinDataset
from src.checkpoints import (
    checkpoints_of,
    fault_of,
    newest_valid,
    random_states,
    restore_random_states,
    write_manifest,
)
from src.distillation import DistillationTrainer
from src.files import sha256_file
from src.models import model_fingerprint


class Tokens:
    """Stands in for tokenised proteins."""

    def __init__(self, count: int = 24) -> None:
        rng = np.random.default_rng(0)
        self.rows = [rng.integers(1, 60, n) for n in rng.integers(4, 30, count)]
        self.lengths = np.array([len(row) for row in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.rows[index]


def make_trainer(tiny_lm, folder, **overrides):
    student = tiny_lm(seed=1, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "remove_unused_columns": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 9,
        "logging_steps": 3,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
    }
    dataset = ProteinDataset(Tokens())
    return DistillationTrainer(
        model=student,
        teacher_model=tiny_lm(n_layer=3, n_embd=24, seed=2),
        use_uncertainty_weighting=True,
        use_calibration_smoothing=True,
        args=TrainingArguments(**{**settings, **overrides}),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=PaddingCollator(0),
    )


TIMES = {
    "tokens_per_second",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "total_flos",
    "train_loss",
}


def history(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    return [
        {k: v for k, v in r.items() if k not in TIMES and "runtime" not in k and "per_sec" not in k}
        for r in state["log_history"]
    ]


@pytest.mark.parametrize("stop_after", [2, 4, 6])
def test_a_resumed_run_ends_in_the_same_bits(tiny_lm, tmp_path, stop_after):
    whole = make_trainer(tiny_lm, tmp_path / "whole", save_total_limit=None)
    whole.train()
    cut = make_trainer(tiny_lm, tmp_path / "cut", save_total_limit=None)

    class Stop(Exception):
        pass

    step = cut.training_step

    def stopping_step(*arguments, **options):
        # In the middle of accumulation, some steps after the checkpoint.
        if cut.state.global_step == stop_after + 1:
            raise Stop
        return step(*arguments, **options)

    cut.training_step = stopping_step
    with pytest.raises(Stop):
        cut.train()
    # Whatever the process did meanwhile must not matter.
    torch.rand(5)
    random.random()
    np.random.rand(3)
    resumed = make_trainer(tiny_lm, tmp_path / "cut", save_total_limit=None)
    resumed.train(resume_from_checkpoint=str(newest_valid(tmp_path / "cut")))
    a, b = (tmp_path / name / "checkpoint-8" for name in ("whole", "cut"))
    for file in ("model.safetensors", "optimizer.safetensors", "random-0.safetensors"):
        assert sha256_file(a / file) == sha256_file(b / file), file
    assert history(a) == history(b)
    one, other = (model_fingerprint(ours.model) for ours in (whole, resumed))  # type: ignore[arg-type]
    assert one == other


def test_old_checkpoints_go_and_no_pickle_is_written(tiny_lm, tmp_path):
    make_trainer(tiny_lm, tmp_path / "run").train()
    run = tmp_path / "run"
    assert [path.name for path in checkpoints_of(run)] == ["checkpoint-9", "checkpoint-8"]
    suffixes = {path.suffix for path in run.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".jinja", ".txt"}
    assert not list(run.glob("*.unfinished"))
    assert fault_of(run / "checkpoint-9") is None


def damaged(folder, kind):
    """Return a checkpoint directory with one fault."""
    path = folder / "model.safetensors"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "altered":
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    elif kind == "missing":
        path.unlink()
    else:
        (folder / "manifest.json").write_text(kind)


@pytest.mark.parametrize("kind", ["truncated", "altered", "missing", "", "[]", '{"files": 3}'])
def test_a_damaged_checkpoint_is_passed_over_and_said_so(tmp_path, kind):
    for number in (10, 9, 100):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(range(200)))
        write_manifest(folder)
    (tmp_path / "checkpoint-200.unfinished").mkdir()
    damaged(tmp_path / "checkpoint-100", kind)
    lines: list[str] = []
    assert newest_valid(tmp_path, lines.append) == tmp_path / "checkpoint-10"
    assert len(lines) == 1
    assert "checkpoint-100 is not used" in lines[0]


def test_random_states_round_trip_through_json():
    tensors, plain = random_states()
    plain = json.loads(json.dumps(plain))
    first = (torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist())
    restore_random_states(tensors, plain)
    assert first == (torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist())

"""A training of a second: what tests of checkpoints, signals, failures and processes share."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainingArguments

from src.common.files import sha256_file
from src.distillation import DistillationTrainer
from src.models.loading import model_fingerprint
from src.proteins.batching import PackedDataset, PackingCollator, PaddingCollator, ProteinDataset
from src.trainer.callbacks import MetricsFile, read_metrics
from src.trainer.checkpoints import newest_valid


class Tokens:
    """Stands in for tokenised proteins."""

    def __init__(self, count: int = 16, low: int = 4, high: int = 30, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.rows = [rng.integers(1, 60, n) for n in rng.integers(low, high, count)]
        self.lengths = np.array([len(row) for row in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.rows[index]


class At(TrainerCallback):
    """Does something at the n-th event of a kind."""

    def __init__(self, event: str, count: int, act: Callable[[], Any]) -> None:
        self.left, self.act = count, act
        setattr(self, event, self.happen)

    def happen(self, *arguments, **options) -> None:
        self.left -= 1
        if self.left == 0:
            self.act()


def interrupt() -> None:
    """End a training at once, as a kill does."""
    raise KeyboardInterrupt


def signal_at(event: str, count: int, number: int = signal.SIGTERM) -> At:
    """Return a callback that sends this process a signal at the n-th event of a kind."""
    return At(event, count, lambda: os.kill(os.getpid(), number))


def arguments(folder, **more) -> TrainingArguments:
    """Return arguments of a training on the CPU that shows and reports nothing."""
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **more,
    )


def make_trainer(tiny_lm, folder, packed=False, dropout=0.1, loss=None, **overrides) -> Any:
    """Return a Trainer whose log, validation and checkpoints fall on different steps."""
    pdrop = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    student = tiny_lm(seed=1, **pdrop)
    settings: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": None,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 9,
        "logging_steps": 3,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "logging_nan_inf_filter": False,
    }
    tokens = Tokens(24)
    dataset = PackedDataset(tokens, 64) if packed else ProteinDataset(tokens)
    return DistillationTrainer(
        model=student,
        teacher_model=tiny_lm(n_layer=3, n_embd=24, seed=2),
        **{"use_uncertainty_weighting": True, "use_calibration_smoothing": True, **(loss or {})},
        args=arguments(folder, **(settings | overrides)),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=PackingCollator(0, 64) if packed else PaddingCollator(0),
        callbacks=[MetricsFile(Path(folder))],
    )


def resume(trainer):
    """Go on from the newest whole checkpoint of a Trainer's directory, if there is one."""
    newest = newest_valid(Path(trainer.args.output_dir))
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    return trainer


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without its times."""
    times = ("runtime", "per_second", "data_wait_share")
    return {k: v for k, v in record.items() if not any(part in k for part in times)}


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Return the Trainer's state in a checkpoint, without times."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return state | {"log_history": [timeless(record) for record in state["log_history"]]}


def history(checkpoint: Path) -> list[dict[str, Any]]:
    """Return the log in a checkpoint, without times."""
    return trainer_state(checkpoint)["log_history"]


def assert_same_bits(one, other, step: int = 9) -> None:
    """Compare the last checkpoints, the logs and the weights of two Trainers."""
    folders = [Path(trainer.args.output_dir) for trainer in (one, other)]
    a, b = (folder / f"checkpoint-{step}" for folder in folders)
    for file in ("model.safetensors", "optimizer.safetensors", "process-0.safetensors"):
        assert sha256_file(a / file) == sha256_file(b / file), file
    assert trainer_state(a) == trainer_state(b)
    logs = [[timeless(record) for record in read_metrics(folder)] for folder in folders]
    assert logs[0] == logs[1]
    assert model_fingerprint(one.model) == model_fingerprint(other.model)

"""Several students in one process: each ends in the bits that it would reach alone."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from small_runs import Tokens, arguments
from transformers import TrainingArguments

from src.common.settings import LossSettings, StudentSettings
from src.distillation import DistillationTrainer
from src.models.loading import build_student, model_fingerprint, student_config
from src.proteins.batching import PackedDataset, PackingCollator, PaddingCollator, ProteinDataset
from src.training.cohort import CohortTrainer, Member

ARMS = {
    "baseline": LossSettings(),
    "uncertainty": LossSettings(use_uncertainty_weighting=True),
    "mean-one": LossSettings(use_uncertainty_weighting=True, weighting="mean_one", temperature=1.0),
    "calibration": LossSettings(use_calibration_smoothing=True, alpha=0.3),
    "matched": LossSettings(use_calibration_smoothing=True, smoothing="matched"),
    "hard": LossSettings(alpha=1.0),
}
RATES = dict(zip(ARMS, (1e-2, 3e-3, 1e-2, 2e-2, 1e-2, 5e-3), strict=True))
WIDTHS = dict(zip(ARMS, (16, 16, 24, 16, 32, 16), strict=True))


def six_steps(folder, **overrides) -> TrainingArguments:
    settings = {
        "save_strategy": "steps",
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "logging_steps": 2,
        "learning_rate": 1.0,
        "max_grad_norm": 0.05,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "optim": "adamw_torch",
        "seed": 5,
    }
    return arguments(folder, **(settings | overrides))


@pytest.fixture
def parts(tiny_lm):
    """Return what a Trainer needs of data and teacher, and a maker of students."""
    teacher = tiny_lm(n_layer=3, n_embd=24, seed=2)

    def student(arm: str, dropout: float):
        shape = StudentSettings(n_layer=2, n_head=2, n_embd=WIDTHS[arm], dropout=dropout)
        return build_student(student_config(shape, teacher.config), seed=7)

    def options(packed: bool) -> dict:
        tokens = Tokens(28)
        return {
            "teacher_model": teacher,
            "train_dataset": PackedDataset(tokens, 64) if packed else ProteinDataset(tokens),
            "eval_dataset": ProteinDataset(Tokens(6, seed=9)),
            "data_collator": PackingCollator(0, 64) if packed else PaddingCollator(0),
        }

    return student, options


def alone(arm, student, options, folder, **overrides):
    args = six_steps(folder, **{"learning_rate": RATES[arm], **overrides})
    trainer = DistillationTrainer(model=student, **vars(ARMS[arm]), args=args, **options)
    trainer.train()
    return trainer


def students_of(record: Any) -> Any:
    return record["students"]


def cohort(student, options, folder, dropout=0.0, **overrides):
    members = [Member(arm, student(arm, dropout), ARMS[arm], RATES[arm]) for arm in ARMS]
    return CohortTrainer(members, args=six_steps(folder, **overrides), **options)


@pytest.mark.parametrize(
    ("packed", "dropout", "precision"),
    [(True, 0.1, {}), (False, 0.0, {"bf16": True})],
)
def test_each_student_ends_in_the_bits_of_training_it_alone(
    parts, tmp_path, packed, dropout, precision
):
    student, options = parts
    together = cohort(student, options(packed), tmp_path / "all", dropout, **precision)
    together.train()
    for member in together.members:
        folder = tmp_path / member.name
        other = alone(
            member.name, student(member.name, dropout), options(packed), folder, **precision
        )
        assert model_fingerprint(member.model) == model_fingerprint(other.model), member.name  # type: ignore[arg-type]
        records = [r for r in other.state.log_history if "hard_loss" in r]
        ours = [students_of(r)[member.name] for r in together.state.log_history if "loss" in r]
        for mine, theirs in zip(ours, records, strict=True):
            for key in ("hard_loss", "soft_loss", "mean_weight", "mean_epsilon", "grad_norm"):
                if ARMS[member.name].alpha < 1 or key != "teacher_entropy":
                    assert mine[key] == pytest.approx(theirs[key], rel=1e-12), key


def test_evaluation_gives_each_student_its_own_figures(parts, tmp_path):
    student, options = parts
    together = cohort(student, options(False), tmp_path / "all")
    found = together.evaluate()
    students: Any = found["eval_students"]
    for member in together.members:
        args = six_steps(tmp_path / member.name)
        single = DistillationTrainer(
            model=student(member.name, 0.0), **vars(member.loss), args=args, **options(False)
        ).evaluate()
        assert students[member.name]["loss"] == single["eval_loss"]
    losses = [record["loss"] for record in students.values()]
    assert found["eval_loss"] == pytest.approx(np.mean(losses))
    json.dumps(together.state.log_history)
    assert all(math.isfinite(loss) for loss in losses)

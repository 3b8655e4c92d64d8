"""How often a run is validated, in which batches, and that the value stays the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_runs import Tokens, make_trainer

from src.common.settings import LossSettings, TrainSettings, derived_steps
from src.proteins.batching import PaddingCollator, ProteinDataset
from src.training.validation import BatchCollator, BatchedDataset, plan_validation


def planned(steps: int, student: int = 100, teacher: int = 0, tokens: int = 1000, **changes: Any):
    parts: Any = {
        "train": SimpleNamespace(lengths=np.array([80, 120])),
        "validation": SimpleNamespace(lengths=np.full(tokens // 100, 100)),
    }
    settings = TrainSettings(loss=LossSettings(alpha=1.0 if not teacher else 0.5), **changes)
    return plan_validation(settings, parts, 512, student, teacher, steps, rows_per_step=10)


def test_validation_takes_at_most_five_percent_of_the_time():
    """1,000 tokens a step: a validation of 1,000 costs a third of a step, more with a teacher."""
    assert planned(60).evaluations == 9
    assert planned(60).cost == pytest.approx(1 / 180)
    assert planned(60).share <= 0.05
    assert planned(60, teacher=900).cost == pytest.approx(1000 / 1200 / 60)
    assert planned(60, teacher=900).evaluations == 3
    assert planned(60, teacher=900, cached_teacher=True).evaluations == 9
    assert [planned(steps).evaluations for steps in (1, 5, 10_000)] == [1, 1, 10]
    assert planned(60, tokens=9000).evaluations == 1
    packed = planned(60, batching="packed")
    assert packed.cost == pytest.approx(1 / 180 * 100 / 512)


def test_what_is_asked_for_wins_and_early_stopping_keeps_ten():
    assert planned(60, eval_steps=7).evaluations == 9
    assert derived_steps(TrainSettings(eval_steps=7), 60, 3)["eval_steps"] == 7
    assert planned(5, early_stopping=3).evaluations == 10
    assert derived_steps(TrainSettings(), 60, 3)["eval_steps"] == 20


def test_batches_hold_every_row_once_and_keep_to_their_tokens():
    tokens = Tokens(50)
    rows = ProteinDataset(tokens)
    data = BatchedDataset(rows, rows.lengths, 64)
    assert sorted(np.concatenate(data.batches).tolist()) == list(range(50))
    assert all(len(rows.lengths[b]) * rows.lengths[b].max() <= 64 for b in data.batches)
    collate = BatchCollator(PaddingCollator(0))
    batches = [collate([data[i]]) for i in range(len(data))]
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == tokens.lengths.sum()


def test_the_validation_loss_is_that_of_any_batches(tiny_lm, tmp_path):
    trainer = make_trainer(tiny_lm, tmp_path, per_device_eval_batch_size=3)
    usual = trainer.evaluate()
    rows = trainer.eval_dataset
    trainer.eval_dataset = BatchedDataset(rows, rows.lengths, 100)
    trainer.data_collator = BatchCollator(trainer.data_collator)
    trainer.args.per_device_eval_batch_size = 1
    batched = trainer.evaluate()
    for name in ("eval_loss", "eval_hard_loss", "eval_soft_loss", "eval_teacher_entropy"):
        assert batched[name] == pytest.approx(usual[name], rel=1e-6), name

"""The Trainer: its loss on real batches, accumulation, padding, packing, precision, checkpoints."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import Tokens, arguments
from torch.utils.data import Dataset
from transformers import TrainingArguments

from src.common.settings import LossSettings, StudentSettings
from src.distillation import DistillationTrainer
from src.loss.reference import distillation_loss
from src.models.loading import build_student, model_fingerprint, student_config
from src.proteins.batching import PackedDataset, PackingCollator, PaddingCollator, ProteinDataset

BOTH: dict[str, Any] = {"use_uncertainty_weighting": True, "use_calibration_smoothing": True}


def one_step(folder, **overrides) -> TrainingArguments:
    settings = {
        "save_strategy": "no",
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "logging_steps": 1,
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
    }
    return arguments(folder, **(settings | overrides))


@pytest.fixture
def models(tiny_lm):
    """Return a student and a teacher, in the dtype asked for."""

    def build(dtype=torch.float32):
        student = tiny_lm(n_embd=16, seed=1).to(dtype)
        teacher = tiny_lm(n_layer=3, n_embd=24, seed=2).to(dtype)
        return student, teacher

    return build


@pytest.fixture
def trainer(models, tmp_path):
    """Return a function that makes a Trainer on 16 small proteins."""

    def build(dtype=torch.float32, args=None, tokens=None, **options):
        student, teacher = models(dtype)
        dataset = ProteinDataset(tokens or Tokens())
        settings = {
            "args": args or one_step(tmp_path / "run"),
            "train_dataset": dataset,
            "eval_dataset": dataset,
            "data_collator": PaddingCollator(0),
            **options,
        }
        return DistillationTrainer(model=student, teacher_model=teacher, **settings)

    return build


def padded(tokens: Tokens, side: str = "right") -> dict:
    return PaddingCollator(0, side)([{"input_ids": row} for row in tokens.rows])


@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_compute_loss_is_the_pure_loss_of_plain_logits(trainer, impl, side):
    ours = trainer(loss_impl=impl, dtype=torch.float64, **BOTH)
    tokens = Tokens()
    batch = padded(tokens, side)
    loss = ours.compute_loss(ours.model, batch)
    assert loss.shape == ()
    # One protein at a time, without padding, through the models alone; summed by positions.
    total = positions = 0.0
    for row in tokens.rows:
        ids = torch.as_tensor(row)[None]
        with torch.no_grad():
            student, teacher = ours.model(ids).logits, ours.teacher_model(ids).logits
        part = distillation_loss(student, teacher, ids, None, LossSettings(**BOTH))
        total += part.loss.item() * part.positions.item()
        positions += part.positions.item()
    assert loss.item() == pytest.approx(total / positions, rel=1e-9)


def test_loss_has_gradients_for_the_student_alone(trainer):
    ours = trainer(**BOTH)
    ours.compute_loss(ours.model, padded(Tokens())).backward()
    assert all(p.grad is not None for p in ours.model.parameters())
    assert all(p.grad is None and not p.requires_grad for p in ours.teacher_model.parameters())
    assert not ours.teacher_model.training


@pytest.mark.parametrize("impl", ["reference", "fused"])
@pytest.mark.parametrize("weighting", ["published", "mean_one", "matched"])
def test_eight_at_once_equal_eight_accumulated(trainer, tmp_path, impl, weighting):
    weights = []
    for rows, accumulate in ((8, 1), (1, 8), (2, 4)):
        run = tmp_path / f"run{rows}"
        batches = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulate}
        losses = {"loss_impl": impl, "weighting": weighting, "smoothing": "matched", **BOTH}
        args = one_step(run, optim="sgd", **batches)
        ours = trainer(torch.float64, args=args, tokens=Tokens(8), **losses)
        ours.train()
        weights.append(torch.cat([p.detach().flatten() for p in ours.model.parameters()]))
    before = torch.cat([p.detach().flatten() for p in trainer(torch.float64).model.parameters()])
    step = weights[0] - before
    assert step.norm() > 0
    for other in weights[1:]:
        assert (other - weights[0]).norm() / step.norm() < 1e-6


@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_order_within_a_step_and_padding_side_change_nothing(trainer, impl):
    ours = trainer(dtype=torch.float64, loss_impl=impl, **BOTH)
    rows = [{"input_ids": row} for row in Tokens(12).rows]
    found = []
    for side, order, size in (
        ("right", range(12), 4),
        ("right", [7, 3, 11, 0, 5, 9, 1, 10, 2, 8, 4, 6], 4),
        ("left", range(11, -1, -1), 3),
    ):
        ordered = [rows[i] for i in order]
        collate = PaddingCollator(0, side)
        batches = [collate(ordered[i : i + size]) for i in range(0, 12, size)]
        count = ours.count_positions(batches)
        ours.model.zero_grad()
        losses = [
            ours.compute_loss(ours.model, batch, num_items_in_batch=count) for batch in batches
        ]
        torch.stack(losses).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in ours.model.parameters()])
        found.append((torch.stack(losses).sum().item(), gradient))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-9)
        assert (gradient - found[0][1]).norm() / found[0][1].norm() < 1e-9


def test_packed_rows_give_the_loss_of_padded_rows(trainer):
    tokens = Tokens()
    rows = PackedDataset(tokens, 64)
    packed = PackingCollator(0, 64)([rows[i] for i in range(len(rows))])
    for impl in ("reference", "fused"):
        ours = trainer(dtype=torch.float64, loss_impl=impl, **BOTH)
        apart = ours.compute_loss(ours.model, padded(tokens)).item()
        together = ours.compute_loss(ours.model, packed).item()
        assert together == pytest.approx(apart, rel=1e-9)


def test_rows_without_anything_to_learn_change_nothing(trainer):
    ours = trainer(dtype=torch.float64, **BOTH)
    batch = padded(Tokens(6))
    more = {name: torch.cat([value, value[:2]]) for name, value in batch.items()}
    more["attention_mask"][-1] = 0
    more["labels"][-2:] = -100
    for impl in ("reference", "fused"):
        ours.loss_impl = impl
        ours.model.zero_grad()
        plain = ours.compute_loss(ours.model, batch)
        loss = ours.compute_loss(ours.model, more)
        assert loss.item() == pytest.approx(plain.item(), rel=1e-9)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in ours.model.parameters())


@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_bfloat16_autocast_is_close_to_float32(trainer, tmp_path, impl):
    losses = []
    for bf16 in (False, True):
        ours = trainer(args=one_step(tmp_path / f"{bf16}", bf16=bf16), loss_impl=impl, **BOTH)
        losses.append(ours.evaluate()["eval_loss"])
        ours.train()
        assert all(p.isfinite().all() for p in ours.model.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_evaluation_counts_every_position_once(trainer, tmp_path, impl):
    results = []
    for rows in (16, 3):
        args = one_step(tmp_path / f"eval{rows}", per_device_eval_batch_size=rows)
        ours = trainer(torch.float64, args=args, loss_impl=impl, alpha=0.3, **BOTH)
        results.append(ours.evaluate())
    for name in ("loss", "hard_loss", "soft_loss", "mean_weight", "mean_epsilon"):
        first, second = (result[f"eval_{name}"] for result in results)
        assert first == pytest.approx(second, rel=1e-9)
    whole = ours.compute_loss(ours.model.eval(), padded(Tokens())).item()
    assert results[0]["eval_loss"] == pytest.approx(whole, rel=1e-9)


def test_training_logs_the_parts_of_the_loss(trainer, tmp_path):
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    args = one_step(tmp_path / "logs", max_steps=4, logging_steps=2, max_grad_norm=1.0, **batches)
    ours = trainer(args=args, temperature=3.0, alpha=0.25, **BOTH)
    ours.train()
    records = [r for r in ours.state.log_history if "loss" in r]
    assert len(records) == 2
    for record in records:
        parts = 0.25 * record["hard_loss"] + 0.75 * 9 * record["soft_loss"]
        assert record["loss"] == pytest.approx(parts, rel=1e-5)
        assert 0.5 <= record["mean_weight"] <= 1
        assert 0 < record["mean_epsilon"] < 0.1
        assert record["teacher_entropy"] > 0
        assert record["tokens_per_second"] > 0
        assert {"grad_norm", "learning_rate"} <= record.keys()


def test_checkpoints_hold_no_teacher(trainer, tmp_path):
    args = one_step(tmp_path / "saved", save_strategy="steps", save_steps=1)
    ours = trainer(args=args)
    before = model_fingerprint(ours.teacher_model)
    ours.train()
    assert model_fingerprint(ours.teacher_model) == before
    from safetensors import safe_open

    folder = tmp_path / "saved" / "checkpoint-1"
    with safe_open(folder / "model.safetensors", "pt") as file:
        saved = set(file.keys())
    assert {name.replace("lm_head.weight", "") for name in saved} <= {
        name for name, _ in ours.model.named_parameters()
    }
    assert json.loads((folder / "config.json").read_text())["n_layer"] == 2


def test_a_plain_dataset_and_collator_work_too(trainer, tiny_tokenizer):
    """A notebook hands in whatever a Trainer takes: dictionaries and a Hugging Face collator."""
    from transformers import DataCollatorForLanguageModeling

    class Rows(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return {"input_ids": [0, *range(1, 5 + index), 0]}

    ours = trainer(
        train_dataset=Rows(),
        eval_dataset=Rows(),
        data_collator=DataCollatorForLanguageModeling(tiny_tokenizer, mlm=False),
        processing_class=tiny_tokenizer,
    )
    ours.train()
    assert np.isfinite(ours.evaluate()["eval_loss"])


def test_hard_loss_alone_needs_no_teacher(models, tmp_path):
    student, _ = models()
    ours = DistillationTrainer(model=student, alpha=1.0, args=one_step(tmp_path / "hard"))
    batch = padded(Tokens())
    loss = ours.compute_loss(student, batch)
    expected = student(**batch).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_mismatches_are_refused(models, tiny_lm, tmp_path):
    student, teacher = models()
    args = one_step(tmp_path / "refused")
    for options, message in (
        ({"teacher_model": tiny_lm(vocab_size=65)}, "one tokenizer"),
        ({}, "teacher_model is needed"),
        ({"teacher_model": teacher, "loss_impl": "magic"}, "loss_impl"),
        ({"teacher_model": teacher, "temperature": -1}, "--temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillationTrainer(model=student, args=args, **options)


def test_students_depend_on_seed_and_shape_alone(tiny_lm):
    teacher = tiny_lm()
    config = student_config(StudentSettings(2, 2, 16), teacher.config)
    first = model_fingerprint(build_student(config, seed=5))
    torch.manual_seed(123)
    torch.rand(7)
    state = torch.random.get_rng_state()
    assert model_fingerprint(build_student(config, seed=5)) == first
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model_fingerprint(build_student(config, seed=6)) != first

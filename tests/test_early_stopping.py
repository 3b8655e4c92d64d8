"""Early stopping: the best weights are kept, and a resumed run stops where it would have."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_runs import Tokens, history, make_trainer, resume, signal_at, timeless
from transformers import TrainerCallback

from src.common.files import sha256_file
from src.common.settings import LossSettings, TrainSettings, derived_steps
from src.models.loading import model_fingerprint
from src.proteins.batching import PaddingCollator, ProteinDataset
from src.trainer.callbacks import read_metrics
from src.trainer.checkpoints import checkpoints_of
from src.trainer.early_stopping import EarlyStopping, outcome, outcome_line, validation_standing
from src.trainer.interruption import stops_on_signals
from src.training.ingredients import load_parts
from src.training.validation import BatchCollator, BatchedDataset, plan_validation
from tests.test_train_script import tiny_run

LOSSES = {1: 5.0, 2: 4.0, 3: 3.0, 4: 3.5, 5: 3.0, 6: 3.7, 7: 1.0, 8: 1.0, 9: 1.0}
"""Validation losses by step: the best of the first six is step 3, and equal it does not count."""


def stopping_trainer(tiny_lm, folder: Path, patience: int = 3, losses=LOSSES, **options):
    """Return a Trainer whose validation losses are the given ones."""
    settings = {"eval_steps": 1, "save_steps": 4, "save_total_limit": 1, **options}
    trainer = make_trainer(tiny_lm, folder, **settings)
    trainer.add_callback(EarlyStopping(patience))
    measured = trainer.evaluation_loop

    def scripted(*arguments, **options):
        found = measured(*arguments, **options)
        assert found.metrics is not None
        found.metrics["eval_loss"] = losses[trainer.state.global_step]
        return found

    trainer.evaluation_loop = scripted
    return trainer


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints_of(folder)]


def assert_same_end(one, other) -> None:
    assert one.state.global_step == other.state.global_step
    assert one.state.best_global_step == other.state.best_global_step
    logs = [[timeless(r) for r in read_metrics(t.args.output_dir)] for t in (one, other)]
    assert logs[0] == logs[1]
    for trainer in (one, other):
        trainer.load_weights(trainer.state.best_global_step)
    assert model_fingerprint(one.model) == model_fingerprint(other.model)


def records(*losses: float) -> list[dict[str, float]]:
    found: list[dict[str, float]] = []
    for step, loss in enumerate(losses, start=1):
        found += [{"step": step, "loss": 9.0}, {"step": step, "eval_loss": loss}]
    return found


@pytest.mark.parametrize(
    ("losses", "best", "since"),
    [((3.0,), 1, 0), ((3.0, 2.0), 2, 0), ((3.0, 2.0, 2.0, 2.5), 2, 2), ((1.0, 2.0, 3.0), 1, 2)],
)
def test_the_standing_of_a_log(losses, best, since):
    found = validation_standing(records(*losses))
    assert (found.best_step, found.since_best) == (best, since)


def test_a_log_without_validation_has_no_standing():
    with pytest.raises(ValueError, match="no validation"):
        validation_standing([{"step": 1, "loss": 1.0}])


def test_an_outcome_tells_why():
    early = outcome(records(2.0, 1.0, 3.0), 3, 9)
    assert early == {
        "best_step": 2,
        "best_eval_loss": 1.0,
        "last_step": 3,
        "reason": "no improvement",
    }
    assert "step 2," in outcome_line(early)
    assert outcome(records(2.0, 1.0, 3.0), 3, 3)["reason"] == "all steps done"


def test_it_stops_and_the_best_checkpoint_survives_pruning(tiny_lm, tmp_path):
    trainer = stopping_trainer(tiny_lm, tmp_path)
    fingerprints = {}

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            fingerprints[state.global_step] = model_fingerprint(trainer.model)

    trainer.add_callback(Note())
    trainer.train()
    assert trainer.state.global_step == 6
    # 4 is kept as the newest, 3 as its best; 1 and 2 were the best once.
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-3"]
    assert model_fingerprint(trainer.model) == fingerprints[6]
    trainer.load_weights(3)
    assert model_fingerprint(trainer.model) == fingerprints[3] != fingerprints[6]


def test_patience_decides(tiny_lm, tmp_path):
    trainer = stopping_trainer(tiny_lm, tmp_path, patience=4)
    trainer.train()
    assert trainer.state.global_step == 9  # 7 is better again
    assert trainer.state.best_global_step == 7


# A validation has three batches: 18 of them before the one of step 6 that ends the training.
@pytest.mark.parametrize(
    ("event", "at", "step"),
    [
        ("on_step_end", 2, 2),  # before the best
        ("on_evaluate", 3, 3),  # at the best, before its checkpoint
        ("on_step_end", 5, 5),  # while patience runs
        ("on_prediction_step", 17, 6),  # in the validation that ends the training
        ("on_evaluate", 6, 6),  # when it has just ended it
    ],
)
def test_interrupted_and_resumed_it_stops_at_the_same_step(
    tiny_lm, tmp_path, undisturbed, event, at, step
):
    options = {"gradient_accumulation_steps": 2, "per_device_eval_batch_size": 8}
    cut = stopping_trainer(tiny_lm, tmp_path, **options)
    cut.add_callback(signal_at(event, at))
    with pytest.raises(SystemExit):
        stops_on_signals(cut.train)()
    assert names(tmp_path)[0] == f"checkpoint-{step}"
    resumed = resume(stopping_trainer(tiny_lm, tmp_path, **options))
    assert_same_end(undisturbed(stopping_trainer, **options), resumed)


@pytest.mark.parametrize("save_steps", [3, 4])
def test_killed_after_the_stop_it_makes_no_further_step(tiny_lm, tmp_path, undisturbed, save_steps):
    """Nothing but checkpoints is left of a run that was killed between its stop and its end."""
    stopping_trainer(tiny_lm, tmp_path, save_steps=save_steps).train()
    resumed = resume(stopping_trainer(tiny_lm, tmp_path, save_steps=save_steps))
    assert_same_end(undisturbed(stopping_trainer, save_steps=save_steps), resumed)


def test_an_older_checkpoint_keeps_its_best_too(tiny_lm, tmp_path):
    """The newest may be found broken, and the run then goes on from the one before it."""
    losses = {1: 1.0, 2: 5.0, 3: 5.0, 4: 5.0, 5: 0.5, 6: 5.0, 7: 5.0, 8: 5.0, 9: 5.0}
    options = {"save_steps": 2, "save_total_limit": 2, "max_steps": 5, "patience": 9}
    trainer = stopping_trainer(tiny_lm, tmp_path, losses=losses, **options)
    trainer.train()
    # 5 is the best now; a run that goes on from 4 would still want 1.
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-4", "checkpoint-1"]


def test_a_broken_best_is_told(tiny_lm, tmp_path):
    trainer = stopping_trainer(tiny_lm, tmp_path)
    trainer.train()
    path = tmp_path / "checkpoint-3" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"checkpoint-3, the best of this run, is not whole"):
        trainer.load_weights(3)


def test_without_it_nothing_is_noted(tiny_lm, tmp_path):
    make_trainer(tiny_lm, tmp_path, max_steps=3).train()
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_global_step"] is None
    assert history(tmp_path / "checkpoint-3")


def test_more_proteins_decide_than_watch(tmp_path, tiny_tokenizer, random_proteins):
    """Where the source has no validation part."""
    path = tmp_path / "family.fasta"
    path.write_text("".join(f">{n}\n{s}\n" for n, s in enumerate(random_proteins(300))))
    hashes = []
    for patience in (None, 3):
        settings = TrainSettings(data=str(path), train_size_prop=1, early_stopping=patience)
        parts = load_parts(settings, tiny_tokenizer, 256, str(tmp_path / "cache"))
        assert not set(parts["train"].hashes) & set(parts["validation"].hashes)
        hashes.append(set(parts["validation"].hashes))
    assert hashes[0] < hashes[1]
    assert 20 < len(hashes[1]) < 40


def test_a_run_of_the_script_keeps_the_best_weights(
    tmp_path, small_teacher_dir, proteins_dir, capsys
):
    """While the rate climbs to one far too high, the first validation stays the best."""
    run = tmp_path / "run"
    steps = "--learning_rate 30 --warmup_steps 9 --max_steps 9 --eval_steps 1 --save_steps 5"
    more = [*steps.split(), "--early_stopping", "2"]
    assert tiny_run(small_teacher_dir, proteins_dir, run, tmp_path / "cache", *more) == 0
    record = json.loads((run / "run.json").read_text())
    found = record["early_stopping"]
    assert found["reason"] == "no improvement"
    assert found["last_step"] == found["best_step"] + 2 < 9
    assert record["settings"]["early_stopping"] == 2
    assert record["final"]["eval_loss"] == found["best_eval_loss"]
    best = run / f"checkpoint-{found['best_step']}"
    assert sha256_file(run / "model.safetensors") == sha256_file(best / "model.safetensors")
    assert outcome_line(found) in capsys.readouterr().out


# How often a run is validated, in which batches, and that the value stays the same


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

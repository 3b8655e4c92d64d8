"""NaN and infinity stop a run with the evidence; loss spikes can be skipped and counted."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from small_runs import At, assert_same_bits, interrupt, make_trainer, resume
from transformers import AutoModelForCausalLM, TrainerCallback

from src.models.loading import model_fingerprint
from src.trainer.callbacks import read_metrics
from src.trainer.checkpoints import checkpoints_of, read_tensors, with_prefix
from src.trainer.safeguards import SPIKE_MINIMUM, SPIKE_WINDOW, NotFinite, SpikeGuard
from src.trainer.states import restore_random_states


@torch.no_grad()
def put(parameter, value):
    parameter.view(-1)[0] = value


def gradient_of(parameter, value):
    parameter.register_hook(lambda gradient: torch.full_like(gradient, value))


KINDS = {
    "weight": (
        lambda t: put(t.model.transformer.h[1].mlp.c_fc.weight, float("nan")),
        "the parameter transformer.h.1.mlp.c_fc.weight",
    ),
    "activation": (
        lambda t: put(t.model.transformer.h[0].ln_1.weight, 1e38),
        "student: output of transformer.h.0.",
    ),
    "teacher": (
        lambda t: put(t.teacher_model.transformer.h[1].mlp.c_proj.bias, float("inf")),
        "teacher: output of transformer.h.1.mlp.c_proj",
    ),
    "gradient": (
        lambda t: gradient_of(t.model.transformer.h[0].attn.c_attn.bias, float("inf")),
        "student: gradient of transformer.h.0.attn.c_attn.bias",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_stops_and_names_the_first_bad_tensor(tiny_lm, tmp_path, kind):
    spoil, expected = KINDS[kind]
    trainer = make_trainer(tiny_lm, tmp_path)
    trainer.add_callback(At("on_step_begin", 6, lambda: spoil(trainer)))
    with pytest.raises(NotFinite) as stop:
        trainer.train()
    message = str(stop.value)
    assert message.startswith("step 6: ")
    assert expected in message
    assert "checkpoint-4 is kept" in message
    assert "\n" not in message
    assert checkpoints_of(tmp_path)[0].name == "checkpoint-4"
    report = json.loads((tmp_path / "failure-step-6" / "failure-0.json").read_text())
    assert expected in report["first_bad_tensor"]
    assert report["batches"] == 2
    # Neither a record nor a validation of the bad step was made.
    assert max(record["step"] for record in read_metrics(tmp_path)) < 6


def test_the_failure_can_be_replayed(tiny_lm, tmp_path):
    trainer = make_trainer(tiny_lm, tmp_path)
    trainer.add_callback(At("on_step_begin", 5, lambda: KINDS["activation"][0](trainer)))
    with pytest.raises(NotFinite):
        trainer.train()
    folder = tmp_path / "failure-step-5"
    report = json.loads((folder / "failure-0.json").read_text())
    tensors = read_tensors(folder / "step-0.safetensors")
    with safe_open(folder / "step-0.safetensors", "pt") as file:
        plain = json.loads(file.metadata()["plain"])
    student = AutoModelForCausalLM.from_pretrained(folder)
    assert model_fingerprint(student) == model_fingerprint(trainer.model)
    again = make_trainer(tiny_lm, tmp_path / "again")
    again.model.load_state_dict(student.state_dict())
    again.model.train()
    restore_random_states(with_prefix(tensors, "random."), plain)
    losses = [
        again.compute_loss(again.model, with_prefix(tensors, f"batch.{i}."), False, 100).item()
        for i in range(report["batches"])
    ]
    assert any(loss != loss or abs(loss) == float("inf") for loss in losses)


def test_a_second_failure_does_not_replace_the_first(tiny_lm, tmp_path):
    for step in (3, 1):  # the second run goes on after step 2
        trainer = make_trainer(tiny_lm, tmp_path)
        trainer.add_callback(At("on_step_begin", step, lambda t=trainer: KINDS["weight"][0](t)))
        with pytest.raises(NotFinite):
            resume(trainer)
    assert {p.name for p in tmp_path.glob("failure*")} == {"failure-step-3", "failure-step-3-2"}


def test_a_cured_run_goes_on_undisturbed(tiny_lm, tmp_path, undisturbed):
    trainer = make_trainer(tiny_lm, tmp_path / "run")
    trainer.add_callback(At("on_step_begin", 6, lambda: KINDS["weight"][0](trainer)))
    with pytest.raises(NotFinite):
        trainer.train()
    resumed = resume(make_trainer(tiny_lm, tmp_path / "run"))
    assert_same_bits(undisturbed(make_trainer), resumed)


@pytest.mark.parametrize("step", [5, 6])
def test_judging_a_step_late_keeps_the_weights(tiny_lm, tmp_path, monkeypatch, step):
    """What a GPU does: the optimiser holds still by itself, and the check is read a step later."""
    trainer = make_trainer(tiny_lm, tmp_path, optim="adamw_torch_fused")

    def optimizer():
        wrapped = trainer.optimizer
        return getattr(wrapped, "optimizer", wrapped)

    monkeypatch.setattr(trainer.guard, "optimizer_that_can_hold_still", optimizer)
    before = []
    spoil = KINDS["gradient"][0]

    def remember_and_spoil():
        before.append(model_fingerprint(trainer.model))
        spoil(trainer)

    trainer.add_callback(At("on_step_begin", step, remember_and_spoil))
    with pytest.raises(NotFinite, match=f"step {step}: student: gradient of"):
        trainer.train()
    assert model_fingerprint(trainer.model) == before[0]
    assert checkpoints_of(tmp_path)[0].name == "checkpoint-4"


def test_judging_late_changes_nothing_in_a_good_run(tiny_lm, tmp_path, monkeypatch):
    runs = []
    for late in (False, True):
        trainer = make_trainer(tiny_lm, tmp_path / str(late), optim="adamw_torch_fused")
        if late:
            monkeypatch.setattr(
                trainer.guard,
                "optimizer_that_can_hold_still",
                lambda t=trainer: t.optimizer.optimizer,
            )
        trainer.train()
        runs.append(trainer)
    assert_same_bits(*runs)


def test_a_validation_that_is_not_finite_stops_the_run(tiny_lm, tmp_path):
    trainer = make_trainer(tiny_lm, tmp_path)
    measured = trainer.evaluation_loop

    def spoiled(*arguments, **options):
        output = measured(*arguments, **options)
        output.metrics["eval_loss"] = float("nan")
        return output

    trainer.evaluation_loop = spoiled
    with pytest.raises(NotFinite, match="step 3: eval_loss is nan"):
        trainer.train()


# Loss spikes


def spiked(tiny_lm, folder, spikes, factor=1.5, **options):
    """Return a Trainer of 30 steps whose loss is far too high in some of them."""
    trainer = make_trainer(
        tiny_lm,
        folder,
        loss={"skip_loss_spikes": factor},
        max_steps=30,
        learning_rate=1e-3,
        save_steps=23,
        **options,
    )
    compute = trainer.compute_loss

    def compute_with_spikes(model, *arguments, **settings):
        loss = compute(model, *arguments, **settings)
        at = trainer.state.global_step + 1
        return loss * 100 if model.training and at in spikes else loss

    trainer.compute_loss = compute_with_spikes
    return trainer


def test_spikes_are_skipped_counted_and_the_schedule_goes_on(tiny_lm, tmp_path, capsys):
    trainer = spiked(tiny_lm, tmp_path, {22, 27})
    steps = []

    class Watch(TrainerCallback):
        def on_step_end(self, *arguments, **options):
            steps.append(model_fingerprint(trainer.model))

    trainer.add_callback(Watch())
    trainer.train()
    unchanged = [i + 1 for i in range(1, 30) if steps[i] == steps[i - 1]]
    # The learning rate of the last step is 0.
    assert unchanged in ([22, 27], [22, 27, 30])
    assert "step 22 is skipped" in capsys.readouterr().out
    counts = {r["step"]: r["skipped_steps"] for r in read_metrics(tmp_path) if "loss" in r}
    assert (counts[21], counts[24], counts[27]) == (0, 1, 2)
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_spikes_are_skipped_alike_after_resuming(tiny_lm, tmp_path):
    spikes = {21, 25, 28}
    whole = spiked(tiny_lm, tmp_path / "whole", spikes)
    whole.train()
    cut = spiked(tiny_lm, tmp_path / "cut", spikes)
    cut.add_callback(At("on_step_begin", 26, interrupt))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    again = resume(spiked(tiny_lm, tmp_path / "cut", spikes))
    assert again.spikes.skipped == 3
    assert_same_bits(whole, again, step=30)


def test_early_steps_are_never_spikes_and_lasting_ones_end():
    for factor in (1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="skip_loss_spikes must be above 1"):
            SpikeGuard(factor)
    spikes = SpikeGuard(2.0)
    spikes.losses.extend([1.0] * (SPIKE_MINIMUM - 1))
    assert not spikes.is_spike(1000.0)
    spikes.losses.append(1.0)
    assert spikes.is_spike(2.1)
    assert not spikes.is_spike(2.0)
    spikes.losses.extend([3.0] * (SPIKE_WINDOW // 2 + SPIKE_MINIMUM))
    assert not spikes.is_spike(3.0)

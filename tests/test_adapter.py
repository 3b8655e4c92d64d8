"""The adapter: the private parts of transformers that it relies on, and the clock of the log."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
import transformers
from small_runs import assert_same_bits, make_trainer
from transformers import Trainer, TrainerCallback

from src.distillation import DistillationTrainer
from src.trainer.adapter import TrainerAdapter
from src.trainer.log_interval import LogInterval
from src.training import timing
from src.training.cohort import CohortTrainer
from src.training.timing import StepTimer, Timing, explain_lack_of_memory

HOOKS = {
    "_get_train_sampler": ("train_dataset",),
    "_load_rng_state": ("checkpoint",),
    "_run_epoch": (
        "model",
        "epoch",
        "train_dataloader",
        "steps_in_epoch",
        "num_update_steps_per_epoch",
        "trial",
        "ignore_keys_for_eval",
        "start_time",
        "resume_from_checkpoint",
        "epochs_trained",
        "steps_trained_in_current_epoch",
    ),
    "_clip_grad_norm": ("model",),
    "_get_grad_norm": ("model", "grad_norm"),
    "_maybe_log_save_evaluate": (
        "tr_loss",
        "grad_norm",
        "model",
        "trial",
        "epoch",
        "ignore_keys_for_eval",
        "start_time",
        "learning_rate",
    ),
    "_save_checkpoint": ("model", "trial"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
}
"""Private methods that the adapter overrides, and the parameters with which they are called."""
CALLED = {"_prepare_inputs": ("inputs",)}
"""Private methods that it calls."""
ATTRIBUTES = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")
"""Private attributes that it reads and sets."""


@pytest.mark.parametrize(("name", "parameters"), [*HOOKS.items(), *CALLED.items()])
def test_private_methods_are_as_the_adapter_expects(name, parameters):
    where = f"transformers {transformers.__version__}: Trainer.{name}"
    assert hasattr(Trainer, name), f"{where} is gone: change src/trainer/adapter.py"
    now = tuple(inspect.signature(getattr(Trainer, name)).parameters)[1:]
    assert now == parameters, f"{where} takes {now}: change src/trainer/adapter.py"


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_private_attributes_are_as_the_adapter_expects(name):
    where = f"transformers {transformers.__version__}: Trainer.{name}"
    uses = inspect.getsource(Trainer).count(f"self.{name}")
    assert uses >= 2, f"{where} is gone: change src/trainer/adapter.py"


def test_the_adapter_alone_overrides_private_methods():
    overridden = {
        (kind.__name__, name)
        for kind in (TrainerAdapter, DistillationTrainer, CohortTrainer)
        for name in vars(kind)
        if name.startswith("_") and not name.startswith("__") and hasattr(Trainer, name)
    }
    assert overridden == {("TrainerAdapter", name) for name in HOOKS}
    assert len(HOOKS) <= 8
    for name in HOOKS:
        body = inspect.getsource(getattr(TrainerAdapter, name)).splitlines()[1:]
        assert len(body) <= 5, name


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_rate_counts_fetching_and_every_batch_and_no_validation(tiny_lm, tmp_path):
    """Fetching a step's batches takes 1 s, each batch 2 s, a validation 50 s, a checkpoint 7 s."""
    trainer = make_trainer(
        tiny_lm, tmp_path, max_steps=4, logging_steps=2, eval_steps=1, save_steps=3
    )
    clock = Clock()
    trainer.interval = LogInterval(clock=clock)
    tokens = []

    def taking(seconds, method, note=lambda inputs: None):
        def timed(*arguments, **options):
            clock.now += seconds
            note(arguments)
            return method(*arguments, **options)

        return timed

    def note(arguments):
        inputs = arguments[1]
        tokens.append(int((inputs["labels"][:, 1:] != -100).sum()))

    class Slow(TrainerCallback):
        """Takes time between steps, as a checkpoint does that falls between two records."""

        def on_step_begin(self, *arguments, **options):
            clock.now += 1.0

    trainer.add_callback(Slow())
    trainer.training_step = taking(2.0, trainer.training_step, note)
    trainer.evaluation_loop = taking(50.0, trainer.evaluation_loop)
    trainer.save_checkpoint = taking(7.0, trainer.save_checkpoint)
    trainer.train()
    rates = [r["tokens_per_second"] for r in trainer.state.log_history if "loss" in r]
    # Two steps of two batches each: 2 * (1 + 2 * 2) seconds.
    assert rates == pytest.approx([sum(tokens[:4]) / 10, sum(tokens[4:]) / 10], abs=0.1)


def test_the_share_of_waiting_starts_with_the_first_fetch():
    clock = Clock()
    interval = LogInterval(clock=clock)
    clock.now += 1000.0
    for step in range(2):
        with interval.fetching(step):
            clock.now += 1.0
        clock.now += 3.0
    assert interval.rates(800.0) == {"tokens_per_second": 100.0, "data_wait_share": 0.25}
    again = LogInterval(clock=clock)
    clock.now += 500.0
    with interval.paused():
        clock.now += 50.0
    again.restore(interval.sums.values, {**interval.state(), "seconds": 8.0})
    assert again.rates(800.0) == {"tokens_per_second": 100.0, "data_wait_share": 0.25}


# The estimate from a run's first steps


CPU = torch.device("cpu")


def run_clock(monkeypatch, seconds, last: int, limit=None) -> list[Timing]:
    """Return what a timer reports of steps that take the given seconds, in a plan of 100 steps."""
    clock = [0.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: clock[0])
    reports: list[Timing] = []
    timer = StepTimer(reports.append, CPU, 100, 0.5, limit)
    state = SimpleNamespace(global_step=0, max_steps=last)
    control = SimpleNamespace(should_training_stop=False)
    timer.on_train_begin(None, state, control)
    while state.global_step < last and not control.should_training_stop:
        clock[0] += seconds(state.global_step)
        state.global_step += 1
        timer.on_step_end(None, state, control)
    return reports


def test_the_warm_up_is_left_out_and_validation_counted(monkeypatch):
    (report,) = run_clock(monkeypatch, lambda step: 50.0 if step < 3 else 2.0, 40)
    assert report.step_seconds == 2.0
    assert report.steps == 7
    assert report.seconds_left == pytest.approx(90 * 2.0 / 0.5)


def test_a_measurement_alone_ends_in_time_and_counts_the_whole_run(monkeypatch):
    (slow,) = run_clock(monkeypatch, lambda step: 30.0, 10, limit=20.0)
    assert (slow.steps, slow.step_seconds) == (1, 30.0)
    assert slow.seconds_left == pytest.approx(100 * 30.0 / 0.5)
    (short,) = run_clock(monkeypatch, lambda step: 1.0, 2, limit=20.0)
    assert short.steps == 2


def test_a_timed_run_ends_in_the_same_bits(tiny_lm, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "WARM_UP_STEPS", 2)
    monkeypatch.setattr(timing, "TIMED_STEPS", 3)
    plain = make_trainer(tiny_lm, tmp_path / "plain")
    plain.train()
    timed = make_trainer(tiny_lm, tmp_path / "timed")
    reports: list[Timing] = []
    timed.add_callback(StepTimer(reports.append, CPU, 9, 0.0))
    timed.train()
    assert len(reports) == 1
    assert_same_bits(plain, timed)


def test_the_line_is_one_line():
    assert Timing(0.61, 190.0, 1_234_000_000, 7).line() == (
        "about 3 min 10 s left (0.61 s a step, measured on 7 steps), peak memory 1.2 GB"
    )


def test_lack_of_memory_is_explained():
    with (
        pytest.raises(ValueError, match=r"2 rows does not fit .* lower --batch_size"),
        explain_lack_of_memory(2),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")

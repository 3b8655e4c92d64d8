"""The estimate from a run's first steps: its arithmetic, and that the run ends as without it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from small_runs import assert_same_bits, make_trainer

from src.training import timing
from src.training.timing import StepTimer, Timing, explain_lack_of_memory

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

"""The estimate before a run: near what the run takes, and without a trace in it."""

from __future__ import annotations

import json
import random
import time

import numpy as np
import pytest
import torch
from small_runs import Tokens, assert_same_bits, make_trainer, timeless

from src.common.files import sha256_file
from src.proteins.batching import PackedDataset, ProteinDataset
from src.trainer.callbacks import read_metrics
from src.training import rehearsal
from src.training.rehearsal import Rehearsal, padded_tokens, rehearse, sampled_groups
from tests.test_train_script import tiny_run


@pytest.mark.parametrize(
    ("packed", "loss"),
    [
        (False, {}),
        (True, {}),
        # Both ask for means over the batches of a step, which keeps tensors in the batches.
        (False, {"weighting": "matched", "smoothing": "matched"}),
    ],
)
def test_a_rehearsed_run_ends_in_the_same_bits(tiny_lm, tmp_path, packed, loss):
    plain = make_trainer(tiny_lm, tmp_path / "plain", packed=packed, loss=loss)
    plain.train()
    other = make_trainer(tiny_lm, tmp_path / "rehearsed", packed=packed, loss=loss)
    found = rehearse(other, 9)
    assert found.batches == rehearsal.TIMED_BATCHES + 1
    other.train()
    assert_same_bits(plain, other)


def test_no_trace_is_left(tiny_lm, tmp_path):
    trainer = make_trainer(tiny_lm, tmp_path)
    attributes = dict(vars(trainer))
    sums = trainer.interval.sums.values.clone()
    states = torch.get_rng_state(), random.getstate(), np.array(list(np.random.get_state())[1])
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    rehearse(trainer, 9)
    assert vars(trainer) == attributes
    assert torch.equal(sums, trainer.interval.sums.values)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(list(np.random.get_state())[1], states[2])
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, weights[name])


def test_its_arithmetic(tiny_lm, tmp_path, monkeypatch):
    """A second for each 100 padded tokens: times follow from the lengths alone."""
    trainer = make_trainer(tiny_lm, tmp_path, eval_steps=4)
    dataset = trainer.train_dataset
    monkeypatch.setattr(rehearsal, "_timed", lambda t, d, rows: padded_tokens(d, rows) / 100)
    found = rehearse(trainer, 9)
    mean = np.mean([padded_tokens(dataset, rows) for rows in sampled_groups(dataset, 2)])
    assert found.tokens_per_second == pytest.approx(100)
    assert found.step_seconds == pytest.approx(2 * mean / 100)  # two batches a step
    validated = 2 * dataset.lengths.sum() / 100
    assert found.seconds == pytest.approx(9 * found.step_seconds + validated)


def test_a_slow_machine_measures_one_row(tiny_lm, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_lm, tmp_path)
    measured = []

    def slow(trainer, dataset, rows):
        measured.append(len(rows))
        return 30.0

    monkeypatch.setattr(rehearsal, "_timed", slow)
    found = rehearse(trainer, 9)
    assert measured == [1]
    assert found.peak_memory is None
    assert "memory not measured" in found.line()
    assert "one row" in found.line()


def test_lack_of_memory_is_told_before_training(tiny_lm, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_lm, tmp_path)

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rehearsal, "_timed", full)
    with pytest.raises(ValueError, match=r"2 rows does not fit .* lower --batch_size"):
        rehearse(trainer, 9)


def test_sampled_batches_are_such_as_the_run_has():
    tokens = Tokens(23)
    sorted_rows = sampled_groups(ProteinDataset(tokens), 4)
    assert [len(rows) for rows in sorted_rows] == [4] * 5
    widths = [tokens.lengths[rows].max() for rows in sorted_rows]
    assert widths == sorted(widths)
    few = sampled_groups(ProteinDataset(tokens), 40)
    assert [len(rows) for rows in few] == [23]
    packed = PackedDataset(tokens, 64)
    assert sum(len(rows) for rows in sampled_groups(packed, 1)) == len(packed)


def test_the_line_is_one_line():
    line = Rehearsal(190.0, 0.61, 5212.3, 1_234_000_000, 4).line()
    assert line == (
        "estimated: 3 min 10 s (0.61 s a step, 5,212 tokens/s), peak memory 1.2 GB; "
        "measured on 4 batches"
    )


def test_a_run_tells_its_estimate_and_ends_as_without(
    tmp_path, small_teacher_dir, proteins_dir, capsys, monkeypatch
):
    """scripts/train.py: the same weights and the same log, dropout and all."""
    runs = []
    for least in (1, 1000):
        monkeypatch.setattr("src.training.stages.REHEARSED_FROM", least)
        runs.append(tmp_path / f"run{least}")
        assert tiny_run(small_teacher_dir, proteins_dir, runs[-1], tmp_path / "cache") == 0
    assert capsys.readouterr().out.count("estimated: ") == 1
    assert len({sha256_file(run / "model.safetensors") for run in runs}) == 1
    logs = [[timeless(record) for record in read_metrics(run)] for run in runs]
    assert logs[0] == logs[1]
    estimates = [json.loads((run / "run.json").read_text()).get("estimate") for run in runs]
    assert estimates[0]["seconds"] > 0
    assert estimates[1] is None


def test_a_dry_run_measures_what_is_local(tmp_path, small_teacher_dir, proteins_dir, capsys):
    began = time.monotonic()
    more = ["--dry_run", "--max_steps", "600"]
    assert tiny_run(small_teacher_dir, proteins_dir, tmp_path / "run", tmp_path / "c", *more) == 0
    shown = capsys.readouterr().out
    assert "this run on this machine, estimated: " in shown
    assert "600" in shown
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - began < 60

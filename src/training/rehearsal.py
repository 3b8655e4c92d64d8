"""Estimates a run's time and memory from a few of its own batches, before the first step.

A rehearsal does forward and backward passes with the run's models, data and loss, and takes
everything back: random states, gradients, sums for the log. The run that follows ends in the bits
in which it would have ended without.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from src.common.cli import duration, size
from src.common.devices import peak_memory
from src.distillation import DistillationTrainer
from src.models.loading import count_parameters
from src.proteins.batching import POOL_BATCHES
from src.trainer.interval import LogInterval
from src.trainer.states import random_states, restore_random_states

REHEARSED_FROM = 50
"""Steps from which a run is rehearsed: a shorter one is over before an estimate helps."""
TIMED_BATCHES = 3
LONGEST_SECONDS = 20.0
"""Batches that would take longer are not measured: of a large model on a CPU they take minutes."""
MOMENTS_BYTES = 8
"""Of AdamW for each parameter, in float32: they come with the first step."""


@dataclass(frozen=True)
class Rehearsal:
    """What a run will take, as its batches were measured.

    Attributes:
        seconds: of all steps and validations.
        step_seconds: of a step.
        tokens_per_second: padding counted.
        peak_memory: bytes, of the GPU, or of the whole process on a CPU; None: not measured.
        batches: how many were measured; 0: a single row.
    """

    seconds: float
    step_seconds: float
    tokens_per_second: float
    peak_memory: int | None
    batches: int

    def line(self) -> str:
        """Return the estimate for a person."""
        memory = "memory not measured"
        if self.peak_memory is not None:
            memory = f"peak memory {size(self.peak_memory)}"
        source = f"{self.batches} batches" if self.batches else "one row, for lack of time"
        return (
            f"estimated: {duration(self.seconds)} ({self.step_seconds:.2g} s a step, "
            f"{self.tokens_per_second:,.0f} tokens/s), {memory}; measured on {source}"
        )


def rehearse(trainer: DistillationTrainer, steps: int) -> Rehearsal:
    """Measure a few batches of a run, and leave no trace in it.

    The longest of a sample of batches comes first: it warms up, and shows the peak memory. Then
    some are timed that stand for short, middling and long ones. Where one row tells that a batch
    would take too long, that row is all. Validations are counted at the same rate, which is too
    slow by their missing backward pass; the optimiser's own step, checkpoints and the exchange
    between processes are not counted.

    Args:
        trainer: not yet trained.
        steps: optimiser steps of the run.

    Raises:
        ValueError: a batch does not fit the device's memory.
    """
    arguments, device = trainer.args, trainer.args.device
    dataset: Any = trainer.train_dataset
    groups = sampled_groups(dataset, arguments.train_batch_size)
    padded = [padded_tokens(dataset, rows) for rows in groups]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with without_trace(trainer), explain_lack_of_memory(arguments.train_batch_size):
        longest = groups[int(np.argmax(padded))]
        seconds, tokens = _timed(trainer, dataset, longest[:1]), padded_tokens(dataset, longest[:1])
        memory, measured = None, 0
        if seconds * len(longest) < LONGEST_SECONDS:
            _timed(trainer, dataset, longest)
            places = (np.arange(TIMED_BATCHES) + 0.5) / TIMED_BATCHES * len(groups)
            chosen = [groups[int(place)] for place in places]
            seconds = sum(_timed(trainer, dataset, rows) for rows in chosen)
            tokens = sum(padded_tokens(dataset, rows) for rows in chosen)
            moments = MOMENTS_BYTES * count_parameters(_student(trainer))
            memory, measured = peak_memory(device) + moments, len(chosen) + 1
    rate = tokens / seconds
    step = float(np.mean(padded)) * arguments.gradient_accumulation_steps / rate
    evaluations = max(1, steps // max(1, int(arguments.eval_steps or steps)))
    validation: Any = trainer.eval_dataset
    validated = evaluations * float(np.sum(validation.lengths)) / rate
    return Rehearsal(steps * step + validated, step, rate, memory, measured)


def sampled_groups(dataset: Any, batch_size: int) -> list[np.ndarray]:
    """Return rows of batches such as the run will have, by rising length where it sorts them."""
    rows = np.random.default_rng(0).choice(
        len(dataset), min(len(dataset), POOL_BATCHES * batch_size), replace=False
    )
    if dataset.by_length:
        rows = rows[np.argsort(dataset.lengths[rows], kind="stable")]
    whole = len(rows) // batch_size * batch_size
    return [rows[i : i + batch_size] for i in range(0, whole or len(rows), batch_size)]


def padded_tokens(dataset: Any, rows: np.ndarray) -> int:
    """Return the tokens of a batch of these rows, padding counted."""
    return int(dataset.lengths[rows].max()) * len(rows)


def _student(trainer: DistillationTrainer) -> Any:
    return trainer.accelerator.unwrap_model(trainer.model)


def _timed(trainer: DistillationTrainer, dataset: Any, rows: np.ndarray) -> float:
    """Do one batch forwards and backwards; return its seconds."""
    device = trainer.args.device
    began = time.monotonic()
    assert trainer.data_collator is not None
    batch = trainer.data_collator([dataset[int(row)] for row in rows])
    batches, count = trainer.get_batch_samples(iter([batch]), 1, device)
    inputs = trainer._prepare_inputs(batches[0])
    student = _student(trainer)
    # The Trainer sets autocast up when training begins; here it has not yet.
    with trainer.accelerator.autocast():
        loss: Any = trainer.compute_loss(student, inputs, num_items_in_batch=count)
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic() - began


@contextmanager
def explain_lack_of_memory(batch_size: int) -> Iterator[None]:
    """Turn a device's lack of memory into a message for a person."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise ValueError(
            f"a batch of {batch_size} rows does not fit the device's memory: lower --batch_size "
            "and raise --gradient_accumulation_steps as much; docs/TROUBLESHOOTING.md has more"
        ) from None


@contextmanager
def without_trace(trainer: DistillationTrainer) -> Iterator[None]:
    """Take back what the body changes of random states, gradients and the trainer's sums."""
    before, states = vars(trainer).copy(), random_states()
    student = _student(trainer)
    training = student.training
    student.train()
    # Sums are added to in place: the run's own stay out of it.
    trainer.interval = LogInterval(trainer.interval.students)
    try:
        yield
    finally:
        student.zero_grad(set_to_none=True)
        student.train(training)
        vars(trainer).clear()
        vars(trainer).update(before)
        restore_random_states(*states)

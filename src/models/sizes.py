"""Parameters, memory and steps of a run, estimated before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from src.common.settings import StudentSettings, TrainSettings

PROTGPT2 = {
    "n_layer": 36,
    "n_head": 20,
    "n_embd": 1280,
    "vocab_size": 50257,
    "n_positions": 1024,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
"""Shape of the default teacher, as in its config.json on the hub: planning needs no network."""
THRESHOLDS = ((0.05, 3.0), (0.11, 2.5), (0.27, 2.0))
"""Pairs of a student's share of the teacher's parameters and its largest perplexity ratio."""


def gpt2_parameters(n_layer: int, n_embd: int, vocab_size: int, n_positions: int) -> int:
    """Return the parameters of a GPT-2 with a tied head.

    V E + P E for the embeddings, 12 E² + 13 E for each block (attention 4 E² + 4 E, feed-forward
    8 E² + 5 E, two norms 4 E), and 2 E for the last norm.
    """
    blocks = n_layer * (12 * n_embd**2 + 13 * n_embd)
    return (vocab_size + n_positions) * n_embd + blocks + 2 * n_embd


@dataclass(frozen=True)
class RunCost:
    """Size of a student, and memory in bytes and optimiser steps of its training."""

    parameters: int
    share_of_teacher: float | None
    compression: float | None
    memory: int
    steps: int | None


def estimate(
    student: StudentSettings,
    settings: TrainSettings,
    teacher_config: Any,
    teacher_parameters: int,
    training_rows: int | None,
) -> RunCost:
    """Return a student's size, peak training memory and steps.

    Memory counts the teacher's weights (2 bytes a parameter in half precision, else 4), the
    student's weights, gradients and two AdamW moments (16 bytes a parameter), the student's
    activations (about 34 E + 5 H L bytes for each token and block in half precision: Korthikanti
    et al. 2022, arXiv:2205.05198, eq. 1 less what recomputing attention saves), and the loss's
    chunk of logits. This is an estimate; a run records its measured peak.

    Args:
        student: the student's shape.
        settings: batch, length, precision, epochs.
        teacher_config: with ``vocab_size`` and the longest input.
        teacher_parameters: 0 without a teacher.
        training_rows: rows of an epoch, or None if the data is not available.

    Returns:
        The cost; ``steps`` is None if it depends on data that is not available.
    """
    vocabulary, positions = teacher_config.vocab_size, teacher_config.n_positions
    parameters = gpt2_parameters(student.n_layer, student.n_embd, vocabulary, positions)
    half = settings.precision != "fp32"  # with ``auto`` a GPU is assumed
    tokens = settings.batch_size * settings.max_length
    activations = tokens * student.n_layer * 34 * student.n_embd * (1 if half else 2)
    chunk = 3 * min(tokens, 1024) * vocabulary * 4
    memory = teacher_parameters * (2 if half else 4) + 16 * parameters + activations + chunk
    return RunCost(
        parameters=parameters,
        share_of_teacher=parameters / teacher_parameters if teacher_parameters else None,
        compression=teacher_parameters / parameters if teacher_parameters else None,
        memory=memory,
        steps=total_steps(settings, training_rows),
    )


def total_steps(
    settings: TrainSettings, training_rows: int | None, processes: int = 1
) -> int | None:
    """Return the optimiser steps of a run, or None if they depend on unknown data.

    An epoch has ``training_rows`` rows; the processes share the batches of a step.
    """
    if settings.max_steps > 0:
        return settings.max_steps
    if training_rows is None:
        return None
    batches = math.ceil(training_rows / settings.batch_size)
    steps_per_epoch = math.ceil(batches / (settings.gradient_accumulation_steps * processes))
    return max(1, math.ceil(steps_per_epoch * settings.num_train_epochs))


def threshold_for(share_of_teacher: float) -> float:
    """Return the perplexity ratio that a student of a given size must stay below.

    The bound is 3.0 at 5 % of the teacher's parameters, 2.5 at 11 % and 2.0 at 27 %. It is linear
    in the share between these sizes, and constant beyond them.
    """
    shares, ratios = zip(*THRESHOLDS, strict=True)
    return float(np.interp(share_of_teacher, shares, ratios))

"""Prints what a run would need, without training: the ``--dry_run`` of scripts/train.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from src.cli import size
from src.settings import DEFAULT_TEACHER, PRESETS, TrainSettings
from src.sizing import PROTGPT2, estimate, gpt2_parameters


def plan(
    settings: TrainSettings,
    preset: str | None,
    cache_dir: str | None,
    announce: Callable[[str], None],
) -> dict[str, Any]:
    """Estimate the run's student and, for comparison, every preset.

    Args:
        settings: of the run.
        preset: the preset it was made from, or None.
        cache_dir: where tokenised proteins are kept.
        announce: called with each line of the table.

    Returns:
        The estimates for each name.

    Raises:
        ValueError: the teacher or the data is missing.
    """
    config, parameters = teacher_shape(settings.teacher_model)
    rows = known_rows(settings, cache_dir, announce)
    announce(f"teacher {settings.teacher_model}: {parameters:,} parameters")
    announce(
        f"{'student':<12} {'shape':>12} {'parameters':>13} {'of teacher':>11} {'smaller':>8} "
        f"{'memory':>9} {'steps':>9}"
    )
    students = {preset or "this run": settings.student}
    students |= {name: p.student for name, p in PRESETS.items() if name not in students}
    result = {}
    for name, student in students.items():
        figures = estimate(student, settings, config, parameters, rows)
        result[name] = dataclasses.asdict(figures)
        steps = "unknown" if figures.steps is None else f"{figures.steps:,}"
        shape = f"{student.n_layer}L/{student.n_head}H/{student.n_embd}E"
        announce(
            f"{name:<12} {shape:>12} {figures.parameters:>13,} {figures.share_of_teacher:>11.1%} "
            f"{figures.compression:>7.1f}x {size(figures.memory):>9} {steps:>9}"
        )
    announce(
        f"memory: an estimate for batches of {settings.batch_size} x {settings.max_length} tokens, "
        f"precision {settings.precision}; nothing was trained"
    )
    return result


def teacher_shape(name: str) -> tuple[Any, int]:
    """Return a teacher's configuration and number of parameters, without loading its weights."""
    if name == DEFAULT_TEACHER:
        shape = SimpleNamespace(**PROTGPT2)
        return shape, gpt2_parameters(
            shape.n_layer, shape.n_embd, shape.vocab_size, shape.n_positions
        )
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from src.models import count_parameters, explain_loading, max_positions, require_model_directory

    require_model_directory(name)
    with explain_loading("model", name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    with torch.device("meta"):
        parameters = count_parameters(AutoModelForCausalLM.from_config(config))
    return SimpleNamespace(
        vocab_size=config.vocab_size, n_positions=max_positions(config)
    ), parameters


def known_rows(
    settings: TrainSettings, cache_dir: str | None, announce: Callable[[str], None]
) -> int | None:
    """Return the rows of an epoch where the data and tokenizer are local, else None."""
    from pathlib import Path

    if not Path(settings.data).exists() or not Path(settings.teacher_model).is_dir():
        return None
    from src.data import data_summary
    from src.models import load_tokenizer
    from src.training import load_parts, training_rows

    parts = load_parts(
        settings, load_tokenizer(settings.teacher_model), settings.max_length, cache_dir
    )
    for line in data_summary(parts["train"], settings.batch_size, "training"):
        announce(line)
    return training_rows(settings, parts["train"], settings.max_length)

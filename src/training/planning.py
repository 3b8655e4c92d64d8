"""Prints what a run would need, without training: the ``--dry_run`` of scripts/train.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from src.common.cli import quiet_libraries, size
from src.common.settings import (
    DEFAULT_TEACHER,
    LARGEST_FACTOR,
    LARGEST_GPT2,
    PRESETS,
    TrainSettings,
)
from src.models.sizes import PROTGPT2, estimate, gpt2_parameters

if TYPE_CHECKING:
    from src.training.stages import Ingredients


def plan(
    settings: TrainSettings,
    preset: str | None,
    cache_dir: str | None,
    announce: Callable[[str], None],
    device_name: str = "auto",
) -> dict[str, Any]:
    """Estimate the run's student and, for comparison, every preset.

    Args:
        settings: of the run.
        preset: the preset it was made from, or None.
        cache_dir: where tokenised proteins are kept.
        announce: called with each line of the table.
        device_name: where a few batches are measured, if teacher and data are local.

    Returns:
        The estimates for each name, and what was measured under ``measured``.

    Raises:
        ValueError: the teacher or the data is missing.
    """
    config, parameters = teacher_shape(settings.teacher_model)
    found = local_ingredients(settings, device_name, cache_dir)
    rows = None
    if found is not None:
        from src.proteins.tokens import data_summary
        from src.training.stages import training_rows

        for line in data_summary(found.parts["train"], settings.batch_size, "training"):
            announce(line)
        rows = training_rows(settings, found.parts["train"], found.max_length)
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
        f"memory: by formula, for batches of {settings.batch_size} x {settings.max_length} tokens, "
        f"precision {settings.precision}"
    )
    if found is None:
        announce("time: unknown, because teacher or data are not on this machine")
    elif settings.cached_teacher:
        announce("time: not measured, because a dry run makes no teacher cache")
    else:
        from src.training.stages import dry_rehearsal

        rehearsal = dry_rehearsal(settings, found)
        result["measured"] = dataclasses.asdict(rehearsal)
        announce(f"{preset or 'this run'} on this machine, {rehearsal.line()}")
    announce("nothing was trained")
    return result


def teacher_shape(name: str) -> tuple[Any, int]:
    """Return a teacher's configuration and number of parameters, without loading its weights.

    Raises:
        ValueError: it is not there, broken, or deeper than any teacher.
    """
    if name == DEFAULT_TEACHER:
        shape = SimpleNamespace(**PROTGPT2)
        return shape, gpt2_parameters(
            shape.n_layer, shape.n_embd, shape.vocab_size, shape.n_positions
        )
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from src.models.loading import (
        count_parameters,
        explain_loading,
        max_positions,
        require_model_directory,
    )

    require_model_directory(name)
    with explain_loading("model", name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        blocks, most = config.num_hidden_layers, LARGEST_FACTOR * LARGEST_GPT2["n_layer"]
        if blocks > most:
            raise ValueError(f"config.json has {blocks:,} blocks, over {most:,}")
        with torch.device("meta"):
            parameters = count_parameters(AutoModelForCausalLM.from_config(config))
        shape = SimpleNamespace(vocab_size=config.vocab_size, n_positions=max_positions(config))
    return shape, parameters


def local_ingredients(
    settings: TrainSettings, device_name: str, cache_dir: str | None
) -> Ingredients | None:
    """Return teacher and proteins where both are on this machine, else None."""
    if not Path(settings.data).exists() or not Path(settings.teacher_model).is_dir():
        return None
    from src.training.stages import load_teacher_and_parts

    quiet_libraries()
    return load_teacher_and_parts(settings, device_name, cache_dir)

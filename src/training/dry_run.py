"""Prints what a run would need, without training: the ``--dry_run`` of scripts/train.py."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
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
    StudentSettings,
    TrainSettings,
)
from src.models.sizes import PROTGPT2, RunCost, estimate, gpt2_parameters

if TYPE_CHECKING:
    from src.training.ingredients import Ingredients
    from src.training.timing import Timing

LONGEST_SECONDS = 20.0
"""The steps that are timed end soon after this time."""
WEIGHT_BYTES = 4
OPTIMIZER_BYTES = 8
"""Two moments of AdamW for each parameter; Muon has one, so it needs less."""


def plan(
    settings: TrainSettings,
    output_dir: Path,
    preset: str | None,
    cache_dir: str | None,
    announce: Callable[[str], None],
    device_name: str = "auto",
    teacher_cache: Path | None = None,
) -> dict[str, Any]:
    """Estimate the run's student and, for comparison, every preset.

    ``preset`` is the one that the run was made from. A few steps are timed on the device if teacher
    and data are local.

    Returns:
        The estimate for each name, the bytes of disk under ``disk``, and what was timed under
        ``measured``.

    Raises:
        ValueError: the teacher, the tokenizer or the data is missing.
    """
    shape, teacher_parameters = model_shape(settings)
    inputs = local_inputs(settings, device_name, cache_dir)
    rows = None
    if inputs is not None:
        from src.proteins.tokens import data_summary
        from src.training.ingredients import training_rows

        for line in data_summary(inputs.parts["train"], "training"):
            announce(line)
        rows = training_rows(settings, inputs.parts["train"], inputs.max_length)
    if teacher_parameters:
        announce(f"teacher {settings.teacher_model}: {teacher_parameters:,} parameters")
    else:
        announce(f"no teacher; tokenizer {settings.tokenizer}: {shape.vocab_size:,} tokens")
    name = preset or "this run"
    if settings.student is None:
        result: dict[str, Any] = {}
        _, parameters = teacher_shape(str(settings.init_from))
        announce(f"{settings.init_from} as it is: {parameters:,} parameters")
    else:
        students = {name: settings.student}
        students |= {other: p.student for other, p in PRESETS.items() if other not in students}
        estimates = {
            other: estimate(student, settings, shape, teacher_parameters, rows)
            for other, student in students.items()
        }
        result = print_table(name, students, estimates, announce)
        parameters = estimates[name].parameters
        announce(
            f"memory: by formula, for batches of {settings.batch_size} x {settings.max_length} "
            f"tokens, precision {settings.precision}"
        )
    announce(f"output: {output_dir}")
    result["disk"] = disk_needed(settings, parameters, shape, inputs)
    for line in disk_lines(
        result["disk"], output_dir, teacher_cache, settings.early_stopping is not None
    ):
        announce(line)
    if inputs is None:
        announce("time: unknown, because teacher or data are not on this machine")
    elif settings.cached_teacher:
        announce("time: not measured, because a dry run makes no teacher cache")
    else:
        timing = time_steps(settings, inputs)
        result["measured"] = dataclasses.asdict(timing)
        announce(f"{name} on this machine: {timing.line()}")
    announce("nothing was trained")
    return result


def print_table(
    own: str,
    students: dict[str, StudentSettings],
    estimates: dict[str, RunCost],
    announce: Callable[[str], None],
) -> dict[str, Any]:
    """Print the estimates but those of presets larger than the teacher; return what was printed.

    The student that was asked for, ``own``, is always printed.
    """
    announce(
        f"{'student':<12} {'shape':>12} {'parameters':>13} {'of teacher':>11} {'smaller':>8} "
        f"{'memory':>9} {'steps':>9}"
    )
    larger = [n for n, e in estimates.items() if n != own and (e.share_of_teacher or 0) > 1]
    shown = {n: e for n, e in estimates.items() if n not in larger}
    for name, row in shown.items():
        student = students[name]
        steps = "unknown" if row.steps is None else f"{row.steps:,}"
        shape = f"{student.n_layer}L/{student.n_head}H/{student.n_embd}E"
        share = "-" if row.share_of_teacher is None else f"{row.share_of_teacher:.1%}"
        smaller = "-" if row.compression is None else f"{row.compression:.1f}x"
        announce(
            f"{name:<12} {shape:>12} {row.parameters:>13,} {share:>11} {smaller:>8} "
            f"{size(row.memory):>9} {steps:>9}"
        )
    if larger:
        announce(f"left out, because larger than the teacher: {', '.join(larger)}")
    return {name: dataclasses.asdict(row) for name, row in shown.items()}


def disk_needed(
    settings: TrainSettings, parameters: int, shape: Any, inputs: Ingredients | None
) -> dict[str, int | None]:
    """Return the bytes that a run writes: a checkpoint, the finished model, the teacher's cache.

    The cache is None where no cache is asked for, or the number of tokens is unknown.
    """
    cache = None
    if settings.cached_teacher and inputs is not None:
        from src.common.devices import DTYPES
        from src.models.teacher_cache import needed_bytes

        tokens = sum(int(proteins.lengths.sum()) for proteins in inputs.parts.values())
        cache = needed_bytes(tokens, shape.width, DTYPES[inputs.precision])
    return {
        "checkpoint": parameters * (WEIGHT_BYTES + OPTIMIZER_BYTES),
        "model": parameters * WEIGHT_BYTES,
        "teacher_cache": cache,
    }


def disk_lines(
    disk: dict[str, int | None],
    output_dir: Path,
    teacher_cache: Path | None,
    early_stopping: bool = False,
) -> list[str]:
    """Return the lines that say what a run needs of the disk, and what is free there."""
    from src.training.assembly import CHECKPOINTS_KEPT

    checkpoint, model, cache = disk["checkpoint"], disk["model"], disk["teacher_cache"]
    assert checkpoint is not None
    assert model is not None
    # A new checkpoint is whole before the oldest is removed; each kept one may have another best.
    kept = CHECKPOINTS_KEPT * (2 if early_stopping else 1)
    total = (kept + 1) * checkpoint + model
    lines = [
        f"disk: {size(total)} ({kept} checkpoints kept and one being written, each "
        f"{size(checkpoint)} of weights and optimiser state, and the model of {size(model)}); "
        f"{size(free_space(output_dir))} free"
    ]
    if teacher_cache is not None:
        need = "unknown, because teacher or data are not on this machine"
        need = need if cache is None else f"{size(cache)} in {teacher_cache}"
        lines.append(f"teacher cache: {need}; {size(free_space(teacher_cache))} free")
    return lines


def free_space(folder: Path) -> int:
    """Return the bytes that are free where a directory is, or would be made."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def model_shape(settings: TrainSettings) -> tuple[Any, int]:
    """Return what decides a student's vocabulary and positions, and the teacher's parameters.

    Raises:
        ValueError: the teacher or the tokenizer is missing or broken.
    """
    if settings.teacher_model is not None:
        return teacher_shape(settings.teacher_model, settings.max_length)
    from src.models.loading import load_tokenizer
    from src.training.ingredients import shape_without_teacher

    assert settings.tokenizer is not None
    tokenizer = load_tokenizer(settings.tokenizer)
    return shape_without_teacher(tokenizer, settings.max_length), 0


def teacher_shape(name: str, max_length: int = 512) -> tuple[Any, int]:
    """Return a teacher's shape and number of parameters, without loading its weights.

    Raises:
        ValueError: it is not there, broken, or deeper than any teacher.
    """
    if name == DEFAULT_TEACHER:
        shape = SimpleNamespace(**PROTGPT2, width=PROTGPT2["n_embd"])
        return shape, gpt2_parameters(
            shape.n_layer, shape.n_embd, shape.vocab_size, shape.n_positions
        )
    from transformers import AutoConfig

    from src.models.inspection import explain_loading
    from src.models.loading import (
        described_parameters,
        require_model_directory,
        student_positions,
    )

    require_model_directory(name)
    with explain_loading("model", name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        blocks, most = config.num_hidden_layers, LARGEST_FACTOR * LARGEST_GPT2["n_layer"]
        if blocks > most:
            raise ValueError(f"config.json has {blocks:,} blocks, over {most:,}")
        parameters = described_parameters(config)
        shape = SimpleNamespace(
            vocab_size=config.vocab_size,
            n_positions=student_positions(config, max_length),
            width=config.hidden_size,
        )
    return shape, parameters


def local_inputs(
    settings: TrainSettings, device_name: str, cache_dir: str | None
) -> Ingredients | None:
    """Return teacher and proteins where both are on this machine, else None."""
    from src.proteins.locations import on_hub

    teacher = settings.teacher_model
    if on_hub(settings.data) or not (teacher is None or Path(teacher).is_dir()):
        return None
    from src.training.ingredients import gather

    quiet_libraries()
    return gather(settings, device_name, cache_dir)


def time_steps(settings: TrainSettings, inputs: Ingredients) -> Timing:
    """Train a few steps in a temporary directory and return their time; nothing is kept."""
    from src.models.inspection import count_parameters
    from src.trainer.callbacks import ConsoleProgress, MetricsFile
    from src.training.assembly import build_arguments, build_trainer, initial_student
    from src.training.ingredients import planned
    from src.training.timing import (
        TIMED_STEPS,
        WARM_UP_STEPS,
        StepTimer,
        explain_lack_of_memory,
    )

    student = initial_student(settings, inputs.model_shape, inputs.parts["train"])
    steps, _, validation = planned(settings, inputs, count_parameters(student))
    timings: list[Timing] = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = build_arguments(
            dataclasses.replace(settings, max_steps=min(steps, WARM_UP_STEPS + TIMED_STEPS)),
            Path(folder),
            steps,
            inputs.precision,
            inputs.device,
            "none",
        )
        for strategy in ("eval_strategy", "save_strategy", "logging_strategy"):
            setattr(arguments, strategy, "no")
        trainer = build_trainer(settings, inputs, student, arguments)
        for callback in (ConsoleProgress, MetricsFile):
            trainer.remove_callback(callback)
        timer = StepTimer(
            timings.append, inputs.device, steps, validation.share, limit=LONGEST_SECONDS
        )
        trainer.add_callback(timer)
        with explain_lack_of_memory(settings.batch_size):
            trainer.train()
    assert timings
    return timings[0]

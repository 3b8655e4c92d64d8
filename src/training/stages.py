"""Runs one distillation in stages: claim, gather, build, fit, conclude.

``claim`` checks the output directory, ``gather`` loads the teacher and the proteins, ``build``
makes the student, ``fit`` trains it and ``conclude`` writes the finished model. Of several
processes all take part in each stage; the work of the first alone goes through
``processes.agreed``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from src.common import processes
from src.common.cli import duration, quiet_libraries, say, size, unheard
from src.common.devices import describe_device, peak_memory, require_one_gpu
from src.common.files import check_outputs, names_full_disk, remove_unfinished
from src.common.runs import (
    FINISHED,
    GO_ON,
    RUN_FILE,
    RUNNING,
    claim_folder,
    locked,
    provenance,
    read_run,
    write_run,
)
from src.common.settings import TrainSettings, as_recorded
from src.distillation import DistillationTrainer
from src.evaluation.gates import CHECKED_PROTEINS, check_teacher, draw_proteins
from src.evaluation.results import lookup
from src.models.forward import keep_head_alone
from src.models.inspection import count_parameters
from src.models.loading import model_fingerprint
from src.models.lora import merge_lora
from src.models.teacher_cache import TeacherCache
from src.proteins.tokens import data_summary
from src.trainer.checkpoints import newest_valid
from src.trainer.early_stopping import outcome, outcome_line, validation_standing
from src.trainer.interruption import stops_on_signals
from src.training.assembly import build_arguments, build_trainer, initial_student
from src.training.ingredients import (
    Ingredients,
    capture_parts,
    describe_data,
    gather,
    planned,
)
from src.training.timing import SHORTEST_RUN, StepTimer, explain_lack_of_memory, print_beside_bar
from src.training.tracking import Tracking, open_tracker, require_tracker
from src.training.validation import ValidationPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback


@dataclass(frozen=True)
class RunOptions:
    """Where a run is written and how it is run: nothing that decides its outcome.

    Attributes:
        output_dir: new, or holding the same run.
        resume: go on with an unfinished run.
        report_to: ``none``, ``wandb`` or ``tensorboard``.
        device_name: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        cache_dir: where tokenised proteins are kept.
        teacher_cache: where the teacher's hidden states are kept, with ``cached_teacher``.
        shard_teacher: spread the teacher over the processes, where one device cannot hold it.
        skip_teacher_check: do not measure the teacher on natural and shuffled proteins first.
        workers: processes that prepare batches.
        compile_model: run the student through ``torch.compile``.
        announce: called with each line for a person.
        callbacks: of the Trainer, beside the run's own.
    """

    output_dir: Path
    resume: bool = False
    report_to: str = "none"
    device_name: str = "auto"
    cache_dir: str | None = None
    teacher_cache: str | Path | None = None
    shard_teacher: bool = False
    skip_teacher_check: bool = False
    workers: int = 0
    compile_model: bool = False
    announce: Callable[[str], None] = say
    callbacks: Sequence[TrainerCallback] = ()


@dataclass(frozen=True)
class Claim:
    """What the output directory holds, and how a run goes on from it.

    Attributes:
        finished: the record of the run if it is done, else None.
        unfinished: its record if it was begun and is not done, else None.
        processes: how many the run was begun on.
        accumulation: batches that each process adds up in a step.
    """

    finished: dict[str, Any] | None = None
    unfinished: dict[str, Any] | None = None
    processes: int = 1
    accumulation: int = 1


@dataclass
class Built:
    """What training needs beside the inputs.

    Attributes:
        student: with its initial weights.
        initial_fingerprint: of these weights.
        parameters: of the student.
        teacher_parameters: 0 without a teacher.
        steps: optimiser steps of the run.
        validation: how often the run is validated.
        checks: the teacher's check; None where it was not made.
        caches: the teacher's hidden states by part; None where the teacher is run.
    """

    student: PreTrainedModel
    initial_fingerprint: str
    parameters: int
    teacher_parameters: int
    steps: int
    validation: ValidationPlan
    checks: dict[str, Any] | None = None
    caches: dict[str, TeacherCache] | None = None


@dataclass
class Fitted:
    """A student after its training.

    Attributes:
        trainer: holds the student.
        record: of the run, as it was when training began.
        seconds: of the training.
        tracking: of the run; None without a tracker.
    """

    trainer: DistillationTrainer
    record: dict[str, Any]
    seconds: float
    tracking: Tracking | None


@stops_on_signals
def train(settings: TrainSettings, output_dir: Path, **options: Any) -> dict[str, Any]:
    """Distil a student, leave a finished model directory and return the run's record.

    ``output_dir`` is new, or holds the same run; options are those of :class:`RunOptions`.

    Raises:
        ValueError: anything that the user can mend.
    """
    run = RunOptions(output_dir, **options)
    if processes.count() == 1:
        require_one_gpu(run.device_name)
    quiet_libraries()
    require_tracker(run.report_to)
    processes.join(run.device_name)
    if not processes.is_first():
        run = replace(run, announce=unheard)
    claimed = processes.agreed(lambda: claim(settings, run))
    if claimed.finished is not None:
        return claimed.finished
    processes.agreed(lambda: open_tracker(run.report_to, output_dir))
    inputs = gather(settings, run.device_name, run.cache_dir, run.shard_teacher)
    built = build(settings, run, claimed, inputs)
    with (
        names_full_disk(output_dir, f"make space: {GO_ON}"),
        processes.first_holds(lambda: locked(output_dir)),
    ):
        # Another process may have finished the run while this one read its data.
        claimed = processes.agreed(lambda: claim(settings, run))
        if claimed.finished is not None:
            return claimed.finished
        fitted = fit(settings, run, claimed, inputs, built)
        return conclude(settings, run, built, fitted)


def claim(settings: TrainSettings, run: RunOptions) -> Claim:
    """Return what the output directory holds; nothing in it is touched. Runs in one process.

    Raises:
        ValueError: the directory is not free for this run, or the run cannot go on here.
    """
    folder = run.output_dir
    state = claim_folder(folder, as_recorded(settings), run.resume)
    record = None if state == "new" else read_run(folder)
    if state == "finished":
        if not any(folder.glob("*.safetensors")):
            raise ValueError(
                f"{folder} holds this run, finished, but its weights are gone: train again in "
                "another --output_dir"
            )
        run.announce(f"{folder} holds this run, finished: nothing to do")
        return Claim(finished=record)
    check_outputs(folder / RUN_FILE, overwrite=True)
    if run.shard_teacher and settings.loss.alpha == 1:
        raise ValueError("--shard_teacher: with --alpha 1 no teacher is run")
    if settings.cached_teacher and run.teacher_cache is None:
        raise ValueError("this run reads a teacher cache: pass --teacher_cache DIR")
    begun_on = processes.count() if record is None else record.get("processes", 1)
    if isinstance(begun_on, bool) or not isinstance(begun_on, int) or begun_on < 1:
        raise ValueError(f"{folder / RUN_FILE}: processes must be at least 1, got {begun_on!r:.40}")
    return Claim(None, record, begun_on, batches_of_each(settings, begun_on))


def batches_of_each(settings: TrainSettings, begun_on: int) -> int:
    """Return the batches that each process adds up in a step of a run begun on ``begun_on``.

    A step of a run has the same rows on however many processes it goes on.

    Raises:
        ValueError: they cannot be shared out equally.
    """
    all_batches = settings.gradient_accumulation_steps * begun_on
    if all_batches % processes.count():
        raise ValueError(
            f"the run was begun on {begun_on} processes and its steps have {all_batches} batches: "
            f"they cannot be shared by {processes.count()} processes"
        )
    return all_batches // processes.count()


def build(settings: TrainSettings, run: RunOptions, claimed: Claim, inputs: Ingredients) -> Built:
    """Make the student, plan the steps, check the teacher and fill its cache.

    Raises:
        ValueError: the student cannot be made, or the teacher or its cache is unusable.
    """
    student = initial_student(settings, inputs.model_shape, inputs.parts["train"])
    rows_per_step = settings.batch_size * claimed.accumulation * processes.count()
    parameters, teacher_parameters = count_parameters(student), inputs.teacher_parameters
    steps, rows, validation = planned(
        settings, inputs, parameters, claimed.processes, rows_per_step
    )
    built = Built(
        student,
        model_fingerprint(student),
        parameters,
        teacher_parameters,
        steps,
        validation,
    )
    for line in data_summary(inputs.parts["train"], "training"):
        run.announce(line)
    run.announce(models_line(settings, student, teacher_parameters))
    several = f", {processes.count()} processes" if processes.count() > 1 else ""
    run.announce(
        f"{steps:,} steps of {rows_per_step} rows over {rows:,} rows, {inputs.precision} on "
        f"{inputs.device.type}{several}"
    )
    if inputs.teacher is not None and not run.skip_teacher_check:
        built.checks = check(inputs, run.shard_teacher)
        run.announce(built.checks["summary"])
    if settings.cached_teacher:
        assert inputs.teacher is not None
        assert run.teacher_cache is not None
        built.caches = capture_parts(inputs, run.teacher_cache, run.announce)
        keep_head_alone(inputs.teacher)
    return built


def models_line(settings: TrainSettings, model: PreTrainedModel, teacher_parameters: int) -> str:
    """Return the line that compares the student with its teacher."""
    student, parameters = settings.student, count_parameters(model)
    if settings.lora_rank is not None:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return f"{settings.init_from}: {trained:,} of {parameters:,} parameters are trained (LoRA)"
    if student is None:
        return f"{type(model).__name__} as it is: {parameters:,} parameters"
    shape = f"{student.n_layer}L/{student.n_head}H/{student.n_embd}E"
    if not teacher_parameters:
        return f"no teacher; model {shape}: {parameters:,} parameters"
    return (
        f"teacher {settings.teacher_model}: {teacher_parameters:,} parameters; student "
        f"{shape}: {parameters:,} ({parameters / teacher_parameters:.1%}, "
        f"{teacher_parameters / parameters:.1f} times smaller)"
    )


def check(inputs: Ingredients, sharded: bool) -> dict[str, Any]:
    """Return the teacher's check; a sharded teacher is run by all processes, another by one."""
    decide = processes.alike if sharded else processes.agreed
    teacher, train = inputs.teacher, inputs.parts["train"]
    assert teacher is not None
    # Not a measurement of quality: training proteins serve as well, and there are more of them.
    held_out = inputs.parts["validation"]
    proteins = draw_proteins(train, CHECKED_PROTEINS, 0) + [
        held_out[i] for i in range(len(held_out))
    ]
    return decide(lambda: check_teacher(teacher, inputs.tokenizer, proteins, train))


def fit(
    settings: TrainSettings, run: RunOptions, claimed: Claim, inputs: Ingredients, built: Built
) -> Fitted:
    """Train the student, from the run's newest checkpoint if there is one.

    Raises:
        ValueError: the run was begun with other inputs, or a batch does not fit the memory.
    """
    record = processes.agreed(lambda: begin_record(settings, run, claimed, inputs, built))
    arguments = build_arguments(
        replace(settings, gradient_accumulation_steps=claimed.accumulation),
        run.output_dir,
        built.steps,
        inputs.precision,
        inputs.device,
        run.report_to,
        run.workers,
        run.compile_model,
        built.validation.evaluations,
    )
    trainer = build_trainer(settings, inputs, built.student, arguments, built.caches)
    tracking = None
    if run.report_to != "none":
        tracking = Tracking(run.report_to, run.output_dir, record)
        tracking.watch(trainer)
    for callback in run.callbacks:
        trainer.add_callback(callback)
    checkpoint = None
    if claimed.unfinished is not None:
        checkpoint = processes.agreed(lambda: newest_valid(run.output_dir, run.announce))
        run.announce(f"going on from {checkpoint.name}" if checkpoint else "starting over")
    if built.steps >= SHORTEST_RUN:
        trainer.add_callback(
            StepTimer(
                lambda timing: print_beside_bar(run.announce, timing.line()),
                inputs.device,
                built.steps,
                built.validation.share,
            )
        )
    return Fitted(trainer, record, train_from(checkpoint, trainer), tracking)


def train_from(checkpoint: Path | None, trainer: DistillationTrainer) -> float:
    """Train from a checkpoint or the start; return the seconds, those of stopped sessions too."""
    device = trainer.args.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with explain_lack_of_memory(trainer.args.train_batch_size):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer.seconds()


def begin_record(
    settings: TrainSettings, run: RunOptions, claimed: Claim, inputs: Ingredients, built: Built
) -> dict[str, Any]:
    """Write and return the record of a run that begins or goes on. Runs in one process."""
    teacher = None
    if inputs.teacher is not None:
        teacher = {
            "name": settings.teacher_model,
            "parameters": built.teacher_parameters,
            "fingerprint": inputs.teacher_fingerprint,
            "checks": built.checks,
        }
    record: dict[str, Any] = {
        "name": run.output_dir.name,
        "status": RUNNING,
        "settings": as_recorded(settings),
        **provenance(),
        "device": describe_device(inputs.device),
        "processes": claimed.processes,
        "precision": inputs.precision,
        "max_length": inputs.max_length,
        "teacher": teacher,
        "student": {
            "parameters": built.parameters,
            "initial_fingerprint": built.initial_fingerprint,
        },
        "compression": built.teacher_parameters / built.parameters if teacher else None,
        "data": {
            "source": settings.data,
            **{name: describe_data(proteins) for name, proteins in inputs.parts.items()},
        },
        "steps": built.steps,
    }
    remove_unfinished(run.output_dir)
    if claimed.unfinished is not None:
        require_same_inputs(run.output_dir, claimed.unfinished, record)
        record["resumed"] = [*claimed.unfinished.get("resumed", []), record["started"]]
    write_run(run.output_dir, record)
    return record


def require_same_inputs(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that an unfinished run goes on with the teacher and the proteins it was begun with.

    In another precision a teacher has other weights; then the proteins alone are compared.

    Raises:
        ValueError: they are not the same.
    """
    compared = {"training proteins": "data.train", "validation proteins": "data.validation"}
    if lookup(before, "precision") == now["precision"]:
        compared["teacher's weights"] = "teacher"
    for what, place in compared.items():
        old, new = (lookup(record, f"{place}.fingerprint") for record in (before, now))
        if old is not None and old != new:
            raise ValueError(
                f"{folder} was begun with other {what} (SHA-256 {str(old)[:12]}, now {new[:12]}): "
                "bring those back to go on, or choose another --output_dir"
            )


def conclude(
    settings: TrainSettings, run: RunOptions, built: Built, fitted: Fitted
) -> dict[str, Any]:
    """Validate and save the student, and return the finished record."""
    trainer, record = fitted.trainer, fitted.record
    final = last_evaluation(trainer) or trainer.evaluate()
    if settings.early_stopping is not None:
        history, last_step = trainer.state.log_history, trainer.state.global_step
        record["early_stopping"] = outcome(history, last_step, built.steps)
        final = dict(validation_standing(history).best)
        if final["step"] != last_step:
            trainer.load_weights(final["step"])
        run.announce(outcome_line(record["early_stopping"]))
    if settings.lora_rank is not None:
        merge_lora(built.student)
    trainer.save_model(str(run.output_dir))
    record |= {
        "status": FINISHED,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "train_seconds": round(fitted.seconds, 1),
        "peak_memory_bytes": peak_memory(trainer.args.device),
        "final": {name: value for name, value in final.items() if name.startswith("eval_")},
    }
    record["student"] |= {
        "parameters": count_parameters(built.student),  # without additions that were merged
        "fingerprint": model_fingerprint(built.student),
    }
    write_run(run.output_dir, record)
    if fitted.tracking is not None and trainer.is_world_process_zero():
        fitted.tracking.conclude(record)
    run.announce(
        f"trained in {duration(fitted.seconds)}, peak memory {size(record['peak_memory_bytes'])}; "
        f"validation loss {final['eval_loss']:.4f}"
    )
    run.announce(f"student written to {run.output_dir}")
    return record


def last_evaluation(trainer: DistillationTrainer) -> dict[str, float] | None:
    """Return the validation that was made after the last step, or None where none was."""
    for record in reversed(trainer.state.log_history):
        if "eval_loss" in record:
            return record if record["step"] == trainer.state.global_step else None
    return None

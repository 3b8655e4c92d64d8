"""Runs one distillation from settings to a finished model directory."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from src.common import processes
from src.common.cli import duration, quiet_libraries, say, size
from src.common.devices import (
    choose_device,
    choose_precision,
    describe_device,
    peak_memory,
    weights_dtype,
)
from src.common.files import check_outputs, names_full_disk, remove_unfinished
from src.common.runs import (
    FINISHED,
    RUN_FILE,
    RUNNING,
    claim_folder,
    locked,
    provenance,
    read_run,
    write_run,
)
from src.common.settings import DECAY_SHARE, TrainSettings, as_recorded, derived_steps
from src.distillation import DistillationTrainer
from src.evaluation.gates import check_teacher
from src.evaluation.results import lookup
from src.models.initialisation import subclone
from src.models.loading import (
    build_student,
    count_parameters,
    keep_head_alone,
    load_causal_lm,
    load_tokenizer,
    max_positions,
    model_fingerprint,
    set_dropout,
    student_config,
)
from src.models.sharding import load_sharded
from src.models.sizes import total_steps
from src.models.teacher_cache import CachedCollator, TeacherCache, capture
from src.proteins.batching import PackedDataset, PackingCollator, PaddingCollator, ProteinDataset
from src.proteins.sources import has_split
from src.proteins.tokens import TokenisedProteins, chosen, data_summary, tokenise
from src.trainer.callbacks import ConsoleProgress, MetricsFile
from src.trainer.checkpoints import newest_valid
from src.trainer.early_stopping import EarlyStopping, outcome, outcome_line, validation_standing
from src.trainer.interruption import stops_on_signals
from src.training.rehearsal import REHEARSED_FROM, Rehearsal, rehearse
from src.training.tracking import Tracking, open_tracker, require_tracker

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HELD_OUT_SHARE = 0.02
"""Of a source without a validation part: proteins set aside, at most ``validation_proteins``."""
DECIDING_SHARE = 0.1
"""The same where the validation decides when to stop: few proteins would decide by chance."""
CHECKPOINTS_KEPT = 2


def load_parts(
    settings: TrainSettings,
    tokenizer: Any,
    max_length: int,
    cache_dir: str | None = None,
) -> dict[str, TokenisedProteins]:
    """Return the tokenised training and validation proteins.

    Validation proteins are the source's own validation part where it has one. Of any other source
    a share is set aside by a hash of the sequence, the same whatever ``train_size_prop``: more of
    them with early stopping, and the same ones among them.

    Raises:
        ValueError: the source is missing or broken, or nothing is left to train on.
    """
    options: dict[str, Any] = {"cache_dir": cache_dir}
    separate = has_split(settings.data, "validation")
    train = tokenise(
        settings.data,
        "train",
        tokenizer,
        max_length,
        proportion=settings.train_size_prop,
        seed=settings.data_seed,
        **options,
    )
    if separate:
        validation = tokenise(settings.data, "validation", tokenizer, max_length, **options)
    else:
        share = HELD_OUT_SHARE if settings.early_stopping is None else DECIDING_SHARE
        aside = chosen(train.hashes, share, settings.data_seed + 1)
        validation = train.subset(np.flatnonzero(aside))
        train = train.subset(np.flatnonzero(~aside))
    validation = validation.subset(np.arange(min(len(validation), settings.validation_proteins)))
    if not len(train) or not len(validation):
        raise ValueError(
            f"--data {settings.data}: {len(train)} training and {len(validation)} validation "
            f"proteins are left; give more data or raise --train_size_prop "
            f"(now {settings.train_size_prop})"
        )
    return {"train": train, "validation": validation}


@dataclass
class Ingredients:
    """What students of one teacher share: itself, the proteins, and where they are trained."""

    teacher: PreTrainedModel | None
    teacher_fingerprint: str | None
    tokenizer: Any
    parts: dict[str, TokenisedProteins]
    device: torch.device
    precision: str
    max_length: int

    @property
    def shape(self) -> Any:
        """What a student shares with its teacher, or where there is none, with its tokenizer."""
        if self.teacher is not None:
            return self.teacher.config
        return SimpleNamespace(
            vocab_size=len(self.tokenizer),
            n_positions=self.max_length,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )


def load_teacher(
    name: str, precision: str, device: torch.device, sharded: bool = False
) -> tuple[PreTrainedModel, str]:
    """Load a teacher in a run's precision; return it with its fingerprint."""

    def load(where: torch.device) -> tuple[PreTrainedModel, str]:
        teacher = load_causal_lm(name, weights_dtype(precision), where)
        return teacher, model_fingerprint(teacher)

    return load_sharded(lambda: load(torch.device("cpu")), device) if sharded else load(device)


def load_teacher_and_parts(
    settings: TrainSettings,
    device_name: str = "auto",
    cache_dir: str | None = None,
    shard_teacher: bool = False,
) -> Ingredients:
    """Load the teacher in the run's precision, and tokenise the proteins.

    Args:
        settings: of the run.
        device_name: ``auto``, ``cpu`` or ``cuda``.
        cache_dir: where tokenised proteins are kept.
        shard_teacher: spread the teacher over the processes (:mod:`src.models.sharding`).

    Raises:
        ValueError: anything that the user can mend.
    """
    device = choose_device(device_name)
    precision = choose_precision(settings.precision, device)
    teacher = fingerprint = None
    max_length = settings.max_length
    if settings.tokenizer is not None:
        tokenizer = load_tokenizer(settings.tokenizer)
    else:
        assert settings.teacher_model is not None
        tokenizer = load_tokenizer(settings.teacher_model)
        teacher, fingerprint = load_teacher(
            settings.teacher_model, precision, device, shard_teacher
        )
        max_length = min(max_length, max_positions(teacher.config))
    parts = load_parts(settings, tokenizer, max_length, cache_dir)
    return Ingredients(teacher, fingerprint, tokenizer, parts, device, precision, max_length)


def training_rows(settings: TrainSettings, train: TokenisedProteins, max_length: int) -> int:
    """Return the rows of an epoch: proteins, or packed rows."""
    if settings.batching == "packed":
        return len(PackedDataset(train, max_length, settings.data_seed))
    return len(train)


def build_arguments(
    settings: TrainSettings,
    output_dir: Path,
    steps: int,
    precision: str,
    device: torch.device,
    report_to: str,
    workers: int = 0,
    compile_model: bool = False,
) -> TrainingArguments:
    """Return the Trainer's arguments for our settings."""
    derived = derived_steps(settings, steps)
    # A launcher's own choice, in the environment, would otherwise win over fp32.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no" if precision == "fp32" else precision
    return TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        num_train_epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_schedule,
        warmup_steps=derived["warmup_steps"],
        lr_scheduler_kwargs=(
            {"num_decay_steps": int(DECAY_SHARE * steps), "decay_type": "linear"}
            if settings.lr_schedule == "warmup_stable_decay"
            else None
        ),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=derived["logging_steps"],
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=derived["eval_steps"],
        save_strategy="steps",
        save_steps=derived["save_steps"],
        save_total_limit=CHECKPOINTS_KEPT,
        seed=settings.seed,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=device.type == "cpu",
        optim="adamw_torch_fused" if device.type == "cuda" else "adamw_torch",
        report_to=report_to,
        run_name=output_dir.name,
        remove_unused_columns=False,
        dataloader_num_workers=workers,
        torch_compile=compile_model,
        disable_tqdm=True,
    )


def build_trainer(
    settings: TrainSettings,
    parts: dict[str, TokenisedProteins],
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokenizer: Any,
    arguments: TrainingArguments,
    max_length: int,
    caches: dict[str, TeacherCache] | None = None,
) -> DistillationTrainer:
    """Wire data, models and loss into a Trainer with our own progress and log."""
    callbacks = [MetricsFile(Path(str(arguments.output_dir))), ConsoleProgress()]
    if settings.early_stopping is not None:
        callbacks.append(EarlyStopping(settings.early_stopping))
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        **asdict(settings.loss),
        loss_impl=settings.loss_impl,
        skip_loss_spikes=settings.skip_loss_spikes,
        optimizer=settings.optimizer,
        other_learning_rate=settings.other_learning_rate,
        args=arguments,
        processing_class=tokenizer,
        callbacks=callbacks,
        **build_inputs(settings, parts, int(tokenizer.pad_token_id), max_length, caches),
    )
    remove_default_output(trainer)
    return trainer


def build_inputs(
    settings: TrainSettings,
    parts: dict[str, TokenisedProteins],
    pad: int,
    max_length: int,
    caches: dict[str, TeacherCache] | None = None,
) -> dict[str, Any]:
    """Return the datasets and the collator of a Trainer."""
    packed = settings.batching == "packed"
    datasets: dict[str, Any] = {}
    for name, proteins in parts.items():
        cache = caches[name] if caches else None
        if packed:
            datasets[name] = PackedDataset(proteins, max_length, settings.data_seed, cache)
        else:
            by_length = settings.batching == "bucketed"
            datasets[name] = ProteinDataset(proteins, by_length, cache)
    collator: Any = PackingCollator(pad, max_length) if packed else PaddingCollator(pad)
    return {
        "train_dataset": datasets["train"],
        "eval_dataset": datasets["validation"],
        "data_collator": CachedCollator(collator) if caches else collator,
    }


def remove_default_output(trainer: Trainer) -> None:
    """Take the Trainer's own printing and bar away: ours stand in their place."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)


def capture_parts(
    found: Ingredients,
    directory: str | Path,
    announce: Callable[[str], None] = say,
    **options: Any,
) -> dict[str, TeacherCache]:
    """Return the teacher's cache for each part, captured where it is not there yet.

    Options are those of :func:`src.models.teacher_cache.capture`.
    """
    fingerprint = found.teacher_fingerprint
    return {
        name: capture(
            found.teacher,
            proteins,
            directory,
            announce=announce,
            fingerprint=fingerprint,
            **options,
        )
        for name, proteins in found.parts.items()
    }


@stops_on_signals
def train(
    settings: TrainSettings,
    output_dir: Path,
    *,
    resume: bool = False,
    report_to: str = "none",
    device_name: str = "auto",
    cache_dir: str | None = None,
    teacher_cache: str | Path | None = None,
    shard_teacher: bool = False,
    skip_teacher_check: bool = False,
    workers: int = 0,
    compile_model: bool = False,
    announce: Callable[[str], None] = say,
) -> dict[str, Any]:
    """Distil a student and leave a finished model directory.

    Args:
        settings: what to train.
        output_dir: where; new, or holding the same run.
        resume: go on with an unfinished run.
        report_to: ``none``, ``wandb`` or ``tensorboard``.
        device_name: ``auto``, ``cpu`` or ``cuda``.
        cache_dir: where tokenised proteins are kept.
        teacher_cache: where the teacher's hidden states are kept, with ``cached_teacher``.
        shard_teacher: spread the teacher over the processes, where one device cannot hold it.
        skip_teacher_check: do not measure the teacher on natural and shuffled proteins first.
        workers: processes that prepare batches.
        compile_model: run the student through ``torch.compile``.
        announce: called with each line for a person.

    Returns:
        The run's record, as in ``run.json``.

    Raises:
        ValueError: anything that the user can mend.
    """
    quiet_libraries()
    require_tracker(report_to)
    wanted = as_recorded(settings)
    processes.join(device_name)
    if not processes.is_first():
        announce = unheard
    standing = processes.agreed(lambda: claim_folder(output_dir, wanted, resume))
    if standing == "finished":
        return processes.agreed(lambda: finished_run(output_dir, announce))
    processes.agreed(lambda: check_outputs(output_dir / RUN_FILE, overwrite=True))
    if shard_teacher and settings.loss.alpha == 1:
        raise ValueError("--shard_teacher: with --alpha 1 no teacher is run")
    processes.agreed(lambda: open_tracker(report_to, output_dir))
    together = begun_on(output_dir) if standing == "resume" else processes.count()
    accumulation = processes.agreed(lambda: batches_of_each(settings, together))
    found = load_teacher_and_parts(settings, device_name, cache_dir, shard_teacher)
    device, precision, max_length = found.device, found.precision, found.max_length
    teacher, tokenizer, parts = found.teacher, found.tokenizer, found.parts
    student = initial_student(settings, found.shape)
    initial = model_fingerprint(student)
    parameters = count_parameters(student)
    teacher_parameters = count_parameters(teacher) if teacher is not None else None
    rows = training_rows(settings, parts["train"], max_length)
    steps = total_steps(settings, rows, together)
    assert steps is not None
    for line in data_summary(parts["train"], settings.batch_size, "training"):
        announce(line)
    shape = f"{settings.student.n_layer}L/{settings.student.n_head}H/{settings.student.n_embd}E"
    if teacher_parameters is None:
        announce(f"no teacher; model {shape}: {parameters:,} parameters")
    else:
        announce(
            f"teacher {settings.teacher_model}: {teacher_parameters:,} parameters; student "
            f"{shape}: {parameters:,} ({parameters / teacher_parameters:.1%}, "
            f"{teacher_parameters / parameters:.1f} times smaller)"
        )
    announce(
        f"{steps:,} steps of {settings.batch_size * accumulation * processes.count()} rows "
        f"over {rows:,} rows, {precision} on {device.type}"
        + (f", {processes.count()} processes" if processes.count() > 1 else "")
    )
    checks = None
    if not skip_teacher_check and teacher is not None:
        checking = processes.alike if shard_teacher else processes.agreed
        checks = checking(
            lambda: check_teacher(teacher, tokenizer, parts["validation"], parts["train"])
        )
        announce(checks["summary"])
    caches = None
    if settings.cached_teacher:
        if teacher_cache is None:
            raise ValueError("this run reads a teacher cache: pass --teacher_cache DIR")
        caches = capture_parts(found, teacher_cache, announce)
        assert teacher is not None
        keep_head_alone(teacher)

    with (
        names_full_disk(output_dir, "make space and give the same command with --resume"),
        processes.first_holds(lambda: locked(output_dir)),
    ):
        standing = processes.agreed(lambda: claim_folder(output_dir, wanted, resume))
        if standing == "finished":  # by a process that held it while this one read its data
            return processes.agreed(lambda: finished_run(output_dir, announce))
        if processes.is_first():
            remove_unfinished(output_dir)
        record: dict[str, Any] = {
            "name": output_dir.name,
            "status": RUNNING,
            "settings": wanted,
            **provenance(),
            "device": describe_device(device),
            "processes": together,
            "precision": precision,
            "max_length": max_length,
            "teacher": None
            if teacher_parameters is None
            else {
                "name": settings.teacher_model,
                "parameters": teacher_parameters,
                "fingerprint": found.teacher_fingerprint,
                "checks": checks,
            },
            "student": {"parameters": parameters, "initial_fingerprint": initial},
            "compression": teacher_parameters and teacher_parameters / parameters,
            "data": {
                "source": settings.data,
                "train": describe_data(parts["train"]),
                "validation": describe_data(parts["validation"]),
            },
            "steps": steps,
        }
        if standing == "resume":
            before = read_run(output_dir)
            processes.agreed(lambda: require_same_inputs(output_dir, before, record))
            record["resumed"] = [*before.get("resumed", []), record["started"]]
        write_run(output_dir, record)
        arguments = build_arguments(
            replace(settings, gradient_accumulation_steps=accumulation),
            output_dir,
            steps,
            precision,
            device,
            report_to,
            workers,
            compile_model,
        )
        trainer = build_trainer(
            settings, parts, student, teacher, tokenizer, arguments, max_length, caches
        )
        tracking = Tracking(report_to, output_dir, record) if report_to != "none" else None
        if tracking is not None:
            tracking.watch(trainer)
        checkpoint = newest_valid(output_dir, announce) if standing == "resume" else None
        if standing == "resume":
            announce(f"going on from {checkpoint.name}" if checkpoint else "starting over")
        elif steps >= REHEARSED_FROM and not compile_model and arguments.world_size == 1:
            rehearsal = rehearse(trainer, steps)
            record["estimate"] = asdict(rehearsal)
            announce(rehearsal.line())
        started = time.monotonic()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = time.monotonic() - started
        final = last_evaluation(trainer) or trainer.evaluate()
        if settings.early_stopping is not None:
            history, last_step = trainer.state.log_history, trainer.state.global_step
            record["early_stopping"] = outcome(history, last_step, steps)
            final = dict(validation_standing(history).best)
            if final["step"] != last_step:
                trainer.load_weights(final["step"])
            announce(outcome_line(record["early_stopping"]))
        trainer.save_model(str(output_dir))
        record |= {
            "status": FINISHED,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "train_seconds": round(seconds, 1),
            "peak_memory_bytes": peak_memory(device),
            "final": {name: value for name, value in final.items() if name.startswith("eval_")},
        }
        record["student"]["fingerprint"] = model_fingerprint(student)
        write_run(output_dir, record)
        if tracking is not None and trainer.is_world_process_zero():
            tracking.conclude(record)
    announce(
        f"trained in {duration(seconds)}, peak memory {size(record['peak_memory_bytes'])}; "
        f"validation loss {final['eval_loss']:.4f}"
    )
    announce(f"student written to {output_dir}")
    return record


def finished_run(folder: Path, announce: Callable[[str], None]) -> dict[str, Any]:
    """Return the record of a run that is done.

    Raises:
        ValueError: its model is gone.
    """
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} holds this run, finished, but its weights are gone: train again in another "
            "--output_dir"
        )
    announce(f"{folder} holds this run, finished: nothing to do")
    return read_run(folder)


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


def dry_rehearsal(settings: TrainSettings, found: Ingredients) -> Rehearsal:
    """Measure a few batches of a run that is only planned; nothing of it is kept."""
    student = initial_student(settings, found.shape)
    steps = total_steps(settings, training_rows(settings, found.parts["train"], found.max_length))
    assert steps is not None
    with tempfile.TemporaryDirectory() as folder:
        arguments = build_arguments(
            settings, Path(folder), steps, found.precision, found.device, "none"
        )
        trainer = build_trainer(
            settings,
            found.parts,
            student,
            found.teacher,
            found.tokenizer,
            arguments,
            found.max_length,
        )
        return rehearse(trainer, steps)


def unheard(line: str) -> None:
    """Say nothing: what all processes would say alike is said by the first."""


def begun_on(folder: Path) -> int:
    """Return on how many processes an unfinished run was begun."""
    found = read_run(folder).get("processes", 1)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ValueError(f"{folder / RUN_FILE}: processes must be at least 1, got {found!r:.40}")
    return found


def batches_of_each(settings: TrainSettings, together: int) -> int:
    """Return the batches that each process adds up in a step of a run begun on ``together``.

    A step of a run has the same rows on however many processes it goes on.

    Raises:
        ValueError: they cannot be shared out equally.
    """
    all_batches = settings.gradient_accumulation_steps * together
    if all_batches % processes.count():
        raise ValueError(
            f"the run was begun on {together} processes and its steps have {all_batches} batches: "
            f"they cannot be shared by {processes.count()} processes"
        )
    return all_batches // processes.count()


def initial_student(settings: TrainSettings, teacher_config: Any) -> PreTrainedModel:
    """Return the student as it is before the first step, in float32 and train mode.

    A model of the student's shape in ``init_from`` is taken as it is, a larger one cut down.

    Raises:
        ValueError: ``init_from`` is not there, or smaller than the student somewhere.
    """
    wanted = student_config(settings.student, teacher_config)
    if settings.init_from is None:
        return build_student(wanted, settings.seed)
    model: Any = load_causal_lm(settings.init_from)
    if model.config.model_type != "gpt2":
        raise ValueError(f"--init_from {settings.init_from}: is no GPT-2")
    shape = ("n_layer", "n_head", "n_embd", "vocab_size")
    if any(getattr(model.config, name) != getattr(wanted, name) for name in shape):
        student = build_student(wanted, settings.seed)
        subclone(model, student)
        return student
    set_dropout(model, settings.student.dropout)
    return model.train()


def last_evaluation(trainer: DistillationTrainer) -> dict[str, float] | None:
    """Return the validation that was made after the last step, or None where none was."""
    for record in reversed(trainer.state.log_history):
        if "eval_loss" in record:
            return record if record["step"] == trainer.state.global_step else None
    return None


def describe_data(proteins: TokenisedProteins) -> dict[str, Any]:
    """Return what a set of proteins is, for the record."""
    return {
        "proteins": len(proteins),
        "residues": int(proteins.residues.sum(dtype=np.int64)),
        "tokens": int(proteins.lengths.sum(dtype=np.int64)),
        "fingerprint": proteins.fingerprint,
        "read": proteins.report.as_dict(),
    }

"""Puts a student and a Trainer together from settings and inputs."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from src.common.settings import DECAY_SHARE, TrainSettings, derived_steps
from src.distillation import DistillationTrainer
from src.models.initialisation import CALIBRATION_PROTEINS, cut
from src.models.loading import (
    build_student,
    load_causal_lm,
    random_like,
    set_dropout,
    student_config,
)
from src.models.lora import add_lora
from src.models.sharding import is_sharded
from src.models.teacher_cache import CachedCollator, TeacherCache
from src.proteins.batching import PackedDataset, PackingCollator, PaddingCollator, ProteinDataset
from src.proteins.tokens import TokenisedProteins
from src.trainer.callbacks import ConsoleProgress, MetricsFile
from src.trainer.early_stopping import EarlyStopping
from src.training.ingredients import Ingredients
from src.training.validation import (
    BATCH_FACTOR,
    MOST_EVALUATIONS,
    BatchCollator,
    BatchedDataset,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECKPOINTS_KEPT = 2


def initial_student(
    settings: TrainSettings, model_shape: Any, proteins: TokenisedProteins
) -> PreTrainedModel:
    """Return the student as it is before the first step, in float32 and train mode.

    A model of the student's shape in ``init_from`` is taken as it is; a larger one is cut down, by
    what it does on some training proteins. With ``lora_rank`` its weights are frozen and low-rank
    additions are trained. ``model_shape`` is the teacher's configuration, or vocabulary, positions
    and marker without one.

    Raises:
        ValueError: ``init_from`` is not there, or smaller than the student somewhere; or peft is
            wanted and missing.
    """
    student = _whole_student(settings, model_shape, proteins)
    if settings.lora_rank is not None:
        add_lora(student, settings.lora_rank, settings.seed)
    return student


def _whole_student(
    settings: TrainSettings, model_shape: Any, proteins: TokenisedProteins
) -> PreTrainedModel:
    if settings.student is None:
        if settings.init_from is not None:
            return load_causal_lm(settings.init_from).train()
        assert settings.tokenizer is not None
        return random_like(settings.tokenizer, settings.seed).train()
    wanted = student_config(settings.student, model_shape)
    if settings.init_from is None:
        return build_student(wanted, settings.seed)
    model: Any = load_causal_lm(settings.init_from)
    if model.config.model_type != "gpt2":
        raise ValueError(f"--init_from {settings.init_from}: is no GPT-2")
    shape = ("n_layer", "n_head", "n_embd", "vocab_size")
    if any(getattr(model.config, name) != getattr(wanted, name) for name in shape):
        student = build_student(wanted, settings.seed)
        order = np.random.default_rng(settings.seed).permutation(len(proteins))
        cut(model, student, [proteins[int(i)] for i in order[:CALIBRATION_PROTEINS]])
        return student
    set_dropout(model, settings.student.dropout)
    return model.train()


def build_arguments(
    settings: TrainSettings,
    output_dir: Path,
    steps: int,
    precision: str,
    device: torch.device,
    report_to: str,
    workers: int = 0,
    compile_model: bool = False,
    evaluations: int = MOST_EVALUATIONS,
) -> TrainingArguments:
    """Return the Trainer's arguments for our settings.

    The validation data's items are whole batches (:class:`BatchedDataset`), hence its batch size.
    """
    derived = derived_steps(settings, steps, evaluations)
    # A launcher's own choice, in the environment, would otherwise win over fp32.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no" if precision == "fp32" else precision
    return TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=1,
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
    inputs: Ingredients,
    student: PreTrainedModel,
    arguments: TrainingArguments,
    caches: dict[str, TeacherCache] | None = None,
) -> DistillationTrainer:
    """Return a Trainer with data, models, loss, and our own progress and log."""
    callbacks = [MetricsFile(Path(str(arguments.output_dir))), ConsoleProgress()]
    if settings.early_stopping is not None:
        callbacks.append(EarlyStopping(settings.early_stopping))
    teacher = inputs.teacher
    if teacher is not None and settings.loss.alpha == 1.0:
        if not is_sharded(teacher):
            teacher.cpu()  # no step asks it: the device is the model's
        teacher = None
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        **asdict(settings.loss),
        loss_impl=settings.loss_impl,
        skip_loss_spikes=settings.skip_loss_spikes,
        optimizer=settings.optimizer,
        other_learning_rate=settings.other_learning_rate,
        args=arguments,
        processing_class=inputs.tokenizer,
        callbacks=callbacks,
        **build_data(settings, inputs, caches),
    )
    remove_default_output(trainer)
    return trainer


def build_data(
    settings: TrainSettings, inputs: Ingredients, caches: dict[str, TeacherCache] | None = None
) -> dict[str, Any]:
    """Return the datasets and the collator of a Trainer."""
    packed = settings.batching == "packed"
    max_length, pad = inputs.max_length, int(inputs.tokenizer.pad_token_id)

    def dataset(name: str) -> ProteinDataset | PackedDataset:
        proteins: TokenisedProteins = inputs.parts[name]
        cache = caches[name] if caches else None
        if packed:
            return PackedDataset(proteins, max_length, settings.data_seed, cache)
        return ProteinDataset(proteins, settings.batching == "bucketed", cache)

    def widths(data: ProteinDataset | PackedDataset) -> np.ndarray:
        return np.full(len(data), max_length) if packed else data.lengths

    train, validation = dataset("train"), dataset("validation")
    batch_tokens = BATCH_FACTOR * settings.batch_size * int(widths(train).max())
    collator: Any = PackingCollator(pad, max_length) if packed else PaddingCollator(pad)
    return {
        "train_dataset": train,
        "eval_dataset": BatchedDataset(validation, widths(validation), batch_tokens),
        "data_collator": BatchCollator(CachedCollator(collator) if caches else collator),
    }


def remove_default_output(trainer: Trainer) -> None:
    """Remove the Trainer's own printing and progress bar, which ours replace."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)

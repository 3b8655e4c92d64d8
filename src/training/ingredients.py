"""What a run starts from: the teacher, the tokenizer and the tokenised proteins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from src.common import processes
from src.common.cli import say
from src.common.devices import DTYPES, choose_device, choose_precision
from src.common.settings import TrainSettings
from src.models.forward import require_packing
from src.models.inspection import count_parameters
from src.models.loading import (
    load_causal_lm,
    load_tokenizer,
    max_positions,
    model_fingerprint,
    student_positions,
)
from src.models.recognition import settle_layout
from src.models.sharding import load_sharded
from src.models.sizes import total_steps
from src.models.teacher_cache import TeacherCache, capture
from src.proteins.batching import PackedDataset
from src.proteins.hashes import held_out
from src.proteins.layouts import layout_of, set_layout
from src.proteins.locations import on_hub
from src.proteins.sources import has_split
from src.proteins.tokens import TokenisedProteins, tokenise
from src.training.validation import ValidationPlan, plan_validation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HELD_OUT_SHARE = 0.02
"""Share of the proteins set aside for validation where the source has no validation part."""
DECIDING_SHARE = 0.1
"""The same with early stopping, which needs more proteins to decide by more than chance."""


@dataclass
class Ingredients:
    """What all students of one run or one group share.

    Attributes:
        teacher: None for a run without a teacher.
        teacher_fingerprint: of the teacher's weights.
        tokenizer: the teacher's, or the one that the settings name.
        parts: the proteins ``train`` and ``validation``.
        device: where the models are run.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        max_length: the longest input in tokens.
    """

    teacher: PreTrainedModel | None
    teacher_fingerprint: str | None
    tokenizer: Any
    parts: dict[str, TokenisedProteins]
    device: torch.device
    precision: str
    max_length: int

    @property
    def model_shape(self) -> Any:
        """The configuration that decides a student's vocabulary, positions and marker."""
        if self.teacher is not None:
            config = self.teacher.config
            return SimpleNamespace(
                vocab_size=config.vocab_size,
                n_positions=student_positions(config, self.max_length),
                bos_token_id=config.bos_token_id,
                eos_token_id=config.eos_token_id,
            )
        return shape_without_teacher(self.tokenizer, self.max_length)

    @property
    def teacher_parameters(self) -> int:
        """Parameters of the teacher; 0 without one."""
        return 0 if self.teacher is None else count_parameters(self.teacher)


def shape_without_teacher(tokenizer: Any, max_length: int) -> Any:
    """Return vocabulary, positions and marker of a model that is trained without a teacher."""
    return SimpleNamespace(
        vocab_size=len(tokenizer),
        n_positions=max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def gather(
    settings: TrainSettings,
    device_name: str = "auto",
    cache_dir: str | None = None,
    shard_teacher: bool = False,
) -> Ingredients:
    """Load the teacher in the run's precision, and tokenise the proteins.

    ``shard_teacher`` spreads the teacher over the processes (:mod:`src.models.sharding`).

    Raises:
        ValueError: the teacher, the tokenizer, the data or the device is missing or unusable.
    """
    device = choose_device(device_name)
    precision = choose_precision(settings.precision, device)
    teacher = fingerprint = None
    max_length = settings.max_length
    if settings.teacher_model is None:
        assert settings.tokenizer is not None
        tokenizer = load_tokenizer(settings.tokenizer, layout=settings.layout)
        set_layout(tokenizer, layout_of(tokenizer))
    else:
        tokenizer = load_tokenizer(settings.teacher_model, layout=settings.layout)
        teacher, fingerprint = load_teacher(
            settings.teacher_model, precision, device, shard_teacher
        )
        max_length = max_positions(teacher.config, max_length)
        settle_layout(teacher, tokenizer, processes.say)
        if settings.batching == "packed" and not settings.cached_teacher:
            require_packing(teacher)
    parts = load_parts(settings, tokenizer, max_length, cache_dir)
    return Ingredients(teacher, fingerprint, tokenizer, parts, device, precision, max_length)


def load_teacher(
    name: str, precision: str, device: torch.device, sharded: bool = False
) -> tuple[PreTrainedModel, str]:
    """Load a teacher in a run's precision; return it with its fingerprint."""

    def load(place: torch.device) -> tuple[PreTrainedModel, str]:
        teacher = load_causal_lm(name, DTYPES[precision], place)
        return teacher, model_fingerprint(teacher)

    return load_sharded(lambda: load(torch.device("cpu")), device) if sharded else load(device)


def load_parts(
    settings: TrainSettings,
    tokenizer: Any,
    max_length: int,
    cache_dir: str | None = None,
) -> dict[str, TokenisedProteins]:
    """Return the tokenised training and validation proteins.

    Validation proteins are the source's own validation part where it has one. Otherwise a hash of
    the sequence sets a share of the proteins aside, at most ``validation_proteins``. Early stopping
    sets more aside, among them the same ones.

    Raises:
        ValueError: the source is missing or broken, or nothing is left to train on.
    """
    options: dict[str, Any] = {
        "cache_dir": cache_dir,
        "sequence_column": settings.sequence_column,
    }
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
        if on_hub(settings.data):  # the part may have millions
            options["max_proteins"] = settings.validation_proteins
        validation = tokenise(settings.data, "validation", tokenizer, max_length, **options)
    else:
        share = HELD_OUT_SHARE if settings.early_stopping is None else DECIDING_SHARE
        aside = held_out(train.hashes, share, settings.data_seed + 1, settings.validation_proteins)
        validation = train.subset(np.flatnonzero(aside))
        train = train.subset(np.flatnonzero(~aside))
    validation = validation.subset(np.arange(min(len(validation), settings.validation_proteins)))
    if not len(train) or not len(validation):
        more = f"raise --train_size_prop (now {settings.train_size_prop}) or "
        raise ValueError(
            f"--data {settings.data}: {len(train)} training and {len(validation)} validation "
            f"proteins are left, of which each needs one: "
            f"{more if settings.train_size_prop < 1 else ''}give more proteins"
        )
    return {"train": train, "validation": validation}


def training_rows(settings: TrainSettings, train: TokenisedProteins, max_length: int) -> int:
    """Return the rows of an epoch: proteins, or packed rows."""
    if settings.batching == "packed":
        return len(PackedDataset(train, max_length, settings.data_seed))
    return len(train)


def planned(
    settings: TrainSettings,
    inputs: Ingredients,
    parameters: int,
    processes_of_run: int = 1,
    rows_per_step: int | None = None,
) -> tuple[int, int, ValidationPlan]:
    """Return the steps of a run, the rows of its epoch, and its plan of validation.

    ``parameters`` are those of all students; a step's rows are those of all processes.
    """
    rows = training_rows(settings, inputs.parts["train"], inputs.max_length)
    steps = total_steps(settings, rows, processes_of_run)
    assert steps is not None
    rows_per_step = rows_per_step or settings.batch_size * settings.gradient_accumulation_steps
    plan = plan_validation(
        settings,
        inputs.parts,
        inputs.max_length,
        parameters,
        inputs.teacher_parameters,
        steps,
        rows_per_step,
    )
    return steps, rows, plan


def capture_parts(
    inputs: Ingredients,
    directory: str | Path,
    announce: Callable[[str], None] = say,
    **options: Any,
) -> dict[str, TeacherCache]:
    """Return the teacher's cache for each part, captured where it is not there yet.

    Options are those of :func:`src.models.teacher_cache.capture`.
    """
    assert inputs.teacher is not None
    fingerprint = inputs.teacher_fingerprint
    return {
        name: capture(
            inputs.teacher,
            proteins,
            directory,
            announce=announce,
            fingerprint=fingerprint,
            **options,
        )
        for name, proteins in inputs.parts.items()
    }


def describe_data(proteins: TokenisedProteins) -> dict[str, Any]:
    """Return size and fingerprint of a set of proteins, for a run's record."""
    return {
        "proteins": len(proteins),
        "residues": int(proteins.residues.sum(dtype=np.int64)),
        "tokens": int(proteins.lengths.sum(dtype=np.int64)),
        "fingerprint": proteins.fingerprint,
        "read": proteins.report.as_dict(),
    }

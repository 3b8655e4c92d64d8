"""Trains a student with TRL's GKD trainer, for comparison (Agarwal et al., arXiv:2306.13649).

Everything is as TRL has it by default but for the learning rate, the number of steps and the
precision: batches of 8, β = 0.5, temperature 0.9, half of the batches sampled from the student, 128
tokens each. The student starts from the weights that our own recipes start from.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from src.common.runs import provenance
from src.common.settings import TrainSettings
from src.models.inspection import count_parameters
from src.models.loading import ProteinModel
from src.proteins.batching import IGNORED_LABEL, PaddingCollator, padded
from src.proteins.tokens import TokenisedProteins
from src.training.assembly import initial_student
from src.training.ingredients import describe_data


class PromptCollator:
    """Pads a batch as GKD wants it: proteins beside their prompts, which is the start alone.

    Args:
        pad_token_id: id at padding.
        prompt_tokens: leading tokens that are given, not generated.
    """

    def __init__(self, pad_token_id: int, prompt_tokens: int) -> None:
        self.pad, self.prompt_tokens = PaddingCollator(pad_token_id), prompt_tokens

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the batch of some rows with ``input_ids``."""
        batch = self.pad(rows)
        batch["labels"][:, : self.prompt_tokens] = IGNORED_LABEL
        starts = [row["input_ids"][: self.prompt_tokens] for row in rows]
        batch["prompts"], batch["prompt_attention_mask"] = padded(starts, self.pad.pad_token_id)
        return batch


def train_with_gkd(
    settings: TrainSettings,
    teacher: ProteinModel,
    proteins: TokenisedProteins,
    folder: Path,
    callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Train a student and return what :func:`src.training.stages.train` records of one.

    Args:
        settings: student, start, seed, learning rate, steps and batch size are taken from them.
        teacher: loaded.
        proteins: to train on.
        folder: of TRL's files.
        callbacks: of the trainer.

    Raises:
        ValueError: TRL is not installed.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        from trl.experimental.gkd import GKDConfig, GKDTrainer  # type: ignore[import]
    except ImportError:
        raise ValueError("trl is not installed: pip install trl") from None
    from datasets import Dataset

    tokenizer: Any = teacher.tokenizer
    student = initial_student(settings, teacher.model.config, proteins)
    record = {
        **provenance(),
        "settings": {"batch_size": settings.batch_size, "learning_rate": settings.learning_rate},
        "student": {"parameters": count_parameters(student)},
        "teacher": {"parameters": count_parameters(teacher.model)},
        "data": {"train": describe_data(proteins)},
        "device": "cpu",
    }
    random.seed(settings.seed)  # GKD draws from it which batches are sampled
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher.model,
        args=GKDConfig(
            output_dir=str(folder),
            max_steps=settings.max_steps or -1,
            learning_rate=settings.learning_rate,
            per_device_train_batch_size=settings.batch_size,
            seed=settings.seed,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=max(1, (settings.max_steps or 1) // 50),
            report_to=[],
            disable_tqdm=True,
        ),
        data_collator=PromptCollator(tokenizer.pad_token_id, 1),
        train_dataset=Dataset.from_dict({"input_ids": [ids.tolist() for ids in proteins]}),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.train()
    trainer.save_model(str(folder))
    return record

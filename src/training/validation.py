"""How often a run is validated, and in which batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from src.common.settings import TrainSettings
from src.evaluation.scoring import length_batches
from src.proteins.tokens import TokenisedProteins

SHARE_OF_TIME = 0.05
"""Largest share of a run's time that validation takes by default."""
MOST_EVALUATIONS = 10
BATCH_FACTOR = 2
"""A validation batch has this many times the tokens of the largest training batch: without a
backward pass, fewer activations are kept."""


@dataclass(frozen=True)
class ValidationPlan:
    """How many validations a run has, and what they cost.

    Attributes:
        evaluations: the number of validations.
        cost: the estimated time of one validation, divided by that of all training steps.
    """

    evaluations: int
    cost: float

    @property
    def share(self) -> float:
        """The estimated share of the run's time that is spent on validation."""
        spent = self.evaluations * self.cost
        return spent / (1 + spent)


def plan_validation(
    settings: TrainSettings,
    parts: dict[str, TokenisedProteins],
    max_length: int,
    student_parameters: int,
    teacher_parameters: int,
    steps: int,
    rows_per_step: int,
) -> ValidationPlan:
    """Return how often a run is validated by default: in at most 5 % of its time, 1 to 10 times.

    A token costs one unit for each parameter that it passes forwards, and two for each that it
    passes backwards: 3 S + T in training and S + T in validation, for S parameters of all students
    that are trained together and T of the teacher. T counts as 0 where the teacher is not run. The
    plan follows from the settings and the data alone, so a resumed run has the same one. Early
    stopping needs many validations and always has ten. Packed rows have ``max_length`` tokens; a
    step has ``rows_per_step`` proteins or packed rows over all processes.
    """
    packed = settings.batching == "packed"
    tokens_per_row = max_length if packed else float(np.mean(parts["train"].lengths))
    trained = steps * rows_per_step * tokens_per_row
    validated = float(np.sum(parts["validation"].lengths))
    teacher_is_run = settings.loss.alpha < 1 and not settings.cached_teacher
    teacher = teacher_parameters if teacher_is_run else 0
    cost = validated * (student_parameters + teacher)
    cost /= trained * (3 * student_parameters + teacher)
    if settings.eval_steps is not None:
        return ValidationPlan(-(-steps // settings.eval_steps), cost)
    affordable = int(SHARE_OF_TIME / (1 - SHARE_OF_TIME) / cost)
    if settings.early_stopping is not None:
        affordable = MOST_EVALUATIONS
    return ValidationPlan(min(max(affordable, 1), MOST_EVALUATIONS), cost)


class BatchedDataset(Dataset):
    """A dataset whose items are whole batches of rows of similar length.

    A loader of batch size 1 yields them, through :class:`BatchCollator`.

    Args:
        rows: the dataset of single rows, with their ``lengths``.
        widths: ``(rows,)`` the padded length of each row.
        batch_tokens: largest number of tokens in a batch, with padding.
    """

    def __init__(self, rows: Any, widths: np.ndarray, batch_tokens: int) -> None:
        self.rows = rows
        self.batches = length_batches(widths, len(widths), batch_tokens)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self.rows[int(row)] for row in self.batches[int(index)]]


class BatchCollator:
    """Collates single rows, or the rows of one item of :class:`BatchedDataset`."""

    def __init__(self, collate: Callable[[Sequence[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[Any]) -> Any:
        """Return the batch."""
        return self.collate(items[0] if isinstance(items[0], list) else items)

"""Stops a training whose validation loss improves no more, and finds its best step.

The count of validations is read from the log, which each checkpoint holds, so an interrupted run
stops where an undisturbed one does. (The Trainer's own ``EarlyStoppingCallback`` keeps the count in
itself, and loses it on resuming.) The best step is kept in the Trainer's state, where pruning reads
it (:mod:`src.trainer.checkpoints`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

WATCHED = "eval_loss"


@dataclass(frozen=True)
class Standing:
    """A run's best validation record, and how many validations came after it."""

    best: Mapping[str, Any]
    since_best: int

    @property
    def best_step(self) -> int:
        """The optimiser steps after which the validation loss was lowest."""
        return int(self.best["step"])


def validation_standing(history: Iterable[Mapping[str, Any]]) -> Standing:
    """Return the best validation of a log, the first of equal ones, and how many came after it.

    Records come oldest first; those without a validation are skipped.

    Raises:
        ValueError: nothing was validated.
    """
    records = [record for record in history if WATCHED in record]
    if not records:
        raise ValueError("the log holds no validation")
    first = min(range(len(records)), key=lambda index: records[index][WATCHED])
    return Standing(records[first], len(records) - 1 - first)


class EarlyStopping(TrainerCallback):
    """Saves at each new best validation; stops after ``patience`` validations without one."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save or stop, as the validation that was just logged requires."""
        now = validation_standing(state.log_history)
        state.best_global_step = now.best_step
        state.best_metric = now.best[WATCHED]
        if now.since_best == 0:
            control.should_save = True
        if now.since_best >= self.patience:
            control.should_training_stop = True


def outcome(history: Iterable[Mapping[str, Any]], last_step: int, planned: int) -> dict[str, Any]:
    """Return the best step, the last step, and why it was the last, for a finished run's record."""
    now = validation_standing(history)
    return {
        "best_step": now.best_step,
        "best_eval_loss": now.best[WATCHED],
        "last_step": last_step,
        "reason": "all steps done" if last_step >= planned else "no improvement",
    }


def outcome_line(result: Mapping[str, Any]) -> str:
    """Return an outcome as a line for a person."""
    return (
        f"stopped after step {result['last_step']:,}: {result['reason']}; the weights are those of "
        f"step {result['best_step']:,}, where the validation loss was lowest"
    )

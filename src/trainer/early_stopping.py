"""Stops a training whose validation loss improves no more, and finds its best step.

The Trainer's own ``EarlyStoppingCallback`` counts evaluations in itself. A resumed run would begin
to count anew, or restore with the count every flag of the loop; and it asks that every evaluation
be saved. Here everything is read from the log, which each checkpoint holds: an interrupted run
stops where an undisturbed one does. The best step is noted in the Trainer's state, where pruning
finds it (:mod:`src.trainer.checkpoints`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

WATCHED = "eval_loss"


@dataclass(frozen=True)
class Standing:
    """How a run's validation stands: its best record, and how many came after it."""

    best: Mapping[str, Any]
    since_best: int

    @property
    def best_step(self) -> int:
        """The optimiser steps after which the validation loss was lowest."""
        return int(self.best["step"])


def validation_standing(history: Iterable[Mapping[str, Any]]) -> Standing:
    """Return the standing of a log; of equal losses the first counts.

    Args:
        history: records of the log, oldest first; those without a validation are passed over.

    Raises:
        ValueError: nothing was validated.
    """
    records = [record for record in history if WATCHED in record]
    if not records:
        raise ValueError("the log holds no validation")
    first = min(range(len(records)), key=lambda index: records[index][WATCHED])
    return Standing(records[first], len(records) - 1 - first)


class EarlyStopping(TrainerCallback):
    """Saves at each new best validation, and ends training after ``patience`` without one."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge the validation that was just logged."""
        now = validation_standing(state.log_history)
        state.best_global_step = now.best_step
        state.best_metric = now.best[WATCHED]
        if now.since_best == 0:
            control.should_save = True
        if now.since_best >= self.patience:
            control.should_training_stop = True


def outcome(history: Iterable[Mapping[str, Any]], last_step: int, planned: int) -> dict[str, Any]:
    """Return what a finished run's record says: the best step, the last, and why it was the last.

    Args:
        history: records of the whole log.
        last_step: steps that were made.
        planned: steps that there would have been.
    """
    now = validation_standing(history)
    return {
        "best_step": now.best_step,
        "best_eval_loss": now.best[WATCHED],
        "last_step": last_step,
        "reason": "all steps done" if last_step >= planned else "no improvement",
    }


def outcome_line(found: Mapping[str, Any]) -> str:
    """Return an outcome for a person."""
    return (
        f"stopped after step {found['last_step']:,}: {found['reason']}; the weights are those of "
        f"step {found['best_step']:,}, where the validation loss was lowest"
    )

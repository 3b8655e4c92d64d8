"""Estimates what a training takes from its first steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from src.common.cli import duration, size
from src.common.devices import peak_memory

SHORTEST_RUN = 50
"""Steps: a shorter run is over before an estimate helps."""
WARM_UP_STEPS = 3
TIMED_STEPS = 7


@dataclass(frozen=True)
class Timing:
    """What the first steps of a training took.

    Attributes:
        step_seconds: of one step, after the warm-up.
        seconds_left: of the steps that remain, with their share of the validations.
        peak_memory: bytes so far: of the GPU, or of the whole process on a CPU.
        steps: how many were timed.
    """

    step_seconds: float
    seconds_left: float
    peak_memory: int
    steps: int

    def line(self) -> str:
        """Return the estimate for a person."""
        steps = f"{self.steps} step{'s' if self.steps > 1 else ''}"
        return (
            f"about {duration(self.seconds_left)} left ({self.step_seconds:.2g} s a step, "
            f"measured on {steps}), peak memory {size(self.peak_memory)}"
        )


class StepTimer(TrainerCallback):
    """Times the first steps of a training and reports once, without any effect on it.

    Args:
        report: called with the :class:`Timing`.
        device: whose memory is reported.
        planned_steps: steps of the whole run.
        validation_share: estimated share of the run's time that is spent on validation.
        limit: for a training that is only a measurement: report at its last step, and end it at
            the first step after so many seconds.
    """

    def __init__(
        self,
        report: Callable[[Timing], None],
        device: torch.device,
        planned_steps: int,
        validation_share: float,
        limit: float | None = None,
    ) -> None:
        self.report, self.device, self.limit = report, device, limit
        self.planned_steps, self.validation_share = planned_steps, validation_share

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.began = self.since = time.monotonic()
        self.first = self.timed_from = state.global_step
        self.done = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restart the clock after the warm-up; report when enough steps were timed."""
        now, step = time.monotonic(), state.global_step
        over = self.limit is not None and (now - self.began > self.limit or step == state.max_steps)
        if self.done:
            return
        if over or step == self.first + WARM_UP_STEPS + TIMED_STEPS:
            self.done = True
            timed = step - self.timed_from
            seconds = (now - self.since) / timed
            left = (self.planned_steps - (0 if over else step)) * seconds
            left /= 1 - self.validation_share
            self.report(Timing(seconds, left, peak_memory(self.device), timed))
            if over:
                control.should_training_stop = True
        elif step == self.first + WARM_UP_STEPS:
            self.since, self.timed_from = now, step


def print_beside_bar(announce: Callable[[str], None], line: str) -> None:
    """Print a line without breaking a progress bar that is shown."""
    with tqdm.external_write_mode():
        announce(line)


@contextmanager
def explain_lack_of_memory(batch_size: int) -> Iterator[None]:
    """Turn a device's lack of memory into a message for a person."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise ValueError(
            f"a batch of {batch_size} rows does not fit the device's memory: lower --batch_size "
            "and raise --gradient_accumulation_steps as much; docs/TROUBLESHOOTING.md has more"
        ) from None

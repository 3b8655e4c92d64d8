"""What is summed between two records of the log: the parts of the losses, and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from src.loss.divergences import wide
from src.loss.reference import LossParts


class LossSums:
    """Sums of loss parts ``(students, 6)``, kept on the device so that adding never waits for it.

    Losses are added as they are; means are multiplied by their positions, which come last.
    """

    NAMES = ("hard_loss", "soft_loss", "mean_weight", "mean_epsilon", "teacher_entropy")

    def __init__(self, students: int = 1) -> None:
        self.values = torch.zeros(students, len(self.NAMES) + 1, dtype=torch.float64)

    def add(self, parts: Sequence[LossParts]) -> None:
        """Add one batch: the loss parts of each student."""
        rows = []
        for part in parts:
            positions = wide(part.positions)
            losses = torch.stack([wide(part.hard), wide(part.soft)])
            means = torch.stack([part.mean_weight, part.mean_epsilon, part.teacher_entropy])
            rows.append(torch.cat([losses, wide(means) * positions, positions.reshape(1)]))
        new = torch.stack(rows)
        self.values = self.values.to(new) + new

    @classmethod
    def means(cls, values: Tensor, steps: int | None = None) -> list[dict[str, float]]:
        """Return each student's named means.

        Args:
            values: sums ``(students, 6)``, perhaps over several processes.
            steps: optimiser steps, if each loss was divided by its step's number of positions;
                None if the losses are sums over positions.
        """
        records = []
        for row in values.tolist():
            positions = max(row[-1], 1.0)
            losses = [value / (steps or positions) for value in row[:2]]
            means = [value / positions for value in row[2:-1]]
            records.append(dict(zip(cls.NAMES, losses + means, strict=True)))
        return records


class LogInterval:
    """The sums since the last record of the log, and the time they took by ``clock``, in seconds.

    The clock starts before the first batch is fetched and stands still in :meth:`paused`, so that
    all of a step's work and nothing else counts. ``students`` are trained together.
    """

    def __init__(self, students: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self.students, self.clock = students, clock
        self.restart()

    def restart(self) -> None:
        """Forget all sums; the clock starts with the next fetch."""
        self.sums = LossSums(self.students)
        self.started, self.first_step, self.since, self.waited = False, 0, 0.0, 0.0

    @contextmanager
    def fetching(self, step: int) -> Iterator[None]:
        """Count the time of the body, which fetches the batches of the step after ``step``."""
        began = self.clock()
        if not self.started:
            self.started, self.first_step, self.since = True, step, began
        yield
        self.waited += self.clock() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the body, a validation or a checkpoint, out of the time."""
        began = self.clock()
        try:
            yield
        finally:
            self.since += self.clock() - began

    def rates(self, positions: float) -> dict[str, float]:
        """Return the positions per second, and the share of time spent waiting for batches."""
        seconds = max(self.clock() - self.since, 1e-9)
        return {
            "tokens_per_second": round(positions / seconds, 1),
            "data_wait_share": round(min(self.waited / seconds, 1.0), 4),
        }

    def state(self) -> dict[str, Any]:
        """Return the JSON values of a checkpoint; the sums are kept apart."""
        seconds = self.clock() - self.since if self.started else 0.0
        values = {"started": self.started, "first_step": self.first_step}
        return {**values, "seconds": seconds, "waited": self.waited}

    def restore(self, sums: Tensor, state: Mapping[str, Any]) -> None:
        """Set the sums and what :meth:`state` returned."""
        self.sums.values = sums.clone()
        self.started, self.first_step = state["started"], state["first_step"]
        self.since, self.waited = self.clock() - state["seconds"], state["waited"]

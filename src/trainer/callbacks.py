"""Callbacks that report a run: the file of metrics, and the lines or the bar that a person sees."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from src.common.cli import duration, say
from src.common.files import atomic_write, is_number, read_json_lines

METRICS_FILE = "metrics.jsonl"
LOSSES = ("loss", "hard_loss", "soft_loss")
DRAWN = (*LOSSES, *(f"eval_{name}" for name in LOSSES), "tokens_per_second")
"""Values of a record that are plotted after a run."""
LARGEST = 1e100
"""The largest value that is plotted: axes of larger ones overflow."""


class MetricsFile(TrainerCallback):
    """Appends every record of the Trainer to ``metrics.jsonl``, one JSON object a line.

    A resumed run first rewrites the file from the records in its checkpoint, so no record is lost,
    doubled or half-written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_FILE

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the records up to the step from which training goes on."""
        if state.is_world_process_zero and (self.path.exists() or state.log_history):
            with atomic_write(self.path) as handle:
                handle.writelines(map(_line, state.log_history))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Append one record."""
        if logs and state.is_world_process_zero:
            with self.path.open("a") as handle:
                handle.write(_line({"step": state.global_step, **logs}))


def _line(record: dict[str, Any]) -> str:
    """Return a record as a line of the file, with the step first."""
    return json.dumps({"step": record["step"], **record}) + "\n"


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Return a run's records, oldest first, without a half-written last line.

    Raises:
        ValueError: as in :func:`src.common.files.read_json_lines`, or a value is no number.
    """
    path = Path(folder) / METRICS_FILE
    if not path.exists():
        return []
    records = read_json_lines(path)
    for number, record in enumerate(records, start=1):
        for name in ("step", *DRAWN):
            value = record.get(name)
            # None: a run that diverged logs a loss that is not finite.
            missing = value is None and name != "step"
            if not missing and not (is_number(value) and not LARGEST < abs(value) < math.inf):
                raise ValueError(
                    f"{path}: line {number}: {name} is no number to draw ({value!r:.40}): move "
                    "the file away"
                )
    return records


class ConsoleProgress(TrainerCallback):
    """Shows progress: a bar on a terminal, else a line for each record."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.started = 0.0
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self.started = time.monotonic()
        self.first_step = state.global_step
        if state.is_world_process_zero and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the newest record."""
        if not logs or not state.is_world_process_zero:
            return
        if self.bar is not None and "loss" in logs:
            self.bar.set_postfix(
                {"loss": f"{logs['loss']:.3f}", "tok/s": f"{logs.get('tokens_per_second', 0):,.0f}"}
            )
        line = self._line(state, logs)
        if line and self.bar is None:
            say(line)
        elif self.bar is not None and "eval_loss" in logs:
            self.bar.write(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _line(self, state: Any, logs: dict[str, Any]) -> str:
        where = f"step {state.global_step:,}/{state.max_steps:,}"
        if "eval_loss" in logs:
            return f"{where}  validation loss {_losses(logs, 'eval_')}"
        if "loss" not in logs:
            return ""
        done = state.global_step - self.first_step
        left = (time.monotonic() - self.started) / max(done, 1)
        left *= max(state.max_steps - state.global_step, 0)
        return (
            f"{where}  loss {_losses(logs)}  lr {logs.get('learning_rate', 0):.1e}  "
            f"{logs.get('tokens_per_second', 0):,.0f} tokens/s  {duration(left)} left"
        )


def _losses(logs: dict[str, Any], prefix: str = "") -> str:
    """Return a loss for a person, with its two parts where there is a soft one."""
    loss, soft = logs[f"{prefix}loss"], logs.get(f"{prefix}soft_loss", 0)
    if not soft:
        return f"{loss:.4f}"
    return f"{loss:.4f} (hard {logs[f'{prefix}hard_loss']:.4f}, soft {soft:.4f})"

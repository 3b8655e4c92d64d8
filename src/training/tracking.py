"""Reports a run's settings and outcome to W&B or TensorBoard, beside the Trainer's metrics.

The Trainer's own callbacks log the metrics, from which the trackers draw the curves. A tracker's
package is imported where a run uses it. W&B gets no name of this machine, its user or its
directories.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback

from src.common.cli import one_line
from src.common.files import write_text
from src.common.privacy import publishable

WANDB_PROJECT = "PROTGPT2_DISTILLATION"
WANDB_RUN_FILE = "wandb_run.txt"
"""In a run's directory: the identifier of its W&B run, which a resumed training goes on with."""
LONGEST_ID = 128
TENSORBOARD_FOLDER = "tensorboard"
DESCRIBED = ("settings", "teacher", "student", "compression", "data", "steps", "versions", "git")
"""Parts of a run's record that are known at its beginning: the configuration."""
OUTCOME = ("train_seconds", "peak_memory_bytes", "compression", "early_stopping", "final")
"""Parts of a run's record that are known at its end."""
WANDB_LEAVES_OUT = {
    "host": "",
    "username": "",
    "console": "off",
    "save_code": False,
    "disable_code": True,
    "disable_git": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
}
"""Settings that keep W&B from recording host, user, program, command, packages, repository and
printed lines. An empty name stops it from asking the system for one."""


def flat(record: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return parts of a record as one level, ``settings/loss/alpha``, without what is None."""
    values: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{prefix}/{key}", inner)
        elif value is not None and not isinstance(value, list | tuple):
            values[prefix] = value

    for name in names:
        add(name, publishable(record.get(name)))
    return values


def require_tracker(tracker: str) -> None:
    """Check that a tracker is installed. Raises ``ValueError`` where it is not."""
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise ValueError(f"--report_to {tracker}: it is not installed: pip install {tracker}")


def open_tracker(tracker: str, folder: Path) -> None:
    """Open W&B's run, named like the folder, before anything that takes long.

    A run that is resumed goes on as the same run of W&B, whose identifier the folder keeps; offline
    both parts have it, and ``wandb sync`` joins them. The Trainer's callback, which starts later,
    uses the run that is open. TensorBoard has nothing to open.

    Raises:
        ValueError: there is no key, or W&B cannot be reached.
    """
    if tracker != "wandb":
        return
    import wandb

    # The Trainer's callback reads the same variable.
    project = os.environ.setdefault("WANDB_PROJECT", WANDB_PROJECT)
    try:
        settings = wandb.Settings(**WANDB_LEAVES_OUT)
        wandb.init(
            project=project,
            name=folder.name,
            settings=settings,
            id=kept_run_id(folder),
            resume="allow",
        )
    except wandb.Error as error:
        raise ValueError(
            f"--report_to wandb: {one_line(error)} WANDB_MODE=offline keeps the run on this machine"
        ) from error


def kept_run_id(folder: Path) -> str | None:
    """Return the identifier of the W&B run that a directory belongs to, None where it has none."""
    path = folder / WANDB_RUN_FILE
    if not path.is_file():
        return None
    kept = path.read_text(encoding="utf-8", errors="replace").strip()
    return kept if kept.isprintable() and 0 < len(kept) <= LONGEST_ID else None


class Wandb(WandbCallback):
    """The Trainer's callback for W&B, without the directories of this machine."""

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        """Report the Trainer's arguments and the student's configuration without private paths."""
        known = publishable({**model.config.to_dict(), **args.to_dict()})
        cleaned = copy.copy(args)
        # The callback merges these over the model's configuration, which holds paths of its own.
        cleaned.to_dict = lambda: known
        super().setup(cleaned, state, model, **kwargs)


class Tracking(TrainerCallback):
    """Reports a run's configuration to a tracker at its beginning and the outcome at its end.

    The tracker is ``wandb`` or ``tensorboard``; its run is named like the run's folder.
    """

    def __init__(self, tracker: str, folder: Path, record: Mapping[str, Any]) -> None:
        self.tracker, self.folder, self.record = tracker, folder, record

    def watch(self, trainer: Trainer) -> None:
        """Follow a trainer that reports to this tracker."""
        callbacks = trainer.callback_handler.callbacks
        for index, callback in enumerate(callbacks):
            if type(callback) is WandbCallback:
                callbacks[index] = Wandb()
            if isinstance(callback, TensorBoardCallback):
                # One directory however often the run is resumed, so that its curves are whole.
                callback.logging_dir = str(self.folder / TENSORBOARD_FOLDER)
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the configuration."""
        if not state.is_world_process_zero:
            return
        known = flat(self.record, DESCRIBED)
        if self.tracker == "wandb":
            import wandb

            assert wandb.run is not None
            wandb.run.config.update(known, allow_val_change=True)
            write_text(self.folder / WANDB_RUN_FILE, f"{wandb.run.id}\n")
        else:
            self._write_table("configuration", known)

    def conclude(self, record: Mapping[str, Any]) -> None:
        """Report the outcome and close the tracker's run."""
        outcome = flat(record, OUTCOME)
        if self.tracker == "wandb":
            import wandb

            assert wandb.run is not None
            wandb.run.summary.update(outcome)
            wandb.run.finish()
        else:
            self._write_table("outcome", outcome)

    def _write_table(self, title: str, values: Mapping[str, Any]) -> None:
        """Write values as a table in TensorBoard's text tab."""
        from torch.utils.tensorboard import SummaryWriter

        rows = "\n".join(f"| {name} | {value} |" for name, value in values.items())
        with SummaryWriter(str(self.folder / TENSORBOARD_FOLDER)) as writer:
            writer.add_text(title, f"| | |\n|---|---|\n{rows}")

"""What a tracker is told of a run beside the Trainer's metrics: settings, curves and the outcome.

The Trainer's own callbacks for W&B and TensorBoard log the metrics. The packages are imported where
a run uses them. W&B is told nothing that names this machine, its user or its directories.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback

from src.common.cli import one_line
from src.common.privacy import publishable
from src.trainer.callbacks import read_metrics

WANDB_PROJECT = "PROTGPT2_DISTILLATION"
TENSORBOARD_FOLDER = "tensorboard"
DESCRIBED = ("settings", "teacher", "student", "compression", "data", "steps", "versions", "git")
"""Parts of a run's record that are known at its beginning and are its configuration."""
# Of itself W&B would keep host, user, program, interpreter, command, packages, repository and
# whatever is printed. An empty name stops it from asking the system for one.
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
OUTCOME = ("train_seconds", "peak_memory_bytes", "compression", "early_stopping", "final")
"""Parts that are its outcome."""


def flat(record: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return parts of a record as one level, ``settings/loss/alpha``, without what is None."""
    found: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, each in value.items():
                add(f"{prefix}/{key}", each)
        elif value is not None and not isinstance(value, list | tuple):
            found[prefix] = value

    for name in names:
        add(name, publishable(record.get(name)))
    return found


def require_tracker(tracker: str) -> None:
    """Check that a tracker is installed. Raises ``ValueError`` where it is not."""
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise ValueError(f"--report_to {tracker}: it is not installed: pip install {tracker}")


def open_tracker(tracker: str, folder: Path) -> None:
    """Open W&B's run, named like the folder, before anything that takes long.

    The Trainer's callback would do so after the teacher was measured, and takes the run that is
    open. TensorBoard has nothing to open.

    Raises:
        ValueError: there is no key, or W&B cannot be reached.
    """
    if tracker != "wandb":
        return
    import wandb

    # Read by the Trainer's callback too.
    project = os.environ.setdefault("WANDB_PROJECT", WANDB_PROJECT)
    try:
        settings = wandb.Settings(**WANDB_LEAVES_OUT)
        wandb.init(project=project, name=folder.name, settings=settings)
    except wandb.Error as error:
        raise ValueError(
            f"--report_to wandb: {one_line(error)} WANDB_MODE=offline keeps the run on this machine"
        ) from error


class Wandb(WandbCallback):
    """The Trainer's callback for W&B, but telling no directory of this machine."""

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        """Tell the Trainer's arguments and the student's configuration, cleaned."""
        known = publishable({**model.config.to_dict(), **args.to_dict()})
        told = copy.copy(args)
        # Written over the configuration, which is told first and holds paths of its own.
        told.to_dict = lambda: known
        super().setup(told, state, model, **kwargs)


class Tracking(TrainerCallback):
    """Describes a run to a tracker at its beginning, and concludes it at its end.

    Args:
        tracker: ``wandb`` or ``tensorboard``.
        folder: of the run, whose name the tracker's run has.
        record: of the run.
    """

    def __init__(self, tracker: str, folder: Path, record: Mapping[str, Any]) -> None:
        self.tracker, self.folder, self.record = tracker, folder, record

    def watch(self, trainer: Trainer) -> None:
        """Follow a trainer that reports to this tracker."""
        callbacks = trainer.callback_handler.callbacks
        for place, callback in enumerate(callbacks):
            if type(callback) is WandbCallback:
                callbacks[place] = Wandb()
            if isinstance(callback, TensorBoardCallback):
                # One directory however often the run is resumed, so that its curves are whole.
                callback.logging_dir = str(self.folder / TENSORBOARD_FOLDER)
        trainer.add_callback(self)

    def _writer(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder / TENSORBOARD_FOLDER))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the configuration."""
        if not state.is_world_process_zero:
            return
        known = flat(self.record, DESCRIBED)
        if self.tracker == "wandb":
            import wandb

            assert wandb.run is not None
            wandb.run.config.update(known, allow_val_change=True)
        else:
            self._text("configuration", known)

    def conclude(self, record: Mapping[str, Any]) -> None:
        """Tell the outcome and draw the learning curve; the tracker's run ends."""
        from src.publishing import plots

        outcome = flat(record, OUTCOME)
        curve = plots.learning_curves({self.folder.name: read_metrics(self.folder)})
        if self.tracker == "wandb":
            import wandb
            from PIL import Image

            assert wandb.run is not None
            # As a picture: given the figure itself, W&B wants the whole of pyplot.
            picture = io.BytesIO()
            curve.savefig(picture, format="png", dpi=150)
            wandb.run.log({"learning_curve": wandb.Image(Image.open(picture))})
            wandb.run.summary.update(outcome)
            wandb.run.finish()
            return
        self._text("outcome", outcome)
        with self._writer() as writer:
            writer.add_figure("learning_curve", curve, record["steps"])

    def _text(self, title: str, values: Mapping[str, Any]) -> None:
        rows = "\n".join(f"| {name} | {value} |" for name, value in values.items())
        with self._writer() as writer:
            writer.add_text(title, f"| | |\n|---|---|\n{rows}")

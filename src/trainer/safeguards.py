"""Judges every optimiser step: one that is not finite ends the run, a loss spike can be skipped.

**NaN and infinity.** One addition on the device tells whether a step's losses and gradient norm
are finite. A CPU reads the result at once. A GPU would have to wait, so there it is read one step
later; until then the fused optimiser leaves the weights alone if the step was bad (by
``found_inf``, as with a gradient scaler). No record, validation or checkpoint is made before the
step was judged. A bad step is done once more to find the first tensor that is not finite
(:mod:`src.trainer.evidence`).

**Signals.** The beginning of each step is kept, so that a signal can take the step back. Several
processes leave together after the step in which all of them learn of the signal.

**Loss spikes.** Optionally, a step whose loss is above a multiple of the running median is skipped:
the weights stay, the schedule goes on. This reads the loss in every step.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from src.common.cli import say
from src.trainer import interruption
from src.trainer.evidence import NotFinite, advice, report_failure
from src.trainer.states import random_states, restore_random_states

if TYPE_CHECKING:
    from src.trainer.adapter import TrainerAdapter

__all__ = ["NotFinite", "SpikeGuard", "StepGuard", "StepRecord"]

SPIKE_WINDOW = 100
"""Steps of which the running median of the loss is taken."""
SPIKE_MINIMUM = 20
"""Steps before the first can be skipped: the median of fewer says little."""


@dataclass
class StepRecord:
    """What a step began with, so that it can be taken back or done again, and what came of it."""

    batches: list[Any] = field(default_factory=list)
    count: Tensor | None = None
    """N, the positions of all batches."""
    step: int = 0
    random: tuple[dict[str, Tensor], dict[str, Any]] | None = None
    progress: tuple[dict[str, Tensor], dict[str, Any]] = ({}, {})
    flos: float = 0.0
    losses: list[Tensor] = field(default_factory=list)
    norm: Any = None
    flags: Tensor | None = None
    """``(2,)``: processes in which the step is not finite, and those asked to stop."""


class SpikeGuard:
    """Recognises losses above ``factor`` times their running median; None: no loss is.

    Raises:
        ValueError: the factor is not above 1.
    """

    def __init__(self, factor: float | None = None) -> None:
        if factor is not None and not 1 < factor < math.inf:
            raise ValueError(f"skip_loss_spikes must be above 1, got {factor}")
        self.factor = factor
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.skipped = 0

    def is_spike(self, loss: float) -> bool:
        """Return whether a loss is above the allowed multiple of the running median."""
        if not self.factor or len(self.losses) < SPIKE_MINIMUM:
            return False
        return loss > self.factor * statistics.median(self.losses)

    def state(self) -> dict[str, Any]:
        """Return the JSON values of a checkpoint."""
        return {"losses": list(self.losses), "skipped": self.skipped}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set what :meth:`state` returned."""
        self.losses = deque(state["losses"], maxlen=SPIKE_WINDOW)
        self.skipped = state["skipped"]


class StepGuard:
    """Keeps the beginning of the step under way, and judges each step before its result is used."""

    def __init__(self, trainer: TrainerAdapter) -> None:
        self.trainer = trainer
        self.restart()

    def restart(self) -> None:
        """Forget what an earlier training left."""
        self.step = StepRecord()
        self.all_know_of_signal = False
        self._unjudged: StepRecord | None = None
        self._epoch_random = random_states()

    # The beginning of a step ----------------------------------------------------------------------

    def begin_epoch(self) -> None:
        """Keep the random states before the epoch's first batch is fetched."""
        self._epoch_random = random_states()

    def keep_batches(self, batches: list[Any], count: Tensor) -> None:
        """Keep the batches of the step that begins, and their number of positions."""
        self.step = StepRecord(batches, count)

    def begin_step(self) -> None:
        """Keep the states that the step would have to go back to."""
        self.step.step = self.trainer.state.global_step
        # Without NumPy's generator, which takes long: no batch of a step draws from it.
        self.step.random = random_states(with_numpy=False)
        self.step.progress = self.trainer.progress()
        self.step.flos = self.trainer.current_flos

    def take_step_back(self) -> None:
        """Restore the states that the unfinished step began with."""
        if self.step.random is None:
            return
        # A run that resumes at the start of an epoch fetches its first batch after restoring.
        first_of_epoch = float(self.trainer.state.epoch or 0).is_integer()
        restore_random_states(*(self._epoch_random if first_of_epoch else self.step.random))
        self.trainer.set_progress(*self.step.progress)
        self.trainer.current_flos = self.step.flos

    # Its end --------------------------------------------------------------------------------------

    def watch(self, model: nn.Module, norm: Any) -> None:
        """Judge the step whose gradients are ready, or have the optimiser hold still if it is bad.

        ``norm`` is that of the gradients before clipping. If the loss is a spike they are dropped.
        """
        record, trainer = self.step, self.trainer
        record.norm = norm
        loss = torch.stack(record.losses).sum()
        # The scaler handles an overflow of scaled gradients; then the loss alone is judged.
        scaled = getattr(trainer.accelerator, "scaler", None) is not None
        watched = loss if scaled else loss + torch.as_tensor(norm).to(loss)
        bad = (~torch.isfinite(watched)).float()
        flags = torch.stack([bad, torch.full_like(bad, bool(interruption.requested()))])
        record.flags = trainer.sum_over_processes(flags)
        self.check_last_step()  # the step before
        self._unjudged = record
        optimizer = None if scaled else self.optimizer_that_can_hold_still()
        if optimizer is None:
            self.check_last_step()
        else:
            optimizer.grad_scale = None
            optimizer.found_inf = (record.flags[0] > 0).float()
        if trainer.spikes.factor:
            self.check_last_step()
            self._skip_if_spike(model, loss)

    def optimizer_that_can_hold_still(self) -> Any:
        """Return the optimiser if the device can tell it to skip a step, else None."""
        optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        able = getattr(optimizer, "_step_supports_amp_scaling", False)
        return optimizer if able and self.trainer.args.device.type != "cpu" else None

    def check_last_step(self) -> None:
        """Read the flags of the last step from the device.

        Raises:
            NotFinite: the step is bad; the evidence is saved first.
        """
        record, self._unjudged = self._unjudged, None
        if record is None or record.flags is None:
            return
        bad, asked_to_stop = record.flags.tolist()
        if bad:
            report_failure(self.trainer, record)
        self.all_know_of_signal = self.trainer.args.world_size > 1 and asked_to_stop > 0

    def _skip_if_spike(self, model: nn.Module, loss: Tensor) -> None:
        """Drop the gradients if the loss is far above its running median."""
        trainer, spikes = self.trainer, self.trainer.spikes
        value = float(trainer.sum_over_processes(loss)) / trainer.args.world_size
        if spikes.is_spike(value):
            # An optimiser leaves parameters without gradient, and their state, as they are.
            model.zero_grad(set_to_none=True)
            spikes.skipped += 1
            if trainer.args.should_save:
                say(f"step {trainer.state.global_step + 1} is skipped: loss {value:.4f}")
        # Skipped losses count too, so that a lasting change of the loss does not stop the run.
        spikes.losses.append(value)

    def require_finite(self, metrics: Mapping[str, Any]) -> None:
        """Raise ``NotFinite`` if a validation's result is not finite."""
        for name, value in metrics.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise NotFinite(
                    f"step {self.trainer.state.global_step}: {name} is {value}; "
                    f"{advice(self.trainer)}, or look at the validation proteins"
                )

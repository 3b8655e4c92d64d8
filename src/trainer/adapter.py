"""The one subclass of ``transformers.Trainer`` that overrides its private methods.

The objects that do the work are :class:`~src.trainer.checkpoints.CheckpointManager`,
:class:`~src.trainer.safeguards.StepGuard`, :class:`~src.trainer.safeguards.SpikeGuard` and
:class:`~src.trainer.log_interval.LogInterval`. This file calls them at the right moments,
mostly from public methods and a callback; where these do not suffice, from the private methods
under "Hooks".
``tests/test_adapter.py`` compares the hooks with the installed transformers.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from src.common.cli import say
from src.common.files import names_full_disk
from src.common.runs import GO_ON
from src.trainer import interruption
from src.trainer.checkpoints import CheckpointManager, fault_of, read_tensors
from src.trainer.interruption import LeaveNow, quiet_workers
from src.trainer.log_interval import LogInterval
from src.trainer.safeguards import SpikeGuard, StepGuard
from src.trainer.states import random_states, read_states, restore_random_states, write_states

Progress = tuple[dict[str, Tensor], dict[str, Any]]
"""This process's sums since the last record of the log, and JSON values of the whole run."""


class TrainerAdapter(Trainer):
    """A Trainer that resumes to the same bits, stops well at signals, and judges its steps.

    Args:
        skip_loss_spikes: skip steps whose loss is above this multiple of the running median.
        **kwargs: everything that ``transformers.Trainer`` takes.

    Raises:
        ValueError: the multiple is not above 1.
    """

    def __init__(self, *args: Any, skip_loss_spikes: float | None = None, **kwargs: Any) -> None:
        self.spikes = SpikeGuard(skip_loss_spikes)
        self.seconds_before, self.began = 0.0, 0.0
        self.interval = LogInterval()
        self.guard = StepGuard(self)
        self.micro_batch = (0, 0)
        """The optimiser steps done, and the number of the batch within the step under way."""
        super().__init__(*args, **kwargs)
        folder, keep = Path(str(self.args.output_dir)), self.args.save_total_limit
        self.checkpoints = CheckpointManager(folder, keep, self.args.should_save, self.wait_for_all)
        self._resumed_from: Path | None = None
        self._random_at_start = random_states()
        self.add_callback(_Events(self))

    # Training, validation and their ends ----------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; end with a checkpoint and the signal's exit status if a signal came.

        ``resume_from_checkpoint`` is the checkpoint to go on from; True: the newest whole one.
        """
        if resume_from_checkpoint is True:
            newest = self.checkpoints.newest()
            if newest is None:
                raise ValueError(f"{self.checkpoints.run} holds no whole checkpoint")
            resume_from_checkpoint = str(newest)
        self._resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self.guard.restart()
        self.interval.restart()
        self.seconds_before, self.began = 0.0, time.monotonic()
        advice = self.checkpoints.advice()
        with interruption.deferred(), names_full_disk(self.checkpoints.run, advice):
            try:
                result = super().train(resume_from_checkpoint, **kwargs)
            except LeaveNow:
                self.guard.take_step_back()
                self.leave()
            self.guard.check_last_step()
            if self.asked_to_leave():
                self.leave()
            return result

    def go_on(self) -> None:
        """Restore the states of the checkpoint resumed from; do a validation that it still owes.

        A run that is over, by its steps or because a callback ended it, makes no further step.
        """
        if self._resumed_from is not None:
            owed = read_states(self, self._resumed_from)
            saved: Any = self.state.stateful_callbacks.get("TrainerControl")  # type: ignore[union-attr]
            stopped = isinstance(saved, dict) and saved["args"]["should_training_stop"]
            self.control.should_training_stop = (
                stopped or self.state.global_step >= self.state.max_steps
            )
            if owed:
                self.control.should_log = False
                self.control.should_evaluate = owed["evaluate"]
                self.control.should_save = owed["save"]
                epoch, model = float(self.state.epoch or 0), self.model_wrapped
                self._maybe_log_save_evaluate(self._tr_loss, None, model, None, epoch, None, 0.0)  # type: ignore[arg-type]
        self._random_at_start = random_states()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Do one batch's forward and backward pass, unless a signal came."""
        self.leave_if_asked()
        self.micro_batch = (self.state.global_step, len(self.guard.step.losses))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.guard.step.losses.append(loss)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate; while training, a result that is not finite or a signal ends the run."""
        if not self.is_in_train:
            return super().evaluate(*args, **kwargs)
        before = random_states()
        try:
            with self.interval.paused():
                metrics = super().evaluate(*args, **kwargs)
        except LeaveNow:
            restore_random_states(*before)
            self.leave({"evaluate": True, "save": self.control.should_save})
        self.guard.require_finite(metrics)
        return metrics

    def asked_to_leave(self) -> bool:
        """Return whether a signal came, of which all processes know."""
        alone = self.args.world_size == 1
        return (alone and interruption.requested() is not None) or self.guard.all_know_of_signal

    def leave_if_asked(self) -> None:
        """Raise ``LeaveNow`` if a signal came: the step or validation under way is broken off."""
        if self.asked_to_leave():
            raise LeaveNow

    def leave(self, owed: dict[str, bool] | None = None) -> NoReturn:
        """Write a checkpoint, unless this step has one, and end with the signal's exit status.

        ``owed`` is what a validation that was broken off still has to do.
        """
        self.guard.check_last_step()
        step = self.state.global_step
        if step and (owed or not self.checkpoints.holds(step)):
            self.save_checkpoint(owed)
        if self.args.should_save:
            where = f"{self.checkpoints.path(step).name} is written: " if step else ""
            say(f"stopped after step {step}; {where}{GO_ON}")
        number = interruption.requested() or interruption.SIGNALS[0]
        raise SystemExit(interruption.exit_status(number))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log also the number of skipped steps, and at the end the mean loss of the whole run.

        The Trainer's own mean is that of the steps since the run was last resumed.
        """
        if self.spikes.factor and "loss" in logs:
            logs["skipped_steps"] = self.spikes.skipped
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def get_train_dataloader(self) -> Any:
        """Return the training batches; worker processes ignore signals."""
        return quiet_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the validation batches; worker processes ignore signals."""
        return quiet_workers(super().get_eval_dataloader(eval_dataset))

    # Saving and loading ---------------------------------------------------------------------------

    def save_checkpoint(self, owed: dict[str, bool] | None = None) -> None:
        """Write a checkpoint of the current step; see :meth:`leave` for ``owed``."""
        step = self.state.global_step
        self.checkpoints.save(step, lambda folder: write_states(self, folder, owed))

    def progress(self) -> Progress:
        """Return what was summed since the last record of the log, and the state of the guards."""
        tensors = {"loss": self._tr_loss.detach().clone(), "parts": self.interval.sums.values}
        plain = {
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "spikes": self.spikes.state(),
            "tally": self.interval.state(),
            "runtime": self.seconds(),
        }
        return tensors, plain

    def seconds(self) -> float:
        """Return how long the run has trained, with what was kept of stopped sessions."""
        return self.seconds_before + time.monotonic() - self.began

    def set_progress(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Set what :meth:`progress` returned."""
        self._tr_loss.copy_(tensors["loss"])
        self._total_loss_scalar = plain["total_loss"]
        self._globalstep_last_logged = plain["last_logged"]
        self.spikes.restore(plain["spikes"])
        self.interval.restore(tensors["parts"], plain["tally"])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model and its tokenizer; each file appears under its name only when whole."""
        if self.args.should_save:
            folder = Path(str(self.args.output_dir if output_dir is None else output_dir))
            self.checkpoints.save_model(folder, self.write_model)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def write_model(self, folder: Path, as_trained: bool = False) -> None:
        """Write the model and its tokenizer, without the Trainer's pickled arguments.

        With ``as_trained`` weights have the names of the modules, for :meth:`read_model`; published
        files of some classes (GPT-NeoX, mixtures of experts) name and split them otherwise.
        """
        self.accelerator.unwrap_model(self.model).save_pretrained(  # type: ignore[union-attr, operator]
            folder, save_original_format=not as_trained
        )
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)  # type: ignore[union-attr]

    def read_model(self, folder: Path) -> None:
        """Load the weights that :meth:`write_model` wrote ``as_trained``.

        Raises:
            ValueError: the model has no place for a weight.
        """
        model: Any = self.accelerator.unwrap_model(self.model)
        for path in sorted(folder.glob("model*.safetensors")):
            # Not strict, because a tied head is left out.
            loaded = model.load_state_dict(read_tensors(path), strict=False)
            if loaded.unexpected_keys:
                raise ValueError(
                    f"{path}: the model has no {loaded.unexpected_keys[0]}: an older version wrote "
                    "this checkpoint, and lost such weights: train again in another --output_dir"
                )

    def load_weights(self, step: int) -> None:
        """Load the weights of a step's checkpoint.

        Raises:
            ValueError: it is absent or not whole.
        """
        folder = self.checkpoints.path(step)
        fault = fault_of(folder)
        if fault is not None:
            raise ValueError(
                f"{folder}, the best of this run, is not whole: {fault}; its weights are lost: "
                "train again in another --output_dir"
            )
        self.read_model(folder)

    # What subclasses may change, and help for them ------------------------------------------------

    def clip_gradients(self, model: nn.Module) -> Tensor:
        """Clip the gradients and return their norm before that."""
        return self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)  # type: ignore[return-value]

    def train_sampler(self, dataset: Any) -> Any:
        """Return the order of the training rows, or None for the Trainer's own."""
        return None

    def on_device(self, batch: Any) -> Any:
        """Return a batch with its tensors on the device."""
        return self._prepare_inputs(batch)

    def model_for_evaluation(self) -> nn.Module:
        """Return the model, with autocast set up even if there was no training."""
        model: Any = self.model
        if not self.accelerator._models:
            return self.accelerator.prepare_model(model, evaluation_mode=True)
        return model

    def sum_over_processes(self, value: Tensor) -> Tensor:
        """Return the sum of all processes' values."""
        if self.args.world_size > 1:
            return self.accelerator.reduce(value, reduction="sum")  # type: ignore[return-value]
        return value

    def wait_for_all(self) -> None:
        """Return when all processes have called this."""
        if self.args.world_size > 1:
            self.accelerator.wait_for_everyone()

    # Hooks: private methods of transformers.Trainer -----------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        sampler = self.train_sampler(dataset)
        return super()._get_train_sampler(train_dataset) if sampler is None else sampler

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # Called at the start of an epoch before data is fetched, within one after the first fetch.
        restore_random_states(*self._random_at_start)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not self.control.should_training_stop:  # a resumed run may be over
            super()._run_epoch(*args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return self.clip_gradients(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.guard.watch(model, norm)  # the optimiser's step comes next
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self.guard.check_last_step()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.asked_to_leave():
            self.leave()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.interval.paused():
            self.save_checkpoint()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.read_model(Path(resume_from_checkpoint))


class _Events(TrainerCallback):
    """Calls the adapter's objects at the Trainer's public events."""

    def __init__(self, trainer: TrainerAdapter) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.go_on()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.guard.begin_epoch()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.guard.begin_step()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.is_in_train:
            self.trainer.leave_if_asked()

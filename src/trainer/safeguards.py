"""A Trainer that stops well: at signals with a checkpoint, at NaN or infinity with the evidence.

**Signals** (:mod:`src.trainer.interruption`). One process leaves at the next batch: in the middle of a step
it goes back to the step's beginning, in the middle of a validation it notes in the checkpoint that
the validation is still owed. Several processes leave together after the step in which all of them
know of the signal.

**NaN and infinity.** Loss and gradient norm of each step are judged by one addition on the device.
On a CPU the result is read at once. On a GPU reading would let the device wait, so it is read one
step later; until then the fused optimiser is told (by ``found_inf``, as a gradient scaler does) to
leave the weights alone if the step was bad. No record, validation or checkpoint is made before the
step was judged. The step that failed is done once more, with the same batches and random states,
to find the first tensor that is not finite.

**Loss spikes.** Optionally, a step whose loss is above a multiple of the running median is skipped:
the weights stay, the schedule goes on. This reads the loss in every step.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from src.common.cli import say
from src.common.files import names_full_disk, write_json
from src.trainer import interruption
from src.trainer.checkpoints import (
    AtomicCheckpointTrainer,
    as_json,
    fault_of,
    newest_valid,
    random_states,
    restore_random_states,
)

SPIKE_WINDOW = 100
"""Steps whose losses the running median is taken of."""
SPIKE_MINIMUM = 20
"""Steps before the first can be skipped: the median of fewer says little."""
FAILURE_FOLDER = "failure-step-{}"


class NotFinite(ValueError):
    """The loss, a gradient or a validation is NaN or infinite."""


class _LeaveNow(Exception):  # noqa: N818
    """A signal came: leave the step or the validation unfinished."""


@dataclass
class StepRecord:
    """What a step began with, so that it can be taken back or done again."""

    batches: list[Any] = field(default_factory=list)
    count: Any = None
    step: int = 0
    random: tuple[dict[str, Tensor], dict[str, Any]] | None = None
    interval: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)
    flos: float = 0.0
    losses: list[Tensor] = field(default_factory=list)
    norm: Any = None
    flags: Tensor | None = None
    """``(2,)``: processes for which the step is not finite, and those asked to stop."""


class _Watch(TrainerCallback):
    """Tells the Trainer where it is in its loop."""

    def __init__(self, trainer: GuardedTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.note_step_begin()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.leave_if_asked()


class GuardedTrainer(AtomicCheckpointTrainer):
    """The Trainer described above.

    Args:
        skip_loss_spikes: skip steps whose loss is above this multiple of the running median.
        **kwargs: everything that ``transformers.Trainer`` takes.

    Raises:
        ValueError: the multiple is not above 1.
    """

    def __init__(self, *args: Any, skip_loss_spikes: float | None = None, **kwargs: Any) -> None:
        if skip_loss_spikes is not None and not 1 < skip_loss_spikes < math.inf:
            raise ValueError(f"skip_loss_spikes must be above 1, got {skip_loss_spikes}")
        self.skip_loss_spikes = skip_loss_spikes
        self._spike_losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._skipped_steps = 0
        self._step = StepRecord()
        self._unjudged: StepRecord | None = None
        self._agreed_to_stop = False
        super().__init__(*args, **kwargs)
        self.add_callback(_Watch(self))

    # Where the loop stands ------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Collect the batches of one optimiser step and keep them until it is judged."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step = StepRecord(batches=batches, count=count)
        return batches, count

    def note_step_begin(self) -> None:
        """Keep what the step that begins would have to go back to."""
        record = self._step
        record.step = self.state.global_step
        # Without NumPy's generator: no batch of a step draws from it.
        record.random = random_states(with_numpy=False)
        record.interval, record.plain = self.interval_tensors(), self.plain_state()
        record.flos = self.current_flos

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Do one batch, unless a signal came."""
        self.leave_if_asked()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step.losses.append(loss)
        return loss

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Train; leave with a checkpoint where a signal interrupted a step."""
        self._agreed_to_stop = False
        run = Path(str(self.args.output_dir))
        with interruption.deferred(), names_full_disk(run, self._way_out(run)):
            try:
                result = super()._inner_training_loop(*args, **kwargs)
            except _LeaveNow:
                self._take_step_back()
                self._leave()
            self._judge_now()
            return result

    def leave_if_asked(self) -> None:
        """Break off the step or the validation, where a signal came and this process is alone."""
        alone = self.args.world_size == 1
        if (alone and interruption.requested()) or self._agreed_to_stop:
            raise _LeaveNow

    def _take_step_back(self) -> None:
        record = self._step
        if record.random is not None:
            restore_random_states(*record.random)
            self.restore_state(record.interval, record.plain)
            self.current_flos = record.flos

    def _leave(self) -> None:
        """Write a checkpoint, if none of this step is there, and leave with the signal's status."""
        self._judge_now()
        run = Path(str(self.args.output_dir))
        final = run / f"checkpoint-{self.state.global_step}"
        if self.state.global_step and (self._owed or not final.is_dir() or fault_of(final)):
            self._save_checkpoint(self.model, None)
        self._owed = None
        number = interruption.requested() or interruption.SIGNALS[0]
        if self.args.should_save:
            where = f"{final.name} is written: " if self.state.global_step else ""
            say(f"stopped after step {self.state.global_step}; {where}go on with --resume")
        raise SystemExit(interruption.exit_status(number))

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, validate and save as due, having judged the step; leave where a signal came."""
        control = self.control
        if control.should_log or control.should_evaluate or control.should_save:
            self._judge_now()
        before = random_states() if control.should_evaluate else None
        due = {"evaluate": control.should_evaluate, "save": control.should_save}
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except _LeaveNow:
            assert before is not None, "only a validation is left in its middle"
            restore_random_states(*before)
            self._owed = due
            self._leave()
        if self._agreed_to_stop or (self.args.world_size == 1 and interruption.requested()):
            self._leave()

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate; a result that is not finite ends the run."""
        metrics = super()._evaluate(*args, **kwargs)
        bad = [k for k, v in metrics.items() if isinstance(v, float) and not math.isfinite(v)]
        if bad:
            raise NotFinite(
                f"step {self.state.global_step}: {bad[0]} is {metrics[bad[0]]}; "
                f"{self._last_good()}: {self._other_numbers()}, or look at the validation proteins"
            )
        return metrics

    def get_train_dataloader(self) -> Any:
        """Return the batches; their workers leave signals to this process."""
        return _quiet_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the batches; their workers leave signals to this process."""
        return _quiet_workers(super().get_eval_dataloader(eval_dataset))

    # Judging steps --------------------------------------------------------------------------------

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient norm; the Trainer asks for it just before the optimiser's step."""
        norm = super()._get_grad_norm(model, grad_norm)
        record = self._step
        record.norm = norm
        loss = torch.stack(record.losses).sum()
        # An overflow of scaled gradients is the scaler's to mend: there the loss alone is judged.
        watched = loss if self._scales_gradients() else loss + torch.as_tensor(norm).to(loss)
        bad = (~torch.isfinite(watched)).float()
        record.flags = torch.stack([bad, torch.full_like(bad, bool(interruption.requested()))])
        if self.args.world_size > 1:
            record.flags = self.accelerator.reduce(record.flags, reduction="sum")  # type: ignore[assignment]
        assert record.flags is not None
        self._judge_now()
        self._unjudged = record
        optimizer = self._optimizer_that_can_hold_still()
        if optimizer is None:
            self._judge_now()
        else:
            optimizer.grad_scale = None
            optimizer.found_inf = (record.flags[0] > 0).float()
        if self.skip_loss_spikes:
            self._judge_now()
            self._skip_if_spike(model, loss)
        return norm

    def _scales_gradients(self) -> bool:
        return getattr(self.accelerator, "scaler", None) is not None

    def _optimizer_that_can_hold_still(self) -> Any:
        """Return the optimiser if the device can tell it to skip a step, so that judging waits."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        able = getattr(optimizer, "_step_supports_amp_scaling", False)
        if self.args.device.type == "cpu" or not able or self._scales_gradients():
            return None
        return optimizer

    def _judge_now(self) -> None:
        """Wait for what the device says of the last step; stop where it is not finite."""
        record, self._unjudged = self._unjudged, None
        if record is None or record.flags is None:
            return
        bad, stopping = record.flags.tolist()
        if bad:
            self._report_failure(record)
        self._agreed_to_stop = self.args.world_size > 1 and stopping > 0

    def _skip_if_spike(self, model: nn.Module, loss: Tensor) -> None:
        """Let the optimiser do nothing where the loss is far above its running median."""
        if self.args.world_size > 1:
            loss = self.accelerator.reduce(loss, reduction="mean")  # type: ignore[assignment]
        value = float(loss)
        if self.is_spike(value):
            # An optimiser leaves parameters without gradient, and their state, as they are.
            model.zero_grad(set_to_none=True)
            self._skipped_steps += 1
            if self.args.should_save:
                say(f"step {self.state.global_step + 1} is skipped: loss {value:.4f}")
        # Skipped losses count too, so that a lasting change of the loss stops no run for ever.
        self._spike_losses.append(value)

    def is_spike(self, loss: float) -> bool:
        """Return whether a loss is above the allowed multiple of the running median."""
        if not self.skip_loss_spikes or len(self._spike_losses) < SPIKE_MINIMUM:
            return False
        return loss > self.skip_loss_spikes * statistics.median(self._spike_losses)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the number of skipped steps so far to the training records."""
        if self.skip_loss_spikes and "loss" in logs:
            logs["skipped_steps"] = self._skipped_steps
        super().log(logs, start_time)

    def plain_state(self) -> dict[str, Any]:
        """Return also the state of the spike guard."""
        spikes = {"losses": list(self._spike_losses), "skipped": self._skipped_steps}
        return {**super().plain_state(), "spikes": spikes}

    def restore_state(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Set also the state of the spike guard."""
        super().restore_state(tensors, plain)
        self._spike_losses = deque(plain["spikes"]["losses"], maxlen=SPIKE_WINDOW)
        self._skipped_steps = plain["spikes"]["skipped"]

    # Evidence of a failure ------------------------------------------------------------------------

    def _last_good(self) -> str:
        good = newest_valid(Path(str(self.args.output_dir)), announce=lambda line: None)
        return f"{good.name} is kept" if good else "there is no checkpoint yet"

    def _other_numbers(self) -> str:
        """Return what a person can change: the run itself, gone on with, would fail again."""
        lower = "train again in another --output_dir with a lower --learning_rate"
        return lower if self.accelerator.mixed_precision == "no" else f"{lower} or --precision fp32"

    def _report_failure(self, record: StepRecord) -> None:
        """Save what the failed step began with, find the first bad tensor, and stop.

        Raises:
            NotFinite: always.
        """
        folder = _new_folder(Path(str(self.args.output_dir)), record.step + 1)
        self._wait_for_all()  # all processes have chosen the same name before one makes it
        first = self.first_bad_tensor(record)
        self._save_failure(folder, record, first)
        self._wait_for_all()
        raise NotFinite(
            f"step {record.step + 1}: {first or 'the loss or a gradient'} is not finite; batch, "
            f"random states and weights are in {folder}; {self._last_good()}: "
            f"{self._other_numbers()}"
        )

    def first_bad_tensor(self, record: StepRecord) -> str | None:
        """Do a step's batches again and name the first tensor that is not finite.

        Parameters are looked at first, then the teacher and the student layer by layer, the loss,
        and the gradients in the order in which they are computed. None: all is finite this time.
        """
        student = self.accelerator.unwrap_model(self.model)
        for name, parameter in student.named_parameters():
            if not parameter.isfinite().all():
                return f"the parameter {name}"
        if record.random is not None:
            restore_random_states(*record.random)
        student.zero_grad()
        student.train()
        teacher = getattr(self, "teacher_model", None)
        first = None
        # To the last batch in any case: a teacher spread over processes has to be run by all alike.
        for number, batch in enumerate(record.batches):
            where = f" of batch {number}" if len(record.batches) > 1 else ""
            with watched(teacher, "teacher") as seen, watched(student, "student", seen):
                inputs = self._prepare_inputs(batch)
                self.number_micro_batch(record.step, number)
                with self.compute_loss_context_manager():
                    loss: Any = self.compute_loss(student, inputs, num_items_in_batch=record.count)
                if not seen and not loss.isfinite():
                    seen.append("the loss")
                if not seen and first is None:
                    loss.backward()
                if seen and first is None:
                    first = seen[0] + where
        return first

    def number_micro_batch(self, step: int, number: int) -> None:
        """Note which batch of which step is done next: for a loss that depends on it."""

    def _save_failure(self, folder: Path, record: StepRecord, first: str | None) -> None:
        assert record.random is not None
        tensors, plain = record.random
        contents = {f"random.{name}": tensor for name, tensor in tensors.items()}
        others: dict[str, Any] = {}
        for number, batch in enumerate(record.batches):
            for key, value in batch.items():
                if isinstance(value, Tensor):
                    contents[f"batch.{number}.{key}"] = value.detach().cpu().contiguous().clone()
                else:
                    others[f"{number}.{key}"] = repr(value)[:1000]
        if self.args.should_save:
            folder.mkdir(parents=True)
            self._save(str(folder))
        self._wait_for_all()
        rank = self.args.process_index
        save_file(contents, folder / f"step-{rank}.safetensors", {"plain": as_json(plain)})
        write_json(
            folder / f"failure-{rank}.json",
            {
                "step": record.step + 1,
                "first_bad_tensor": first,
                "losses": [repr(float(loss)) for loss in record.losses],
                "gradient_norm": repr(float(record.norm)),
                "positions": None if record.count is None else int(record.count),
                "batches": len(record.batches),
                "other_values": others,
                "checkpoint": self._last_good(),
            },
        )


@contextmanager
def watched(
    model: nn.Module | None, label: str, seen: list[str] | None = None
) -> Iterator[list[str]]:
    """Collect the names of a model's outputs and gradients that are not finite, in their order.

    Args:
        model: what to watch; None: nothing.
        label: what the model is called.
        seen: a list to append to.

    Yields:
        The names.
    """
    found = [] if seen is None else seen
    handles = []
    if model is not None:
        for name, module in model.named_modules():
            note = f"{label}: output of {name or 'the model'}"
            handles.append(module.register_forward_hook(_output_hook(found, note)))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                note = f"{label}: gradient of {name}"
                handles.append(
                    parameter.register_post_accumulate_grad_hook(_gradient_hook(found, note))
                )
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _output_hook(found: list[str], note: str) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        tensor = first if isinstance(first, Tensor) else getattr(output, "last_hidden_state", None)
        if isinstance(tensor, Tensor) and not tensor.isfinite().all():
            found.append(note)

    return hook


def _gradient_hook(found: list[str], note: str) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            found.append(note)

    return hook


def _quiet_workers(loader: Any) -> Any:
    """Return a DataLoader whose workers leave signals to their parent."""
    if getattr(loader, "num_workers", 0):
        loader.worker_init_fn = WorkerStart(loader.worker_init_fn)
    return loader


@dataclass
class WorkerStart:
    """Starts a DataLoader worker; a class, so that it can be sent to another process."""

    initialise: Callable[[int], Any] | None

    def __call__(self, worker: int) -> None:
        """Start worker number ``worker``."""
        interruption.leave_signals_to_parent(self.initialise, worker)


def _new_folder(run: Path, step: int) -> Path:
    """Return a name for the evidence that is not taken: an earlier failure is kept."""
    folder, number = run / FAILURE_FOLDER.format(step), 1
    while folder.exists():
        number += 1
        folder = run / f"{FAILURE_FOLDER.format(step)}-{number}"
    return folder

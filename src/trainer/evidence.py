"""Saves what a step that is not finite began with, and names its first bad tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from safetensors.torch import save_file
from torch import Tensor, nn

from src.common.files import write_json
from src.trainer.states import as_json, restore_random_states

if TYPE_CHECKING:
    from src.trainer.adapter import TrainerAdapter
    from src.trainer.safeguards import StepRecord


class NotFinite(ValueError):
    """The loss, a gradient or a validation is NaN or infinite."""


def report_failure(trainer: TrainerAdapter, record: StepRecord) -> NoReturn:
    """Save what the failed step began with, find the first bad tensor, and stop.

    Raises:
        NotFinite: always.
    """
    folder = new_folder(Path(str(trainer.args.output_dir)), record.step + 1)
    trainer.wait_for_all()  # all processes have chosen the same name before one makes it
    first = first_bad_tensor(trainer, record)
    save_evidence(trainer, folder, record, first)
    trainer.wait_for_all()
    raise NotFinite(
        f"step {record.step + 1}: {first or 'the loss or a gradient'} is not finite; batch, "
        f"random states and weights are in {folder}; {advice(trainer)}"
    )


def advice(trainer: TrainerAdapter) -> str:
    """Return what is left of a failed run, and what to change: resuming it would fail again."""
    good = trainer.checkpoints.newest()
    left = f"{good.name} is kept" if good else "there is no checkpoint yet"
    precision = "" if trainer.accelerator.mixed_precision == "no" else " or --precision fp32"
    lower = "train again in another --output_dir with a lower --learning_rate"
    return f"{left}: {lower}{precision}"


def new_folder(run: Path, step: int) -> Path:
    """Return a directory for the evidence that does not exist yet: an earlier failure is kept."""
    folder, number = run / f"failure-step-{step}", 1
    while folder.exists():
        number += 1
        folder = run / f"failure-step-{step}-{number}"
    return folder


def first_bad_tensor(trainer: TrainerAdapter, record: StepRecord) -> str | None:
    """Do a step's batches again and return the name of the first tensor that is not finite.

    Parameters are checked first, then the teacher and the student layer by layer, the loss, and the
    gradients in the order in which they are computed. None: all is finite this time.
    """
    student = trainer.accelerator.unwrap_model(trainer.model)
    for name, parameter in student.named_parameters():
        if not parameter.isfinite().all():
            return f"the parameter {name}"
    if record.random is not None:
        restore_random_states(*record.random)
    student.zero_grad()
    student.train()
    teacher = getattr(trainer, "teacher_model", None)
    first = None
    # All batches are done in any case: processes that share a teacher must run it equally often.
    for number, batch in enumerate(record.batches):
        trainer.micro_batch = (record.step, number)
        with watched(teacher, "teacher") as bad, watched(student, "student", bad):
            inputs = trainer.on_device(batch)
            with trainer.compute_loss_context_manager():
                loss: Any = trainer.compute_loss(student, inputs, num_items_in_batch=record.count)
            if not bad and not loss.isfinite():
                bad.append("the loss")
            if not bad and first is None:
                loss.backward()
        if bad and first is None:
            first = bad[0] + (f" of batch {number}" if len(record.batches) > 1 else "")
    return first


def save_evidence(
    trainer: TrainerAdapter, folder: Path, record: StepRecord, first: str | None
) -> None:
    """Write the weights, and of each process its batches, random states and what is known."""
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
    if trainer.args.should_save:
        folder.mkdir(parents=True)
        trainer.write_model(folder, as_trained=True)
    trainer.wait_for_all()
    rank = trainer.args.process_index
    save_file(contents, folder / f"step-{rank}.safetensors", {"plain": as_json(plain)})
    good = trainer.checkpoints.newest()
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
            "checkpoint": f"{good.name} is kept" if good else "there is no checkpoint yet",
        },
    )


@contextmanager
def watched(
    model: nn.Module | None, label: str, bad: list[str] | None = None
) -> Iterator[list[str]]:
    """Collect the names of a model's outputs and gradients that are not finite, in their order.

    They are appended to ``bad`` if it is given. Nothing is watched where the model is None.

    Yields:
        The names.
    """
    names = [] if bad is None else bad
    handles = []
    for name, module in model.named_modules() if model is not None else ():
        note = f"{label}: output of {name or 'the model'}"
        handles.append(module.register_forward_hook(_output_hook(names, note)))
    for name, parameter in model.named_parameters() if model is not None else ():
        if parameter.requires_grad:
            hook = _gradient_hook(names, f"{label}: gradient of {name}")
            handles.append(parameter.register_post_accumulate_grad_hook(hook))
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def _output_hook(names: list[str], note: str) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        tensor = first if isinstance(first, Tensor) else getattr(output, "last_hidden_state", None)
        if isinstance(tensor, Tensor) and not tensor.isfinite().all():
            names.append(note)

    return hook


def _gradient_hook(names: list[str], note: str) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            names.append(note)

    return hook

"""The states that a checkpoint holds beside the weights, and how they are restored.

These are the optimiser, the schedule, the scaler, the random generators, the Trainer's own state,
and what was summed since the last record of the log. So a checkpoint can be made after any step
without changing what the run logs later.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.trainer_callback import ExportableState

from src.common.crash_points import crash_point
from src.common.files import read_json
from src.trainer.checkpoints import (
    OPTIMIZER_FILE,
    PROCESS_FILE,
    STATE_FILE,
    TRAINER_STATE_FILE,
    read_tensors,
    with_prefix,
)

if TYPE_CHECKING:
    from src.trainer.adapter import TrainerAdapter


def optimizer_tensors(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimiser's state into tensors named ``<parameter>.<entry>`` and plain values."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                values.setdefault(str(index), {})[name] = value
    return tensors, {"param_groups": state["param_groups"], "values": values}


def optimizer_state(tensors: dict[str, Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    """Join what :func:`optimizer_tensors` split."""
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    for index, entries in plain["values"].items():
        state.setdefault(int(index), {}).update(entries)
    return {"state": state, "param_groups": plain["param_groups"]}


def random_states(with_numpy: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the states of all random generators: PyTorch's as tensors, the rest as values.

    NumPy's, which takes a hundred microseconds, is among them only ``with_numpy``.
    """
    tensors = {"cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    plain: dict[str, Any] = {"python": random.getstate()}
    if with_numpy:
        plain["numpy"] = np.random.get_state()
    return tensors, plain


def restore_random_states(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Set all random generators to what :func:`random_states` returned, also after JSON."""
    torch.random.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    if "numpy" in plain:
        kind, keys, *rest = plain["numpy"]
        np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))


def as_json(plain: Mapping[str, Any]) -> str:
    """Return the plain part of :func:`random_states` as JSON."""
    return json.dumps(plain, default=lambda value: value.tolist())


def write_states(trainer: TrainerAdapter, folder: Path, owed: dict[str, bool] | None) -> None:
    """Write the weights and all states of a run into a checkpoint; each process writes its part.

    ``folder`` is not yet in place. ``owed`` is what a validation that was broken off still has to
    do: ``evaluate`` and ``save``.
    """
    trainer.store_flos()
    if trainer.args.should_save:
        trainer.write_model(folder, as_trained=True)
    crash_point("checkpoint:after_weights")
    interval, progress = trainer.progress()
    write_process_file(folder / PROCESS_FILE.format(trainer.args.process_index), interval)
    if not trainer.args.should_save:
        return
    tensors, plain = optimizer_tensors(trainer.optimizer.state_dict())  # type: ignore[union-attr]
    save_file(tensors, folder / OPTIMIZER_FILE)
    scheduler = trainer.lr_scheduler.state_dict()  # type: ignore[union-attr]
    scheduler.pop("lr_lambdas", None)  # functions without a state of their own
    scaler = getattr(trainer.accelerator, "scaler", None)
    state = {
        "optimizer": plain,
        "scheduler": scheduler,
        "scaler": None if scaler is None else scaler.state_dict(),
        "trainer": progress,
        "owed": owed,
        "processes": trainer.args.world_size,
    }
    (folder / STATE_FILE).write_text(json.dumps(state))
    crash_point("checkpoint:after_optimizer")
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            states: Any = trainer.state.stateful_callbacks
            states[type(callback).__name__] = callback.state()
    trainer.state.save_to_json(str(folder / TRAINER_STATE_FILE))
    crash_point("checkpoint:before_manifest")


def write_process_file(path: Path, interval: Mapping[str, Tensor]) -> None:
    """Write this process's random states, and its sums since the last record of the log."""
    tensors, plain = random_states()
    contents = {f"random.{name}": tensor for name, tensor in tensors.items()}
    contents |= {f"interval.{name}": tensor.cpu() for name, tensor in interval.items()}
    save_file(contents, path, {"plain": as_json(plain)})


def read_states(trainer: TrainerAdapter, folder: Path) -> dict[str, bool] | None:
    """Restore what :func:`write_states` wrote, except the weights; return what is owed."""
    state = read_json(folder / STATE_FILE)
    tensors = read_tensors(folder / OPTIMIZER_FILE)
    trainer.optimizer.load_state_dict(optimizer_state(tensors, state["optimizer"]))  # type: ignore[union-attr]
    scheduler: Any = trainer.lr_scheduler
    functions = {k: v for k, v in scheduler.state_dict().items() if k == "lr_lambdas"}
    scheduler.load_state_dict(state["scheduler"] | functions)
    scaler = getattr(trainer.accelerator, "scaler", None)
    if scaler is not None and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    files = [folder / PROCESS_FILE.format(rank) for rank in range(state["processes"])]
    rank = trainer.args.process_index
    if rank < len(files):  # a process that the run did not have keeps the state of its seed
        with safe_open(files[rank], framework="pt") as file:
            plain = json.loads(file.metadata()["plain"])
        restore_random_states(with_prefix(read_tensors(files[rank]), "random."), plain)
    intervals = [with_prefix(read_tensors(file), "interval.") for file in files]
    if len(files) == trainer.args.world_size:
        trainer.set_progress(intervals[rank], state["trainer"])
    else:
        trainer.set_progress(merged(intervals, rank), state["trainer"])
    trainer.seconds_before = state["trainer"].get("runtime", 0.0)
    return state["owed"]


def merged(intervals: list[dict[str, Tensor]], rank: int) -> dict[str, Tensor]:
    """Return a process's share of the sums that another number of processes kept.

    The Trainer logs the mean of the processes' losses, so each takes the mean; the parts of the
    losses are summed over processes, so the first takes them all.
    """
    parts = torch.stack([interval["parts"] for interval in intervals]).sum(0)
    return {
        "loss": torch.stack([interval["loss"] for interval in intervals]).mean(0),
        "parts": parts if rank == 0 else torch.zeros_like(parts),
    }

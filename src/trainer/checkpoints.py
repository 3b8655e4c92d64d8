"""Checkpoints that are whole or not there: safetensors and JSON, hashed, renamed into place.

A checkpoint is written under a temporary name, every file flushed to disk, a manifest with the
SHA-256 of each file added, and the directory renamed. The newest checkpoint whose files agree with
its manifest is the one to resume from; older ones are removed only after a newer one was read back
and found right, and never the best step of one that is kept. No file is a pickle, so a checkpoint
cannot run code.

Beside weights, optimiser, schedule and random states a checkpoint holds the open interval of the
log: what was summed since the last record. So a checkpoint can be made after any step, without a
trace in what the run logs later.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Trainer

from src.common.cli import say
from src.common.crash_points import crash_point
from src.common.files import (
    UNFINISHED_SUFFIX,
    is_plain_name,
    names_full_disk,
    read_json,
    remove_folder,
    sha256_file,
    sync_folder,
    write_json,
)

MANIFEST = "manifest.json"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "training_state.json"
TRAINER_STATE_FILE = "trainer_state.json"
PROCESS_FILE = "process-{}.safetensors"
"""What belongs to one process: its random states and its part of the log's open interval."""
NEEDED_FILES = (OPTIMIZER_FILE, STATE_FILE, TRAINER_STATE_FILE, PROCESS_FILE.format(0))
CHECKPOINT_NAME = re.compile(r"checkpoint-\d+")


def write_manifest(folder: Path) -> None:
    """Flush every file of a folder to disk and record their sizes and SHA-256."""
    files = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST):
        with path.open("rb+") as handle:
            os.fsync(handle.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    write_json(folder / MANIFEST, {"files": files})
    sync_folder(folder)


def fault_of(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None where every file agrees with the manifest."""
    try:
        files = read_json(folder / MANIFEST)["files"]
        for name, expected in files.items():
            if not is_plain_name(name):
                return f"{MANIFEST} names {name!r:.40}, which is no file of the checkpoint"
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if sha256_file(path) != expected["sha256"]:
                return f"{name} was altered"
        for name in NEEDED_FILES:
            if name not in files:
                return f"{MANIFEST} does not name {name}"
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return f"{MANIFEST} is missing or broken"
    return None


def checkpoints_of(run: Path) -> list[Path]:
    """Return a run's checkpoint directories, newest (highest step) first."""
    paths = run.iterdir() if run.is_dir() else []
    found = [p for p in paths if CHECKPOINT_NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def best_step_of(folder: Path) -> int | None:
    """Return the best step that a checkpoint's state names, or None where it names none."""
    try:
        return read_json(folder / TRAINER_STATE_FILE).get("best_global_step")
    except (ValueError, AttributeError, OSError):
        return None


def newest_valid(run: Path, announce: Callable[[str], None] = say) -> Path | None:
    """Return the newest checkpoint that is whole, saying which ones were passed over and why."""
    for path in checkpoints_of(run):
        fault = fault_of(path)
        if fault is None:
            return path
        announce(f"{path.name} is not used: {fault}")
    return None


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
    """Put together again what :func:`optimizer_tensors` split."""
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    for index, entries in plain["values"].items():
        state.setdefault(int(index), {}).update(entries)
    return {"state": state, "param_groups": plain["param_groups"]}


def random_states(with_numpy: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the states of all random generators: PyTorch's as tensors, the rest as values.

    Args:
        with_numpy: NumPy's too, which takes a hundred microseconds.
    """
    tensors = {"cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    plain: dict[str, Any] = {"python": random.getstate()}
    if with_numpy:
        plain["numpy"] = np.random.get_state()
    return tensors, plain


def restore_random_states(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Set all random generators to what :func:`random_states` returned, also by way of JSON."""
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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


class _TrainingIsOver(Exception):  # noqa: N818
    """A validation that was made up for on resuming ended the training."""


class AtomicCheckpointTrainer(Trainer):
    """A Trainer that saves and loads the checkpoints described above.

    A subclass that keeps sums of its own between two records of the log, or any other state of the
    training, extends :meth:`interval_tensors` (of this process), :meth:`plain_state` (of the run)
    and :meth:`restore_state`.
    """

    _finished_checkpoint: str | None = None
    """The checkpoint resumed from, where no step is left to do."""
    _known_whole: frozenset[str] = frozenset()
    """Names of checkpoints that were read back and found right when the last one was saved."""
    _owed: dict[str, bool] | None = None
    """What a checkpoint made in the middle of a validation still owes: ``evaluate``, ``save``."""

    # What a checkpoint holds beside weights and optimiser -----------------------------------------

    def interval_tensors(self) -> dict[str, Tensor]:
        """Return this process's sums since the last record of the log."""
        return {"loss": self._tr_loss.detach().clone()}

    def plain_state(self) -> dict[str, Any]:
        """Return the JSON values that :meth:`restore_state` needs."""
        return {
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
        }

    def restore_state(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Set what :meth:`interval_tensors` and :meth:`plain_state` returned."""
        self._tr_loss.copy_(tensors["loss"])
        self._total_loss_scalar = plain["total_loss"]
        self._globalstep_last_logged = plain["last_logged"]

    def merge_intervals(self, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return this process's share of sums that another number of processes kept.

        The Trainer logs the mean of the losses over processes: each takes the mean.
        """
        return {"loss": torch.stack([part["loss"] for part in parts]).mean(0)}

    # Saving ---------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint of the current step, verify it, then remove the ones it replaces."""
        run = Path(str(self.args.output_dir))
        final = run / f"checkpoint-{self.state.global_step}"
        temporary = run / f"{final.name}{UNFINISHED_SUFFIX}"
        try:
            with names_full_disk(run, self._way_out(run)):
                self._write_checkpoint(temporary)
                self._wait_for_all()
                if self.args.should_save:
                    write_manifest(temporary)
        except BaseException:
            # Of an unfinished checkpoint nothing is of use, and a full disk needs the room.
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if self.args.should_save:
            crash_point("checkpoint:after_manifest")
            outdated = None
            if final.exists():
                outdated = self._set_aside(final)
                crash_point("checkpoint:after_setting_aside")
            temporary.rename(final)
            crash_point("checkpoint:after_rename")
            sync_folder(run)
            if outdated is not None and fault_of(final) is None:
                remove_folder(outdated)
            self._prune(run, final)
            crash_point("checkpoint:after_pruning")
        self._wait_for_all()

    def _write_checkpoint(self, folder: Path) -> None:
        """Write every file of a checkpoint except the manifest."""
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            crash_point("checkpoint:begin")
        self._wait_for_all()
        self.store_flos()
        self.save_model(str(folder), _internal_call=True)
        crash_point("checkpoint:after_weights")
        self._save_rng_state(str(folder))
        if self.args.should_save:
            self._save_optimizer_and_scheduler(str(folder))
            crash_point("checkpoint:after_optimizer")
            self._save_callback_states()
            self.state.save_to_json(str(folder / TRAINER_STATE_FILE))
            crash_point("checkpoint:before_manifest")

    def _way_out(self, run: Path) -> str:
        """Return what a person can do where the disk is full."""
        good = newest_valid(run, announce=lambda line: None)
        kept = f"{good.name} is whole: " if good else ""
        return f"{kept}make space and go on with --resume"

    def _set_aside(self, final: Path) -> Path | None:
        """Move an older checkpoint of the same step away; return it if it is ours to remove."""
        if fault_of(final) is not None:
            # Found broken on resuming: kept, because a person may want to know why.
            names = (final.with_name(f"{final.name}.broken-{number}") for number in count(1))
            final.rename(next(name for name in names if not name.exists()))
            return None
        return final.rename(final.with_name(f"{final.name}.outdated{UNFINISHED_SUFFIX}"))

    def _wait_for_all(self) -> None:
        if self.args.world_size > 1:
            self.accelerator.wait_for_everyone()

    def _prune(self, run: Path, newest: Path) -> None:
        limit = self.args.save_total_limit
        if not limit or fault_of(newest) is not None:
            return
        # Those of later steps were passed over as broken on resuming. They, and broken ones of
        # earlier steps, stay for a person to look at, and in no whole one's place.
        earlier = [path for path in checkpoints_of(run) if step_of(path) < step_of(newest)]
        whole = [newest, *(path for path in earlier if self._is_whole(path))]
        self._known_whole = frozenset(path.name for path in whole)
        best = set()
        if self.state.best_global_step is not None:
            # Of every checkpoint that a run may go on from, its best must be there at the end.
            best = {f"checkpoint-{best_step_of(kept)}" for kept in whole[:limit]}
        for old in whole[limit:]:
            if old.name in best:
                continue
            # Renamed first: a checkpoint that is being removed must not look like a broken one.
            remove_folder(old.rename(old.with_name(f"{old.name}.old{UNFINISHED_SUFFIX}")))

    def _is_whole(self, checkpoint: Path) -> bool:
        """Return whether a checkpoint is whole; one that was found so is not read again."""
        return checkpoint.name in self._known_whole or fault_of(checkpoint) is None

    def _save_callback_states(self) -> None:
        """Bring the states of callbacks that have one up to date in the Trainer's state."""
        from transformers.trainer_callback import ExportableState

        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states: Any = self.state.stateful_callbacks
                states[type(callback).__name__] = callback.state()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student and its tokenizer, file by file under its name only when whole."""
        if _internal_call or not self.args.should_save:
            return super().save_model(output_dir, _internal_call)
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        temporary = folder / f"model{UNFINISHED_SUFFIX}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with names_full_disk(folder, self._way_out(folder)):
                temporary.mkdir(parents=True)
                super().save_model(str(temporary), _internal_call)
                crash_point("model:written")
                for path in sorted(temporary.iterdir()):
                    with path.open("rb+") as handle:
                        os.fsync(handle.fileno())
                    os.replace(path, folder / path.name)
                    crash_point("model:moved")
                sync_folder(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the student and its tokenizer, and no pickled arguments beside them."""
        folder = output_dir if output_dir is not None else str(self.args.output_dir)
        student = self.accelerator.unwrap_model(self.model)
        student.save_pretrained(folder, state_dict=state_dict)  # type: ignore[union-attr]
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)  # type: ignore[union-attr]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        tensors, plain = optimizer_tensors(self.optimizer.state_dict())  # type: ignore[union-attr]
        save_file(tensors, Path(output_dir) / OPTIMIZER_FILE)
        scaler = getattr(self.accelerator, "scaler", None)
        state = {
            "optimizer": plain,
            "scheduler": self.lr_scheduler.state_dict(),  # type: ignore[union-attr]
            "scaler": None if scaler is None else scaler.state_dict(),
            "trainer": self.plain_state(),
            "owed": self._owed,
            "processes": self.args.world_size,
        }
        state["scheduler"].pop("lr_lambdas", None)  # functions without a state of their own
        (Path(output_dir) / STATE_FILE).write_text(json.dumps(state))

    def _save_rng_state(self, output_dir: str) -> None:
        tensors, plain = random_states()
        contents = {f"random.{name}": tensor for name, tensor in tensors.items()}
        for name, tensor in self.interval_tensors().items():
            contents[f"interval.{name}"] = tensor.cpu()
        name = PROCESS_FILE.format(self.args.process_index)
        save_file(contents, Path(output_dir) / name, {"plain": as_json(plain)})

    def _save_scaler(self, output_dir: str) -> None:
        """Nothing: the scaler's state is saved with the optimiser's."""

    # Loading --------------------------------------------------------------------------------------

    def _init_training_state(self, max_steps: int, *arguments: Any) -> tuple[int, int]:
        """Find where training goes on; past the last epoch where it is over.

        The Trainer would make one step more of a run that was killed between its last checkpoint
        and its end, and go on with one that was stopped before its last step.
        """
        epochs_trained, steps_trained = super()._init_training_state(max_steps, *arguments)
        checkpoint = arguments[2]
        self._finished_checkpoint = None
        if checkpoint is not None and (self.state.global_step >= max_steps or self._was_stopped()):
            self._finished_checkpoint = checkpoint
            return int(arguments[1]), 0
        return epochs_trained, steps_trained

    def _was_stopped(self) -> bool:
        """Return whether the loop had been told to end when the state was saved."""
        saved: Any = self.state.stateful_callbacks.get("TrainerControl")  # type: ignore[union-attr]
        return isinstance(saved, dict) and saved["args"]["should_training_stop"]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch; one whose first act ended the training makes no step."""
        with contextlib.suppress(_TrainingIsOver):
            super()._run_epoch(*args, **kwargs)

    def load_weights(self, step: int) -> None:
        """Load the weights of the checkpoint of a step.

        Raises:
            ValueError: it is not there, or not whole.
        """
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{step}"
        fault = fault_of(folder)
        if fault is not None:
            raise ValueError(
                f"{folder}, the best of this run, is not whole: {fault}; its weights are lost: "
                "train again in another --output_dir"
            )
        self._load_from_checkpoint(str(folder))

    def _finalize_training(self, *arguments: Any) -> Any:
        """End training; what a finished run's checkpoint holds is loaded even without a step."""
        if self._finished_checkpoint is not None:
            # As it was after the last step: a validation that is made up for may save it again.
            self.control.should_training_stop = True
            self._load_rng_state(self._finished_checkpoint)
        return super()._finalize_training(*arguments)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Give the mean loss at the end over the whole run, however often it was resumed."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = read_json(Path(checkpoint) / STATE_FILE)
        tensors = read_tensors(Path(checkpoint) / OPTIMIZER_FILE)
        self.optimizer.load_state_dict(  # type: ignore[union-attr]
            optimizer_state(tensors, state["optimizer"])
        )
        scheduler = self.lr_scheduler
        lambdas = scheduler.state_dict().get("lr_lambdas")  # type: ignore[union-attr]
        if lambdas is not None:
            state["scheduler"]["lr_lambdas"] = lambdas
        scheduler.load_state_dict(state["scheduler"])  # type: ignore[union-attr]
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: the scaler's state is loaded with the optimiser's."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load this process's state, and make up for a validation that was broken off.

        The Trainer calls this once, after it has set its own sums to zero and before the first
        step: at the start of an epoch before it asks for data, within one after it has.
        """
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        state = read_json(folder / STATE_FILE)
        files = [folder / PROCESS_FILE.format(rank) for rank in range(state["processes"])]
        rank = self.args.process_index
        if rank < len(files):
            with safe_open(files[rank], framework="pt") as file:
                plain = json.loads(file.metadata()["plain"])
            restore_random_states(with_prefix(read_tensors(files[rank]), "random."), plain)
        # else: more processes than the run had; the new ones keep the state their seed gave.
        intervals = [with_prefix(read_tensors(file), "interval.") for file in files]
        same = len(files) == self.args.world_size
        interval = intervals[rank] if same else self.merge_intervals(intervals)
        self.restore_state(interval, state["trainer"])
        if state["owed"]:
            self.control.should_log = False
            self.control.should_evaluate = state["owed"]["evaluate"]
            self.control.should_save = state["owed"]["save"]
            epoch = float(self.state.epoch or 0)
            model: Any = self.model_wrapped
            self._maybe_log_save_evaluate(self._tr_loss, None, model, None, epoch, None, 0.0)
            if self.control.should_training_stop and self._finished_checkpoint is None:
                raise _TrainingIsOver

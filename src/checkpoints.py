"""Checkpoints that are whole or not there: safetensors and JSON, hashed, renamed into place.

A checkpoint is written under a temporary name, every file flushed to disk, a manifest with the
SHA-256 of each file added, and the directory renamed. The newest checkpoint whose files agree with
its manifest is the one to resume from; older ones are removed only after a newer one was read back
and found right. No file is a pickle, so a checkpoint cannot run code.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Trainer

from src.cli import say
from src.files import is_plain_name, read_json, sha256_file, sync_folder, write_json

MANIFEST = "manifest.json"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "training_state.json"
TRAINER_STATE_FILE = "trainer_state.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
UNFINISHED_SUFFIX = ".unfinished"


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
        if not files:
            return f"{MANIFEST} names no file"
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
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return f"{MANIFEST} is missing or broken"
    return None


def checkpoints_of(run: Path) -> list[Path]:
    """Return a run's checkpoint directories, newest (highest step) first."""
    found = []
    for path in run.iterdir() if run.is_dir() else []:
        match = CHECKPOINT_NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found, reverse=True)]


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


def random_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the states of all random generators: tensors of PyTorch's, JSON values of the rest."""
    tensors = {"cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    numpy_state = [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)]
    return tensors, {"python": [version, list(internal), gauss], "numpy": numpy_state}


def restore_random_states(tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Set all random generators to what :func:`random_states` returned."""
    torch.random.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = plain["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


class AtomicCheckpointTrainer(Trainer):
    """A Trainer that saves and loads the checkpoints described above."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint of the current step, verify it, then remove the ones it replaces."""
        run = Path(str(self.args.output_dir))
        final = run / f"checkpoint-{self.state.global_step}"
        temporary = run / f"{final.name}{UNFINISHED_SUFFIX}"
        if self.args.should_save:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self._wait_for_all()
        self.store_flos()
        self.save_model(str(temporary), _internal_call=True)
        self._save_rng_state(str(temporary))
        if self.args.should_save:
            self._save_optimizer_and_scheduler(str(temporary))
            self._save_callback_states()
            self.state.save_to_json(str(temporary / TRAINER_STATE_FILE))
        self._wait_for_all()
        if self.args.should_save:
            write_manifest(temporary)
            if final.exists():
                # Only a checkpoint that was found broken on resuming can stand here.
                final.rename(run / f"{final.name}.broken-{os.getpid()}")
            temporary.rename(final)
            sync_folder(run)
            self._prune(run, final)
        self._wait_for_all()

    def _maybe_log_save_evaluate(self, *arguments: Any, **options: Any) -> None:
        """Close the log's current interval before saving: its sums are in no checkpoint."""
        if self.control.should_save:
            self.control.should_log = True
        super()._maybe_log_save_evaluate(*arguments, **options)

    def _wait_for_all(self) -> None:
        if self.args.world_size > 1:
            self.accelerator.wait_for_everyone()

    def _prune(self, run: Path, newest: Path) -> None:
        limit = self.args.save_total_limit
        if not limit or fault_of(newest) is not None:
            return
        for old in checkpoints_of(run)[limit:]:
            shutil.rmtree(old)

    def _save_callback_states(self) -> None:
        """Bring the states of callbacks that have one up to date in the Trainer's state."""
        from transformers.trainer_callback import ExportableState

        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states: Any = self.state.stateful_callbacks
                states[type(callback).__name__] = callback.state()

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
        }
        state["scheduler"].pop("lr_lambdas", None)  # functions without a state of their own
        (Path(output_dir) / STATE_FILE).write_text(json.dumps(state))

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

    def _save_scaler(self, output_dir: str) -> None:
        """Nothing: the scaler's state is saved with the optimiser's."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: the scaler's state is loaded with the optimiser's."""

    def _save_rng_state(self, output_dir: str) -> None:
        tensors, plain = random_states()
        name = f"random-{self.args.process_index}.safetensors"
        save_file(tensors, Path(output_dir) / name, {"plain": json.dumps(plain)})

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = Path(checkpoint) / f"random-{self.args.process_index}.safetensors"
        if not path.is_file():
            # More processes than the run had: the new ones keep the state that their seed gave.
            return
        with safe_open(path, framework="pt") as file:
            plain = json.loads(file.metadata()["plain"])
        restore_random_states(read_tensors(path), plain)

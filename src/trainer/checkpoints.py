"""Checkpoints that are whole or absent: safetensors and JSON, hashed, renamed into place.

A checkpoint is written under a temporary name. Every file is flushed to disk, a manifest with the
SHA-256 of each file is added, and the directory is renamed. A run resumes from the newest
checkpoint whose files agree with its manifest. Older ones are removed only after a newer one was
read back and found right, and never the best step of one that is kept. No file is a pickle, so a
checkpoint cannot run code. What the files hold is in :mod:`src.trainer.states`;
:func:`src.training.stages.fit` resumes from them.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from src.common.cli import say
from src.common.crash_points import crash_point
from src.common.files import (
    UNFINISHED_SUFFIX,
    names_full_disk,
    read_json,
    remove_folder,
    sync_folder,
    write_json,
)
from src.common.manifest import file_entry, first_fault, is_record
from src.common.runs import GO_ON

MANIFEST = "manifest.json"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "training_state.json"
TRAINER_STATE_FILE = "trainer_state.json"
PROCESS_FILE = "process-{}.safetensors"
"""One process's random states, and its sums since the last record of the log."""
NEEDED_FILES = (OPTIMIZER_FILE, STATE_FILE, TRAINER_STATE_FILE, PROCESS_FILE.format(0))
CHECKPOINT_NAME = re.compile(r"checkpoint-\d+")


def write_manifest(folder: Path) -> None:
    """Flush every file of a folder to disk and record their sizes and SHA-256."""
    files = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST):
        with path.open("rb+") as handle:
            os.fsync(handle.fileno())
        files[path.name] = file_entry(path)
    write_json(folder / MANIFEST, {"files": files})
    sync_folder(folder)


def fault_of(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None where every file agrees with the manifest."""
    broken = f"{MANIFEST} is missing or broken"
    try:
        files = read_json(folder / MANIFEST)["files"]
        if not is_record(files):
            return broken
        if missing := [name for name in NEEDED_FILES if name not in files]:
            return f"{MANIFEST} does not name {missing[0]}"
        return first_fault(folder, files)
    except (ValueError, KeyError, TypeError, OSError):
        return broken


def checkpoints_of(run: Path) -> list[Path]:
    """Return a run's checkpoint directories, newest (highest step) first."""
    paths = run.iterdir() if run.is_dir() else []
    folders = [p for p in paths if CHECKPOINT_NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(folders, key=step_of, reverse=True)


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
    """Return the newest whole checkpoint; announce which ones are passed over and why."""
    for path in checkpoints_of(run):
        fault = fault_of(path)
        if fault is None:
            return path
        announce(f"{path.name} is not used: {fault}")
    return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


class CheckpointManager:
    """Writes a run's checkpoints, verifies them, and removes the ones they replace.

    Args:
        run: the run's directory.
        keep: how many whole checkpoints to keep; None: all.
        writes: whether this process writes what belongs to all processes.
        wait: returns when all processes have called it.
    """

    def __init__(self, run: Path, keep: int | None, writes: bool, wait: Callable[[], None]) -> None:
        self.run, self.keep, self.writes, self.wait = run, keep, writes, wait
        self._known_whole: set[str] = set()
        """Names of checkpoints that this process has read back and found right."""

    def path(self, step: int) -> Path:
        """Return the directory of a step's checkpoint."""
        return self.run / f"checkpoint-{step}"

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Write a step's checkpoint, verify it, then remove the ones it replaces.

        ``write`` writes every file but the manifest into a directory, in all processes.
        """
        final = self.path(step)
        temporary = final.with_name(f"{final.name}{UNFINISHED_SUFFIX}")
        try:
            with names_full_disk(self.run, self.advice()):
                if self.writes:
                    shutil.rmtree(temporary, ignore_errors=True)
                    temporary.mkdir(parents=True)
                    crash_point("checkpoint:begin")
                self.wait()
                write(temporary)
                self.wait()
                if self.writes:
                    write_manifest(temporary)
        except BaseException:
            # An unfinished checkpoint is of no use, and a full disk needs the room.
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if self.writes:
            self._put_in_place(temporary, final)
        self.wait()

    def _put_in_place(self, temporary: Path, final: Path) -> None:
        crash_point("checkpoint:after_manifest")
        self._known_whole.discard(final.name)
        outdated = None
        if final.exists():
            outdated = self._set_aside(final)
            crash_point("checkpoint:after_setting_aside")
        temporary.rename(final)
        crash_point("checkpoint:after_rename")
        sync_folder(self.run)
        if outdated is not None and self._is_whole(final):
            remove_folder(outdated)
        if self.keep and self._is_whole(final):
            self._prune(final, self.keep)
        crash_point("checkpoint:after_pruning")

    def _set_aside(self, final: Path) -> Path | None:
        """Move an older checkpoint of the same step away; return it if it is ours to remove."""
        if fault_of(final) is not None:
            # A broken one is kept, because a person may want to know why.
            names = (final.with_name(f"{final.name}.broken-{number}") for number in count(1))
            final.rename(next(name for name in names if not name.exists()))
            return None
        return final.rename(final.with_name(f"{final.name}.outdated{UNFINISHED_SUFFIX}"))

    def _prune(self, newest: Path, keep: int) -> None:
        # Checkpoints of later steps were found broken on resuming. They and broken ones of earlier
        # steps stay for a person to look at, and do not count.
        earlier = [path for path in checkpoints_of(self.run) if step_of(path) < step_of(newest)]
        whole = [newest, *filter(self._is_whole, earlier)]
        # A run may go on from any checkpoint that is kept, and needs its best step at the end.
        best = {f"checkpoint-{best_step_of(path)}" for path in whole[:keep]}
        for old in whole[keep:]:
            if old.name not in best:
                # Renamed first: one that is being removed must not look like a broken one.
                remove_folder(old.rename(old.with_name(f"{old.name}.old{UNFINISHED_SUFFIX}")))

    def _is_whole(self, checkpoint: Path) -> bool:
        """Return whether a checkpoint is whole; it is read only once."""
        if checkpoint.name not in self._known_whole and fault_of(checkpoint) is None:
            self._known_whole.add(checkpoint.name)
        return checkpoint.name in self._known_whole

    def save_model(self, folder: Path, write: Callable[[Path], None]) -> None:
        """Write a model; each file appears in ``folder`` under its name only when whole."""
        temporary = folder / f"model{UNFINISHED_SUFFIX}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with names_full_disk(folder, self.advice()):
                temporary.mkdir(parents=True)
                write(temporary)
                crash_point("model:written")
                for path in sorted(temporary.iterdir()):
                    with path.open("rb+") as handle:
                        os.fsync(handle.fileno())
                    os.replace(path, folder / path.name)
                    crash_point("model:moved")
                sync_folder(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def holds(self, step: int) -> bool:
        """Return whether there is a whole checkpoint of a step."""
        return self.path(step).is_dir() and fault_of(self.path(step)) is None

    def newest(self) -> Path | None:
        """Return the newest whole checkpoint, or None."""
        return next(filter(self._is_whole, checkpoints_of(self.run)), None)

    def advice(self) -> str:
        """Return what a person can do if the disk is full."""
        newest = self.newest()
        kept = f"{newest.name} is whole: " if newest else ""
        return f"{kept}make space: {GO_ON}"

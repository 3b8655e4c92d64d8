"""A run's directory: its lock, its record ``run.json``, and whether a run may use it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from src.common import processes
from src.common.cli import printable
from src.common.files import is_temporary, names_full_disk, read_json, write_json
from src.common.privacy import publishable

GO_ON = "the same command goes on (train.py: with --resume)"
"""How a stopped training goes on, whichever script began it."""
RUN_FILE = "run.json"
LOCK_FILE = ".lock"
SCHEMA_VERSION = 1
FINISHED = "finished"
RUNNING = "running"
NAMES = (
    ("teacher", "name"),
    ("settings", "teacher_model"),
    ("data", "source"),
    ("settings", "data"),
)
"""Entries of a record that name a model or data, which evaluation opens."""
PATHS = ("teacher_model", "data", "init_from", "tokenizer")
"""Settings that may be paths; they are equal if they lead to the same file."""
LONGEST_NAME = 500
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "datasets", "numpy", "safetensors")

HOLDER = re.compile(r"(process \d+ on .*)?")
"""Content of a lock file: the process that holds it, or held it last."""


class InUseError(ValueError):
    """Another process holds a directory."""


@contextmanager
def locked(
    folder: Path, flag: str = "--output_dir", announce: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Lock a directory, which is made if missing, for this process.

    The system frees the lock when the process ends, even if it is killed. Forked data workers do
    not inherit it. The message names ``flag``, which chooses another directory. With ``announce``,
    which is called with a line, a directory in use is waited for.

    Raises:
        InUseError: another process has locked it.
        ValueError: a file that is not ours has the lock file's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    if not _may_be_lock(path):
        raise ValueError(f"{path} is no lock that we wrote: choose another {flag}")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = path.read_text(encoding="utf-8").strip() or "another process"
        if announce is None:
            raise InUseError(
                f"{folder} is in use by {holder}: wait for it, or choose another {flag}"
            ) from None
        announce(f"waiting for {folder}, in use by {holder}")
        lock.acquire(poll_interval=1)
    try:
        path.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        lock.release()


def _may_be_lock(path: Path) -> bool:
    """Return whether a path is free, or is a lock file that this program wrote."""
    if not os.path.lexists(path):
        return True
    if path.is_symlink() or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as handle:
        return HOLDER.fullmatch(handle.read(1000)) is not None


def read_run(folder: str | Path) -> dict[str, Any]:
    """Return a run's record. Raises ``ValueError`` if it is missing or broken."""
    path = Path(folder) / RUN_FILE
    record = read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise ValueError(f"{path}: not the record of a run")
    version = record.get("schema_version", 0)
    if isinstance(version, bool) or not isinstance(version, int):
        raise ValueError(f"{path}: schema_version must be a whole number, got {version!r:.40}")
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{path}: schema_version {version} is newer than this program's {SCHEMA_VERSION}: "
            "update the program"
        )
    for section, name in NAMES:
        value = record.get(section) or {}
        if not isinstance(value, dict):
            raise ValueError(f"{path}: {section} must be an object, got {value!r:.40}")
        named = value.get(name)
        right = isinstance(named, str) and 0 < len(named) <= LONGEST_NAME and named.isprintable()
        if named is not None and not right:
            raise ValueError(f"{path}: {section}.{name} must be a name, got {named!r:.40}")
    resumed = record.get("resumed")
    if resumed is not None and not isinstance(resumed, list):
        raise ValueError(f"{path}: resumed must be a list, got {resumed!r:.40}")
    return record


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the names of settings that differ, nested ones with dots."""
    names = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            names += changed_settings(before, after, f"{prefix}{key}.")
        elif before != after:
            names.append(prefix + key)
    return names


def is_begun(folder: Path, marker: str, flag: str) -> bool:
    """Return whether a directory holds a run that has begun: it has the file ``marker``.

    Raises:
        ValueError: without ``marker``, the directory holds more than a lock and unfinished files.
    """
    if (folder / marker).is_file():
        return True
    contents = [path.name for path in folder.iterdir()] if folder.exists() else []
    lock = LOCK_FILE if _may_be_lock(folder / LOCK_FILE) else None
    if all(name == lock or is_temporary(name) for name in contents):
        return False
    raise ValueError(f"{folder} holds files that no run of ours wrote: choose another {flag}")


def claim_folder(
    folder: Path, settings: Mapping[str, Any], resume: bool, flag: str = "--output_dir"
) -> str:
    """Return what a run must do with its output directory; nothing in it is changed.

    Returns:
        ``new`` (empty or absent), ``resume`` (the same run, unfinished) or ``finished`` (the same
        run, done).

    Raises:
        ValueError: the directory holds something else, or the same run, unfinished, and ``resume``
            is not set.
    """
    if not is_begun(folder, RUN_FILE, flag):
        return "new"
    record = read_run(folder)
    directory = record.get("directory")
    began_in = os.path.join(folder, directory) if isinstance(directory, str) else os.curdir
    changed = changes_of_run(record["settings"], settings, began_in)
    if changed:
        names = printable(", ".join(changed[:20]))[:300]
        raise ValueError(
            f"{folder} holds a run with other settings ({names}): choose another {flag}"
        )
    if record.get("status") == FINISHED:
        return "finished"
    if not resume:
        raise ValueError(
            f"{folder} holds an unfinished run of these settings: pass --resume to go on, "
            f"or choose another {flag}"
        )
    return "resume"


def rows_of_step(record: Mapping[str, Any]) -> int:
    """Return the proteins or packed rows of an optimiser step, of all processes, from a record."""
    settings = record["settings"]
    rows = settings["batch_size"] * settings["gradient_accumulation_steps"]
    return rows * (record.get("processes") or 1)  # the first records do not count the processes


def changes_of_run(
    recorded: Mapping[str, Any], settings: Mapping[str, Any], began_in: str = os.curdir
) -> list[str]:
    """Return the names of settings that differ from those of a run that began in a directory.

    Paths are equal that lead to the same file.
    """
    before, now = relative_paths(recorded), relative_paths(settings)
    for name in PATHS:
        for values, base in ((before, began_in), (now, os.curdir)):
            if isinstance(values.get(name), str):
                values[name] = _place(values[name], base)
    return changed_settings(before, now)


def _place(name: str, base: str) -> str:
    """Return the real path of a name seen from ``base``; the name itself if no file is there.

    Of several names with commas between them, those of each.
    """
    path = os.path.realpath(os.path.join(base, os.path.expanduser(name)))
    if os.path.exists(path):
        return path
    return ",".join(_place(part, base) for part in name.split(",")) if "," in name else name


def provenance() -> dict[str, Any]:
    """Return command, commit, versions and platform, without secrets and private paths."""
    return {
        "command": [Path(sys.argv[0]).name, *publishable(sys.argv[1:])],
        "git": git_state(),
        "versions": versions(),
        "platform": {
            "system": platform.system(),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
        },
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def relative_paths(value: Any) -> Any:
    """Return a JSON value with its absolute paths made relative, for a record that is read back.

    Paths become relative to the working directory, or to the home directory (``~/…``) if only that
    holds them; ``--flag=/path`` counts as a path. They may still show private names: use
    :func:`src.common.privacy.publishable` for what is published.
    """
    if isinstance(value, Mapping):
        return {key: relative_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [relative_paths(item) for item in value]
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str):
        return value
    flag, path = re.fullmatch(r"(--?\w+=)?(.*)", value, re.DOTALL).groups("")  # type: ignore[union-attr]
    if not os.path.isabs(path):
        return value
    here, home = Path.cwd(), Path.home()
    if Path(path).is_relative_to(home) and not Path(path).is_relative_to(here):
        return f"{flag}~/{Path(path).relative_to(home)}"
    return flag + os.path.relpath(path)


def git_state() -> dict[str, Any]:
    """Return the commit of the code and whether files differ from it; None without git."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    status = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect results."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed


def write_run(folder: Path, record: Mapping[str, Any]) -> None:
    """Write a run's record atomically in rank 0, with relative paths.

    ``directory`` in the record is the directory that they are relative to, seen from the run's own;
    it is written only if it is like ``..`` or ``../..`` and so shows no names.
    """
    if not processes.is_first():
        return
    directory = os.path.relpath(os.path.realpath(os.curdir), os.path.realpath(folder))
    if set(Path(directory).parts) <= {os.pardir}:
        record = {"directory": directory, **record}
    with names_full_disk(folder, f"make space: {GO_ON}"):
        write_json(folder / RUN_FILE, relative_paths({"schema_version": SCHEMA_VERSION, **record}))

"""A run's directory: who may write to it, what made it, and where it stands."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from src.common import processes
from src.common.cli import printable
from src.common.files import is_temporary, names_full_disk, read_json, write_json
from src.common.privacy import publishable

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
"""Where a record names a model or data: evaluation opens what stands there."""
PATHS = ("teacher_model", "data", "init_from")
"""Settings that may be paths: the same file however it is spelt, and wherever a run goes on."""
LONGEST_NAME = 500
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "datasets", "numpy", "safetensors")


HOLDER = re.compile(r"(process \d+ on .*)?")
"""What a lock file says of the process that holds it, or held it last."""


class InUseError(ValueError):
    """Another process holds a directory."""


@contextmanager
def locked(folder: Path, flag: str = "--output_dir") -> Iterator[None]:
    """Hold a run directory for this process alone.

    The system frees the lock however the process ends, so the lock file of a killed run can be
    locked again. Forked data workers do not inherit it.

    Args:
        folder: what to hold; made where it is not there.
        flag: with which the user chooses another, for the message.

    Raises:
        InUseError: another process holds it.
        ValueError: what has the name of its lock file was not written by us.
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
        raise InUseError(
            f"{folder} is in use by {holder}: wait for it, or choose another {flag}"
        ) from None
    try:
        path.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        lock.release()


def _may_be_lock(path: Path) -> bool:
    """Return whether a name is free for a lock, or stands for one of ours."""
    if not os.path.lexists(path):
        return True
    if path.is_symlink() or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as handle:
        return HOLDER.fullmatch(handle.read(1000)) is not None


def read_run(folder: str | Path) -> dict[str, Any]:
    """Read a run's record. Raises ``ValueError`` where there is none or it is not one."""
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
        if named is not None and not _is_name(named):
            raise ValueError(f"{path}: {section}.{name} must be a name, got {named!r:.40}")
    resumed = record.get("resumed")
    if resumed is not None and not isinstance(resumed, list):
        raise ValueError(f"{path}: resumed must be a list, got {resumed!r:.40}")
    return record


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable()


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
    """Return whether a directory holds work of ours, told by a file that is written first.

    Without it the directory is absent, empty, or left by a process that was killed at its start.

    Raises:
        ValueError: it holds something else.
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
    """Decide what a run may do with its output directory. Nothing in it is touched.

    Args:
        folder: the output directory.
        settings: what the run is about to do, as JSON values.
        resume: whether the user asked to go on.
        flag: with which the user chooses another, for the message.

    Returns:
        ``new`` (empty or absent), ``resume`` (the same run, unfinished) or ``finished`` (the same
        run, done).

    Raises:
        ValueError: something else is there, or the same run, unfinished, without ``--resume``.
    """
    if not is_begun(folder, RUN_FILE, flag):
        return "new"
    record = read_run(folder)
    before = relative_paths(record["settings"])
    now = relative_paths(settings)
    directory = record.get("directory")
    began_in = os.path.join(folder, directory) if isinstance(directory, str) else os.curdir
    for name in PATHS:
        for recorded, base in ((before, began_in), (now, os.curdir)):
            if isinstance(recorded.get(name), str):
                recorded[name] = _place(recorded[name], base)
    changed = changed_settings(before, now)
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


def _place(name: str, base: str) -> str:
    """Return where a path leads from a directory; a name that leads nowhere, such as a hub id."""
    path = os.path.realpath(os.path.join(base, os.path.expanduser(name)))
    return path if os.path.exists(path) else name


def provenance() -> dict[str, Any]:
    """Return what made a result, without secrets and private paths: command, commit, versions."""
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
    """Return a value for a record of this machine that is read back: its absolute paths relative.

    They still lead to what they name, through directories of others where it stands outside: what
    is published goes through :func:`src.common.privacy.publishable`.

    Args:
        value: text, or lists and objects of it. ``--flag=/path`` counts as a path, too.

    Returns:
        The same with each absolute path relative to the working directory, or to the home
        directory (``~/…``, which readers expand) where only that holds it.
    """
    if isinstance(value, Mapping):
        return {key: relative_paths(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [relative_paths(each) for each in value]
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
    """Return the commit of the code and whether files differ from it; None outside a checkout."""
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
    """Return the versions of Python and of the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_run(folder: Path, record: Mapping[str, Any]) -> None:
    """Write a run's record atomically, its paths relative; of several processes the first does.

    ``directory`` says from where they are relative, seen from the run's own, where that names
    nothing: ``..`` or ``../..``.
    """
    if not processes.is_first():
        return
    directory = os.path.relpath(os.path.realpath(os.curdir), os.path.realpath(folder))
    if set(Path(directory).parts) <= {os.pardir}:
        record = {"directory": directory, **record}
    with names_full_disk(folder, "make space and go on with --resume"):
        write_json(folder / RUN_FILE, relative_paths({"schema_version": SCHEMA_VERSION, **record}))

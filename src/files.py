"""Writes files so that a reader never meets half of one, and reads and hashes them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from src.crash_points import crash_point

UNFINISHED_SUFFIX = ".unfinished"
"""Of the name of a directory that is not yet whole."""
UNFINISHED_NAME = re.compile(r"(checkpoint-\d+(\.\w+)?|model)" + re.escape(UNFINISHED_SUFFIX))
TEMPORARY_NAME = re.compile(r"\..+\.[^.]{8}\.tmp")
FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside ``path``; at the end sync it and give it that name.

    Args:
        path: where the file shall stand; missing folders are made.
        mode: ``w`` or ``wb``.

    Yields:
        The open temporary file. If the body raises, ``path`` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        encoding = None if "b" in mode else "utf-8"
        with os.fdopen(descriptor, mode, encoding=encoding) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        # mkstemp makes private files; results are meant to be shared like any other file.
        os.chmod(name, 0o666 & ~_umask())
        crash_point(f"write:{path.name}")
        os.replace(name, path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def is_temporary(name: str) -> bool:
    """Return whether :func:`atomic_write` gives such a name to a file that is not yet whole."""
    return TEMPORARY_NAME.fullmatch(name) is not None


def remove_unfinished(folder: Path) -> list[str]:
    """Remove what a killed process left half-written in a directory, and return its names.

    Only names that this program gives to files and directories before they are whole are touched.
    """
    removed = []
    for path in sorted(folder.iterdir()):
        if UNFINISHED_NAME.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path)
        elif is_temporary(path.name):
            path.unlink(missing_ok=True)
        else:
            continue
        removed.append(path.name)
    return removed


@contextlib.contextmanager
def names_full_disk(folder: str | Path, way_out: str) -> Iterator[None]:
    """Turn the many errors of a full disk into a ``ValueError`` of one line.

    Args:
        folder: what was written to.
        way_out: what the user can do.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors reports the system's error in its text alone.
        code = getattr(error, "errno", None)
        if code in FULL or any(f"os error {number})" in str(error) for number in FULL):
            raise ValueError(f"{folder}: no space left on the disk; {way_out}") from error
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def sync_folder(folder: str | Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write text atomically."""
    with atomic_write(path) as handle:
        handle.write(text)


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically: indented, strict (a NaN or infinity raises ``ValueError``)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON. Raises ``ValueError`` naming the file, and the line where it is broken."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"{path}: cannot be read ({reason})") from None
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        where = f"line {error.lineno}: " if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{path}: {where}not valid JSON") from None


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()

"""Writes files atomically; reads JSON; hashes files."""

from __future__ import annotations

import contextlib
import errno
import glob
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeGuard

from src.common.crash_points import crash_point

UNFINISHED_SUFFIX = ".unfinished"
"""Suffix of unfinished files and directories."""
UNFINISHED_NAME = re.compile(r"(checkpoint-\d+(\.\w+)?|model)" + re.escape(UNFINISHED_SUFFIX))
TEMPORARY_NAME = re.compile(r"\..+\.[a-z0-9_]{8}" + re.escape(UNFINISHED_SUFFIX))
FULL = (errno.ENOSPC, errno.EDQUOT)
MAX_JSON_BYTES = 1 << 25
MAX_JSON_DEPTH = 100
"""More than any file of this program needs, and far below Python's recursion limit."""


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside ``path``; at the end sync it and rename it to ``path``.

    Missing folders are made. ``mode`` is ``w`` or ``wb``. If the body raises, ``path`` stays as it
    was. Text for a file that is named .gz is packed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(
        prefix=f".{path.name}.", suffix=UNFINISHED_SUFFIX, dir=path.parent
    )
    try:
        with os.fdopen(descriptor, "wb") as handle:
            if "b" in mode:
                yield handle
            else:
                packs = path.suffix == ".gz"
                with gzipped(handle) if packs else contextlib.nullcontext(handle) as raw:
                    text = io.TextIOWrapper(raw, encoding="utf-8", newline="")  # type: ignore[arg-type]
                    yield text
                    text.detach()
            handle.flush()
            os.fsync(handle.fileno())
        # mkstemp makes private files; ours get the usual permissions.
        os.chmod(name, 0o666 & ~_umask())
        crash_point(f"write:{path.name}")
        os.replace(name, path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def gzipped(raw: IO[bytes]) -> gzip.GzipFile:
    """Return a file that packs into ``raw``; the bytes depend on the content: no time, no name."""
    return gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=raw, mtime=0)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Make a temporary directory beside ``path``; at the end rename it to ``path``.

    ``path`` must be missing or an empty directory. If the body raises, nothing is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(
        tempfile.mkdtemp(prefix=f".{path.name}.", suffix=UNFINISHED_SUFFIX, dir=path.parent)
    )
    try:
        os.chmod(work, 0o755)
        yield work
        os.rename(work, path)  # fails if the directory is no longer empty
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def is_temporary(name: str) -> bool:
    """Return whether a name is that of an unfinished file of :func:`atomic_write`."""
    return TEMPORARY_NAME.fullmatch(name) is not None


def remove_unfinished(folder: Path) -> list[str]:
    """Remove the unfinished files and directories of a killed process and return their names.

    Only names that this program gives are removed.
    """
    removed = []
    for path in sorted(folder.iterdir()):
        if UNFINISHED_NAME.fullmatch(path.name) and path.is_dir():
            remove_folder(path)
        elif is_temporary(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            continue
        removed.append(path.name)
    return removed


def remove_folder(path: Path) -> None:
    """Remove a directory with its contents; if it is a link, only the link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def remove_temporaries_of(path: Path) -> None:
    """Remove the temporary files and directories of ``path`` that killed processes left.

    No other process may be writing ``path``.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{UNFINISHED_SUFFIX}"):
        if is_temporary(left.name) and left.is_dir():
            remove_folder(left)
        elif is_temporary(left.name):
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def names_full_disk(folder: str | Path, advice: str) -> Iterator[None]:
    """Turn the errors of a full disk into a ``ValueError`` that names the folder and the advice."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors gives the system's error only in its text.
        code = getattr(error, "errno", None)
        if code in FULL or any(f"os error {number})" in str(error) for number in FULL):
            raise ValueError(f"{folder}: no space left on the disk; {advice}") from error
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


def check_outputs(
    *paths: str | Path | None, overwrite: bool, inputs: Iterable[str | Path | None] = ()
) -> None:
    """Check before the work that its output files can be written; entries of None are skipped.

    Raises:
        ValueError: a file exists and ``overwrite`` is not set, a file cannot be written, two
            outputs are the same file, or one is an input.
    """
    taken = set()
    read = {Path(path).resolve() for path in inputs if path is not None}
    for path in (Path(path) for path in paths if path is not None):
        if path.is_dir():
            raise ValueError(f"{path} is a directory: name a file, for example {path / 'name'}")
        if path.resolve() in read:
            raise ValueError(f"{path} is an input: name another file for what is written")
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists: pass --overwrite to replace it, or name another file")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir():
            raise ValueError(f"{path} cannot be written: {folder} is a file, not a directory")
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(f"{path} cannot be written in {folder}: {error.strerror}") from None
        if path.resolve() in taken:
            raise ValueError(f"{path} is named for two outputs: give each a file of its own")
        taken.add(path.resolve())


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically: indented, strict (a NaN or infinity raises ``ValueError``)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Return the value in a JSON file.

    Parsed values take about forty times the bytes, so no file above ``max_bytes`` is read.

    Raises:
        ValueError: the file is missing, too large, nested too deeply or broken, or an object has a
            key twice. The message names the file and the line.
    """
    try:
        text = _read_bounded(path, max_bytes).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({_reason(error)})") from None
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno}: not valid JSON") from None
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if is_nested_beyond(value, MAX_JSON_DEPTH):
        raise ValueError(f"{path}: nested more than {MAX_JSON_DEPTH} deep: is this the right file?")
    return value


def read_json_lines(path: str | Path, max_bytes: int = MAX_JSON_BYTES) -> list[dict[str, Any]]:
    """Return the JSON objects of a file, one a line, without an unfinished last line.

    Raises:
        ValueError: the file cannot be read or is too large, or a line before the last is no object.
    """
    try:
        raw = _read_bounded(path, max_bytes)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({_reason(error)})") from None
    records, lines = [], raw.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and not is_nested_beyond(value, MAX_JSON_DEPTH):
            records.append(value)
        elif number < len(lines):
            raise ValueError(f"{path}: line {number}: not a JSON object: move the file away")
    return records


def _read_bounded(path: str | Path, max_bytes: int) -> bytes:
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError("is no file")  # a pipe or a device may have no end
    with open(path, "rb") as handle:
        raw = handle.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise ValueError(f"over {max_bytes:,} bytes: is this the right file?")
    return raw


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def is_nested_beyond(value: Any, depth: int) -> bool:
    """Return whether lists and objects are nested more than ``depth`` times."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(depth):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
    return bool(level)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raises ``ValueError`` if a key is in it twice."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object has a key twice")
    return value


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return whether a JSON value is a number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_plain_name(name: Any) -> bool:
    """Return whether a name is one plain file name, without a path."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and len(name) <= 200
        and not {"/", "\\", "\0"} & set(name)
        and name.isprintable()
    )


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def replace_section(path: str | Path, name: str, text: str) -> None:
    """Replace the text between ``<!-- name -->`` and ``<!-- /name -->`` in a document.

    Raises:
        ValueError: the document cannot be read, or does not have both marks once, in this order.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    try:
        whole = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{path}: cannot be read") from None
    before, first, rest = whole.partition(start)
    _, last, after = rest.partition(end)
    if not first or not last or start in rest or end in after:
        raise ValueError(f"{path}: needs the marks {start} and {end}, each once and in this order")
    write_text(path, f"{before}{start}\n{text.strip()}\n{end}{after}")

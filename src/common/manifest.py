"""Manifests: the size and SHA-256 of files, recorded so that damage is noticed.

A record of files is ``{name: {"bytes": size, "sha256": hash}}``, all in one directory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.common.files import is_plain_name, sha256_file

Record = Mapping[str, Mapping[str, Any]]


def file_entry(path: Path) -> dict[str, Any]:
    """Return the size and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def is_record(files: Any) -> bool:
    """Return whether a value is a record of files, whose names stay inside their directory."""
    return isinstance(files, Mapping) and all(
        is_plain_name(name)
        and isinstance(entry, Mapping)
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("sha256"), str)
        for name, entry in files.items()
    )


def first_fault(folder: Path, files: Record, hashes: bool = True) -> str | None:
    """Return the first file that differs from its record and how, or None.

    Without ``hashes`` only sizes are compared.
    """
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != entry["bytes"]:
            return f"{path} has {size:,} bytes instead of {entry['bytes']:,}"
        if hashes and sha256_file(path) != entry["sha256"]:
            return f"{path} was altered"
    return None


def signature(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its entry ``check``, which holds this value."""
    state = {key: value for key, value in manifest.items() if key != "check"}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

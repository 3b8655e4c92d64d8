"""Finds the files of a source of proteins: a directory of parts, files, a pattern, or the hub."""

from __future__ import annotations

import os
import re
from glob import glob
from pathlib import Path

from src.common.cli import printable
from src.proteins.formats import SUFFIXES
from src.proteins.readers import hub_problem

PART_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
"""What a part may be called."""
PIECE = re.compile(r"[\w.]+-\d+-of-\d+\.parquet|[\w.]+-\d+\.parquet")
OWN_FILES = ("clusters", "readme", "license")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(source: str) -> bool:
    """Return whether a source may be the name of a data set on the hub."""
    return bool(HUB_ID.fullmatch(source)) and Path(source).suffix.lower() not in {*SUFFIXES, ".gz"}


def on_hub(source: str | Path) -> bool:
    """Return whether a source is read from the hub, because it is nothing on this machine."""
    return not _several(str(source)) and not os.path.exists(source) and is_hub_id(str(source))


def part_files(folder: Path, split: str) -> list[Path]:
    """Return the files of one part of a directory, in order; none if the part is missing.

    Raises:
        ValueError: several different files have the part's name.
    """
    names = PART_NAMES.get(split, (split,))
    there = sorted(p for p in folder.iterdir() if p.is_file() and _stem(p) is not None)
    files = [p for p in there if _stem(p) in names]
    pieces = [p for p in there if PIECE.fullmatch(p.name) and p.name.split("-")[0] in names]
    if len(files) > 1 or (files and pieces):
        shown = ", ".join(p.name for p in (files + pieces)[:3])
        raise ValueError(f"{folder}: several files for the part {split!r} ({shown}): keep one")
    return files or pieces


def _stem(path: Path) -> str | None:
    """Return a file's name in lower case without its suffixes, None if it is no kind we read."""
    name = path.name.lower()
    name = name.removesuffix(".gz")
    stem, dot, suffix = name.rpartition(".")
    return stem if stem and dot + suffix in SUFFIXES else None


def unread_files(folder: Path) -> list[str]:
    """Return the files of a directory that look like proteins and belong to no part."""
    known = {name for names in PART_NAMES.values() for name in names}
    unread = []
    for path in sorted(folder.iterdir()):
        stem = _stem(path) if path.is_file() else None
        part = path.name.split("-")[0] if PIECE.fullmatch(path.name) else stem
        own = part is None or part in known or part.startswith("test_")
        if not own and part not in OWN_FILES and path.suffix.lower() != ".json":
            unread.append(path.name)
    return unread


def _several(source: str) -> list[Path]:
    """Return the files of a source that is a pattern or several paths with commas between them.

    Many paths together are longer than the name of a file may be: ``os.path`` finds no such file,
    where ``Path`` raises.

    Raises:
        ValueError: one of them is not there, or no file.
    """
    if os.path.exists(source) or not re.search(r"[,*?\[]", source):
        return []
    files: list[Path] = []
    pieces = [piece for piece in source.split(",") if piece]
    while pieces:
        # A name may hold commas itself: then its first pieces are nothing that is there.
        for count in range(1, len(pieces) + 1):
            name = ",".join(pieces[:count])
            matched = [Path(name)] if os.path.exists(name) else sorted(map(Path, glob(name)))
            if matched:
                break
        else:
            raise ValueError(f"{pieces[0]}: there is no such file")
        del pieces[:count]
        folders = [path for path in matched if not path.is_file()]
        if folders:
            raise ValueError(f"{folders[0]}: is no file: several sources have to be files")
        files += [path for path in matched if path not in files]
    return files


def _path(source: str | Path) -> Path:
    """Return a source as a path. Raises ``ValueError`` for an empty name (it would mean ``.``)."""
    if not str(source).strip():
        raise ValueError("--data is an empty name: pass a file, a directory or a hub data set")
    return Path(source)


def local_files(source: str | Path, split: str | None) -> list[Path] | None:
    """Return the files to read, or None if the source is a data set on the hub.

    A source is a directory, a file, several files or a pattern, or a hub id. Files have only the
    part ``train``.

    Raises:
        ValueError: there is no such file, directory or part.
    """
    path = _path(source)
    if os.path.isdir(path):
        if split is None:
            raise ValueError(f"{path}: is a directory of parts: give one file of it")
        files = part_files(path, split)
        if not files:
            there = [p for p in PART_NAMES if part_files(path, p)]
            unread = unread_files(path)
            more = f"; not read: {printable(', '.join(unread[:5]))}" if unread else ""
            if any(path.glob("*.arrow")):
                more += " (Arrow files of a saved data set: write parquet with to_parquet)"
            raise ValueError(
                f"{path}: no {split}.fasta.gz (or .fasta, .txt, .csv, .parquet); "
                f"{'it has ' + ', '.join(there) if there else 'it holds no part at all'}{more}"
            )
        return files
    files = [path] if os.path.isfile(path) else _several(str(source))
    if files:
        if split not in (None, "train"):
            what = "is one file" if len(files) == 1 else f"are {len(files)} files"
            raise ValueError(
                f"{source}: {what} and has no {split} part: make a directory of parts with "
                "scripts/split_data.py"
            )
        return files
    if path.exists():
        raise ValueError(f"{path}: is neither a file nor a directory")
    if not is_hub_id(str(source)):
        raise ValueError(f"{source}: there is no such file or directory")
    return None


def has_split(source: str | Path, split: str) -> bool:
    """Return whether a source has a part of that name; files have only ``train``.

    Raises:
        ValueError: the source is missing, or the hub cannot be reached.
    """
    path = _path(source)
    if os.path.isdir(path):
        return bool(part_files(path, split))
    if local_files(source, None) is not None:
        return split == "train"
    try:
        return hub_split(str(source), split) is not None
    except Exception as error:  # the client may raise any error
        raise ValueError(hub_problem(str(source), error)) from None


def hub_split(source: str, split: str) -> str | None:
    """Return the name that a data set on the hub gives to a part, or None."""
    from datasets import get_dataset_split_names

    there = get_dataset_split_names(source)
    return next((name for name in PART_NAMES.get(split, (split,)) if name in there), None)

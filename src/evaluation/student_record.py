"""Finds what an evaluation needs from a student's own record: teacher, data, split, tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.common.runs import RUN_FILE, read_run
from src.common.settings import DEFAULT_DATA, DEFAULT_TEACHER
from src.evaluation.results import lookup
from src.evaluation.scoring import EvaluationSettings
from src.models.forward import stated_positions
from src.models.loading import (
    NoTokenizerError,
    load_tokenizer,
    max_positions,
    require_model_directory,
)
from src.proteins.encoding import tokenizer_fingerprint
from src.proteins.homology import read_clusters
from src.proteins.layouts import guess_layout, layout_of, set_layout, stated_layout
from src.proteins.sources import has_split, local_files
from src.proteins.split_files import CLUSTERS_FILE, SPLIT_FILE, read_split

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run_of(folder: str | Path) -> dict[str, Any]:
    """Return the record of the run that made a model; empty where there is none."""
    path = Path(folder) / RUN_FILE
    return read_run(folder) if path.is_file() else {}


def named_teacher(record: Mapping[str, Any]) -> str | None:
    """Return the teacher that a run names."""
    name = lookup(record, "teacher.name") or lookup(record, "settings.teacher_model")
    return name and os.path.expanduser(name)


def named_data(record: Mapping[str, Any]) -> str | None:
    """Return the data that a run names."""
    source = lookup(record, "data.source") or lookup(record, "settings.data")
    return source and os.path.expanduser(source)


def choose_split(source: str, wanted: str | None) -> tuple[str | None, bool]:
    """Return the part of a source to evaluate, and whether it has a training part beside it.

    Raises:
        ValueError: the source is not there, or has neither the wanted nor a held-out part.
    """
    if not os.path.isdir(source) and local_files(source, None) is not None:
        if wanted not in (None, "train"):
            raise ValueError(f"{source} is one file and has no part {wanted!r}: leave out --split")
        return None, False
    for part in (wanted,) if wanted else ("test", "validation"):
        if has_split(source, part):
            return part, part != "train" and has_split(source, "train")
    missing = wanted or "test or validation"
    raise ValueError(f"--data {source} has no {missing} part: pass --data with held-out proteins")


def trained_on(record: Mapping[str, Any], source: str, part: str | None) -> bool:
    """Return whether these proteins are those that a run was trained on: a file of both."""
    recorded = named_data(record)
    if not recorded or part not in (None, "train"):
        return False
    if source == recorded:
        return True
    files = []
    for name in (source, recorded):
        with suppress(ValueError):  # gone since, or on the hub
            files.append({os.path.realpath(path) for path in local_files(name, "train") or ()})
    return len(files) == 2 and bool(files[0] & files[1])


@dataclass(frozen=True)
class Inputs:
    """What a student is measured against, and on.

    Attributes:
        teacher: directory or hub id.
        source: of the proteins.
        column: of the residues, where the source is a table.
        part: of the source; None: all of it.
        has_train: whether the source has a training part beside that.
        seen: whether the student was trained on these proteins.
    """

    teacher: str
    source: str
    column: str | None
    part: str | None
    has_train: bool
    seen: bool


def settle_inputs(
    student: str, teacher: str | None, data: str | None, column: str | None, part: str | None
) -> Inputs:
    """Return the inputs of an evaluation: what is given, else what the student's record names.

    Raises:
        ValueError: the student had no teacher and none is given, or the data have no such part, or
            none are given and the student's are one file, which it was trained on.
    """
    record = run_of(student) if require_model_directory(student) else {}
    recorded = named_teacher(record)
    if not teacher and record and recorded is None:
        raise ValueError(
            f"{student} was trained without a teacher: pass --teacher_model, a model with the same "
            "tokenizer to compare it with"
        )
    source = data or named_data(record) or DEFAULT_DATA
    column = column or (None if data else lookup(record, "settings.sequence_column"))
    part, has_train = choose_split(source, part)
    seen = trained_on(record, source, part)
    if seen and not data and part is None:
        raise ValueError(
            f"{student} was trained on {source}: pass --data with proteins that it has not seen"
        )
    return Inputs(teacher or recorded or DEFAULT_TEACHER, source, column, part, has_train, seen)


def clusters_of(source: str | Path) -> dict[str, str] | None:
    """Return the cluster by name from a directory's table of clusters, None without one.

    Raises:
        ValueError: the table is broken.
    """
    path = Path(source) / CLUSTERS_FILE
    return read_clusters(path) if os.path.isfile(path) else None


def cluster_kind(source: str | Path) -> str:
    """Return what intervals resample: ``families``, ``clusters`` of relatives, or ``proteins``.

    The last where no table says which proteins are relatives.

    Raises:
        ValueError: the directory's ``split.json`` is broken.
    """
    folder = Path(source)
    if not os.path.isfile(folder / CLUSTERS_FILE):
        return "proteins"
    within = os.path.isfile(folder / SPLIT_FILE) and read_split(folder).get("within_families")
    return "families" if within else "clusters"


def shared_tokenizer(student: str, teacher: str, layout: str | None = None) -> Any:
    """Load the teacher's tokenizer, and make sure that the student has no other.

    Raises:
        ValueError: there is none, or the two differ.
    """
    tokenizer = load_tokenizer(teacher, layout=layout)
    try:
        own = load_tokenizer(student, layout=layout)
    except NoTokenizerError:
        return tokenizer  # weights alone: vocabularies are compared later
    if stated_layout(own) and not stated_layout(tokenizer):  # found when the student was made
        set_layout(tokenizer, layout_of(own))
    else:
        guess_layout(own, layout_of(tokenizer))
    if tokenizer_fingerprint(own) != tokenizer_fingerprint(tokenizer):
        raise ValueError(
            f"{student} and {teacher} have different tokenizers: their likelihoods cannot be "
            "compared; is --teacher_model the one that the student was distilled from?"
        )
    return tokenizer


def longest(
    student: PreTrainedModel, teacher: PreTrainedModel, settings: EvaluationSettings
) -> int:
    """Return the longest protein, in tokens, that both models take and the settings allow."""
    known = [stated_positions(model.config) for model in (student, teacher)]
    least = min(filter(None, (*known, settings.max_length)), default=0)
    return max_positions(teacher.config, least)

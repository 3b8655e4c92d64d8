"""What scripts/specialise.py is given: its settings, the model, and the family with its split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.common.cli import say
from src.common.files import read_json, sha256_file, write_json
from src.common.settings import StudentSettings
from src.evaluation.student_record import clusters_of
from src.experiments import candidates as c
from src.experiments import specialist as s
from src.models.decoding import sampling_room
from src.models.loading import MOST_POSITIONS, ProteinModel
from src.models.lora import require_peft
from src.proteins.encoding import encode
from src.proteins.family_split import (
    FamilySettings,
    family_hits_of,
    read_family,
    require_one_family,
    split_family,
    test_notes,
)
from src.proteins.layouts import PROTGPT2, layout_of
from src.proteins.sources import Protein, has_split
from src.proteins.split_files import SPLIT_FILE, read_split, write_split

EXAMPLE_TAG = "3.2.1.17"
"""Lysozyme's EC number, for a message."""


@dataclass(frozen=True)
class FamilyRun:
    """Settings of a run of scripts/specialise.py.

    Attributes:
        family: one file of members, or a directory with parts that is split already.
        model: to adapt; directory or hub id.
        output_dir: of everything.
        specialist: shape of the specialist; None: none is made.
        split: how the family is split.
        adaptation: how the model is adapted.
        lora_rank: of the additions that are trained in place of all weights; None: all weights.
        random: how random weights of the model's shape are trained.
        distillation: how the specialist is distilled.
        candidates: how candidates are sampled.
        scratch: also train random weights of the model's shape, for comparison.
        profile: HMM file that recognises the family; None: one is built.
        layout: of proteins: a name, or a template with the value of the layout's tag in it; None:
            the model's.
        allow_mixed: go on where the members look like several families.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        cache_dir: where tokenised proteins are kept.
        announce: called with each line for a person.
    """

    family: Path
    model: str
    output_dir: Path
    specialist: StudentSettings | None = None
    split: FamilySettings = FamilySettings()
    adaptation: s.FitSettings = s.ADAPTATION
    lora_rank: int | None = None
    random: s.FitSettings = s.FROM_RANDOM
    distillation: s.FitSettings = s.DISTILLATION
    candidates: c.CandidateSettings = c.CandidateSettings()
    scratch: bool = True
    profile: Path | None = None
    layout: str | None = None
    allow_mixed: bool = False
    device: str = "auto"
    cache_dir: str | None = None
    announce: Callable[[str], None] = say


@dataclass
class Family:
    """A family that is split, the model's limit in tokens and its layout of proteins."""

    data: Path
    train: list[Protein]
    validation: list[Protein]
    test: list[Protein]
    clusters: list[str]
    notes: list[str]
    limit: int
    layout: str | None = None

    @property
    def known(self) -> list[str]:
        """Residues of all members."""
        return [p.residues for p in (*self.train, *self.validation, *self.test)]


def prepare(run: FamilyRun) -> Family:
    """Read and split the family, or take over its split."""
    limit, tokenizer = try_model(run)
    if run.family.is_dir() and has_split(run.family, "train"):
        if not has_split(run.family, "validation"):
            raise ValueError(
                f"--family {run.family}: has no validation part, which decides when to stop: add "
                "one, or give one file that is split here"
            )
        return family_of(run, run.family, [], limit, tokenizer)
    folder = run.output_dir / "split"
    source = {}
    if run.family.is_file():
        source = {"file": run.family.name, "sha256": sha256_file(run.family)}
    notes_file = run.output_dir / "split-notes.json"
    if (folder / SPLIT_FILE).is_file():
        record = read_split(folder)
        made = {k: record["settings"].get(k) for k in s.recorded(run.split)}
        if record.get("source") != source or made != s.recorded(run.split):
            raise ValueError(
                f"{folder} holds another family, or one split with other settings: choose another "
                "--output_dir"
            )
        run.announce(f"{folder}: finished before")
        return family_of(run, folder, read_json(notes_file), limit, tokenizer)

    def fits(proteins: Any) -> np.ndarray:
        return np.array([len(row) <= limit for row in encode(tokenizer, proteins)])

    members = read_family(run.family, fits, f"{run.model} takes {limit} tokens", run.announce)
    run.announce(f"searching {len(members):,} members among themselves")
    hits = family_hits_of(members)
    notes = []
    if not run.allow_mixed and (apart := require_one_family(run.family, members, hits)):
        notes.append(
            f"{len(apart)} members have no detectable relative among the others (first "
            f"{apart[0]}): they are kept; are they of this family?"
        )
    split = split_family(members, hits, run.split)
    write_json(notes_file, notes + split.notes)
    write_split(folder, members, split.split, run.split, source=source)
    return family_of(run, folder, notes + split.notes, limit, tokenizer)


def try_model(run: FamilyRun) -> tuple[int, Any]:
    """Return the model's longest input in tokens, and its tokenizer, which carries its layout.

    What a later stage could not do is refused here, before anything is trained.

    Raises:
        ValueError: the model cannot be loaded or sampled from, its layout needs a tag, it is
            smaller than the specialist somewhere, or peft is wanted and missing.
    """
    if run.lora_rank is not None:
        require_peft()
    model, tokenizer = ProteinModel.load(run.model, layout=run.layout, announce=run.announce)
    layout = layout_of(tokenizer)
    if layout.tag is not None:
        raise ValueError(
            f"--model {run.model}: its layout {layout.template} needs {layout.tag}, of which a "
            "family has one value: write it in the layout's place, as in --layout "
            f"'{layout.template.replace(f'{{{layout.tag}}}', EXAMPLE_TAG)}'"
        )
    limit = sampling_room(model, MOST_POSITIONS)
    if run.specialist is not None and model.config.model_type == "gpt2":
        for name in ("n_layer", "n_head", "n_embd"):
            have, wanted = getattr(model.config, name), getattr(run.specialist, name)
            if wanted > have:
                raise ValueError(
                    f"the specialist's {name} is {wanted}, that of {run.model} {have}: a "
                    f"specialist is cut from the model, so give --{name} {have} or less"
                )
    return limit, tokenizer


def family_of(run: FamilyRun, data: Path, notes: list[str], limit: int, tokenizer: Any) -> Family:
    """Return a split family, and say how it is split."""
    layout = layout_of(tokenizer)
    test = s.part_of(data, "test") if has_split(data, "test") else []
    table = clusters_of(data) or {}
    clusters = [table.get(p.name, p.name) for p in test]
    if data == run.family:
        notes = [*notes, *test_notes(len(test), len(set(clusters)), run.split.test_identity)]
    family = Family(
        data,
        s.part_of(data, "train"),
        s.part_of(data, "validation"),
        test,
        clusters,
        notes,
        limit,
        None if layout == PROTGPT2 else layout.template,
    )
    run.announce(
        f"{len(family.train):,} training, {len(family.validation):,} validation and {len(test):,} "
        f"test members ({len(set(clusters)):,} clusters)"
    )
    for note in notes:
        run.announce(f"note: {note}")
    return family


def identity(family: Family) -> dict[str, Any]:
    """Return the hashes of the family's parts, for the records of stages."""
    parts = ("train", "validation", "test")
    files = {p: sorted(family.data.glob(f"{p}.*")) for p in parts}
    return {p: [sha256_file(path) for path in paths] for p, paths in files.items() if paths}

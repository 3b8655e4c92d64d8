"""Runs a grid of trainings that share initial weights, data order and teacher; measures every cell.

The cells of one group (a size and a seed) are trained (:mod:`src.training.cohort`) and evaluated
together. A stopped grid resumes: a cell with results is never run again, and an unfinished
group goes on from its last checkpoint. Several processes may work on one grid; each locks the group
that it runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from src.common.cli import quiet_libraries, say
from src.common.files import (
    read_json,
    remove_temporaries_of,
    remove_unfinished,
    write_json,
)
from src.common.runs import InUseError, is_begun, locked, provenance
from src.common.settings import as_recorded
from src.evaluation.gates import FLOOR_PROTEINS
from src.evaluation.measurement import Evaluation, evaluate_students
from src.evaluation.per_protein import replace_rows, write_parquet
from src.evaluation.results import lookup, write_results
from src.evaluation.schema import Object, check_record, record_type
from src.evaluation.scoring import EvaluationSettings
from src.evaluation.student_record import cluster_kind, clusters_of, longest
from src.experiments.cells import cell_files, pack, read_cell
from src.experiments.grids import Cell, Grid, read_rates, settings_key
from src.models.inspection import count_parameters
from src.models.loading import load_causal_lm, model_fingerprint
from src.models.teacher_cache import TeacherCache
from src.proteins.sources import has_split, on_hub, read_proteins
from src.proteins.tokens import TokenisedProteins, tokenise
from src.trainer.callbacks import ConsoleProgress
from src.trainer.checkpoints import newest_valid
from src.trainer.interruption import stops_on_signals
from src.training.assembly import (
    build_arguments,
    build_data,
    initial_student,
    remove_default_output,
)
from src.training.cohort import CohortTrainer, Member
from src.training.ingredients import Ingredients, capture_parts, gather, planned
from src.training.stages import train_from

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP_FILE = "group.json"
GROUP = record_type({"members": Object, "inputs": Object})
BOOTSTRAP = 1000


class GridRun:
    """Runs a grid. The teacher and the proteins are loaded once, when they are first needed.

    Args:
        grid: what to run.
        results: directory of the cells' results files and tables of single proteins.
        work: directory of checkpoints and students; may be deleted when the grid is done.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        cache_dir: where tokenised proteins are kept.
        max_proteins: measure on the first so many proteins; None: on all.

    Raises:
        ValueError: the grid reads tuned learning rates, and their file is missing or broken.
    """

    def __init__(
        self,
        grid: Grid,
        results: Path,
        work: Path,
        *,
        device: str = "auto",
        cache_dir: str | None = None,
        max_proteins: int | None = None,
    ) -> None:
        self.grid, self.max_proteins = grid, max_proteins
        self.results, self.work = results, work
        self.device, self.cache_dir = device, cache_dir
        tuned = read_rates(results)["rates"] if grid.tuned else None
        self.cells = self.grid.cells(tuned)
        self._caches: dict[str, TeacherCache] = {}

    # Files on disk -----------------------------------------------------------------------------

    def file_of(self, cell: Cell) -> Path:
        """Return the path of a cell's results."""
        return self.results / self.grid.file_of(cell)

    def done(self, cell: Cell) -> bool:
        """Return whether a cell was finished.

        Raises:
            ValueError: its file was made with other settings; nothing is overwritten.
        """
        results = read_cell(self.results, self.grid.file_of(cell))
        if results is None:
            return False
        made = results["settings"]
        key, count = made.get("key"), made.get("max_proteins", self.max_proteins)
        if (key, count) != (settings_key(self.grid.settings(cell)), self.max_proteins):
            raise ValueError(
                f"{self.file_of(cell)} holds a cell of other settings: choose another --results, "
                "or move it away"
            )
        return True

    def groups(self) -> list[tuple[str, list[Cell]]]:
        """Return each group's name and cells, in the order in which they are run."""
        group_of = self.grid.group_of
        ordered = sorted(self.cells, key=lambda cell: (cell.seed, cell.size, group_of(cell)))
        return [(name, list(cells)) for name, cells in groupby(ordered, group_of)]

    def status_lines(self) -> list[str]:
        """Return how many cells are done, in all and by group."""
        lines = []
        for name, cells in self.groups():
            done = sum(self.done(cell) for cell in cells)
            lines.append(f"  {name:<20} {done:>3} of {len(cells)} cells")
        total = sum(self.done(cell) for cell in self.cells)
        return [f"{self.grid.name}: {total} of {len(self.cells)} cells done", *lines]

    # Running ------------------------------------------------------------------------------------

    @stops_on_signals
    def run(self) -> dict[str, Any]:
        """Run every unfinished group, and return how many cells there are and are done.

        Groups that another process runs are skipped. SIGTERM and SIGINT leave a checkpoint of the
        running group.

        Raises:
            ValueError: the data lacks the part that the cells are measured on.
        """
        quiet_libraries()
        for line in self.status_lines():
            say(line)
        if not all(self.done(cell) for cell in self.cells):
            self._require_parts()
        for name, cells in self.groups():
            if all(self.done(cell) for cell in cells):
                continue
            with contextlib.ExitStack() as held:
                try:
                    held.enter_context(locked(self.work / name))
                except InUseError:
                    say(f"{name}: skipped, because another process is running it")
                    continue
                self._remove_leftovers(name, cells)
                self._run_group(name, cells)
            say(self.status_lines()[0])
        return {"cells": len(self.cells), "done": sum(self.done(cell) for cell in self.cells)}

    def pack(self) -> int:
        """Move all finished cells into two files (:func:`src.experiments.cells.pack`).

        Raises:
            ValueError: another process is running a group.
        """
        with contextlib.ExitStack() as held:
            names = [name for name, _ in self.groups()]
            for name in names:
                held.enter_context(locked(self.work / name))
            return pack(self.results, self.grid.name, [self._table_of(name) for name in names])

    def _require_parts(self) -> None:
        """Raise ``ValueError`` before the first training if the part to measure on is missing."""
        source, split = self.grid.shared.data, self.grid.split
        # A hub data set is not asked here, because there may be no network yet.
        if not on_hub(source) and not has_split(source, split):
            raise ValueError(
                f"--data {source} has no {split} part, which the grid {self.grid.name} is measured "
                "on: divide it with scripts/split_data.py"
            )

    @cached_property
    def ingredients(self) -> Ingredients:
        """Teacher, tokenizer and proteins."""
        ingredients = gather(self.grid.shared, self.device, self.cache_dir)
        if self.grid.shared.cached_teacher:
            folder = self.work / "teacher_cache"
            self._caches = capture_parts(ingredients, folder, say, flag="--work")
        return ingredients

    def _run_group(self, name: str, cells: Sequence[Cell]) -> None:
        folder = self.work / name
        for cell in self.cells:
            results = read_cell(self.results, self.grid.file_of(cell))
            if results is None:
                continue
            path, run = self.file_of(cell), results["run"]
            teacher, data = lookup(run, "teacher.fingerprint"), lookup(run, "data.train")
            self._require_inputs({"teacher": teacher, "data": data}, path, "--results")
        members = self._members(folder, cells)
        missing = [cell for cell in members if not self.done(cell)]
        say(f"{name}: {len(members)} students, {len(missing)} cells to finish")
        trainer = self._trainer(folder, members)
        seconds = train_from(newest_valid(folder, say), trainer)
        students = {m.name: m.model.eval() for m in trainer.members}
        evaluations = self._evaluate({cell.name: students[cell.name] for cell in missing})
        self._write(name, missing, evaluations, trainer, seconds)

    def _members(self, folder: Path, cells: Sequence[Cell]) -> list[Cell]:
        """Return the cells to train together: those of a group under way, else what is missing."""
        wanted = {cell.name: settings_key(self.grid.settings(cell)) for cell in cells}
        path = folder / GROUP_FILE
        if is_begun(folder, GROUP_FILE, "--work"):
            group = read_json(path)
            check_record(group, GROUP, path, "choose another --work")
            self._require_inputs(group.get("inputs") or {}, path, "--work")
            begun = group.get("members") or {}
            by_name = {cell.name: cell for cell in cells}
            missing = {cell.name for cell in cells if not self.done(cell)}
            if begun.items() <= wanted.items() and missing <= set(begun):
                return [by_name[name] for name in begun]
            raise ValueError(f"{folder} holds another group: choose another --work")
        members = [cell for cell in cells if not self.done(cell)]
        group = {"members": {cell.name: wanted[cell.name] for cell in members}}
        write_json(path, {**group, "inputs": self._inputs()})
        return members

    def _inputs(self) -> dict[str, str]:
        """Return the fingerprints of what all cells share."""
        inputs = self.ingredients
        assert inputs.teacher_fingerprint is not None
        return {"teacher": inputs.teacher_fingerprint, "data": inputs.parts["train"].fingerprint}

    def _require_inputs(self, before: Mapping[str, Any], path: Path, flag: str) -> None:
        """Check that a file of this grid was made with the current teacher and proteins.

        Raises:
            ValueError: it was made with others.
        """
        changed = [name for name, now in self._inputs().items() if before.get(name, now) != now]
        if changed:
            raise ValueError(
                f"{path} was made with another {' and other '.join(changed)}: bring those back to "
                f"go on, or choose another {flag}"
            )

    def _trainer(self, folder: Path, cells: Sequence[Cell]) -> CohortTrainer:
        inputs, shared = self.ingredients, self.grid.shared
        settings = [self.grid.settings(cell) for cell in cells]
        starts: dict[Any, Any] = {}  # each is made once: a cut runs its model
        members = []
        for cell, s in zip(cells, settings, strict=True):
            key = s.init_from, s.student, s.seed
            if key not in starts:
                starts[key] = initial_student(s, inputs.model_shape, inputs.parts["train"])
            members.append(Member(cell.name, deepcopy(starts[key]), s.loss, s.learning_rate))
        parameters = sum(count_parameters(member.model) for member in members)
        steps, _, validation = planned(settings[0], inputs, parameters)
        arguments = build_arguments(
            settings[0],
            folder,
            steps,
            inputs.precision,
            inputs.device,
            "none",
            evaluations=validation.evaluations,
        )
        trainer = CohortTrainer(
            members,
            teacher_model=inputs.teacher,
            args=arguments,
            callbacks=[ConsoleProgress()],
            **build_data(shared, inputs, self._caches or None),
        )
        remove_default_output(trainer)
        return trainer

    def _evaluate(self, students: Mapping[str, PreTrainedModel]) -> dict[str, Evaluation]:
        inputs, shared = self.ingredients, self.grid.shared
        teacher = inputs.teacher
        assert teacher is not None
        if teacher.dtype != torch.float32:
            teacher = load_causal_lm(str(shared.teacher_model), device=inputs.device)
        settings = EvaluationSettings(bootstrap=BOOTSTRAP, check=False)
        test = self._held_out(next(iter(students.values())), teacher, settings)
        proteins = read_proteins(
            shared.data,
            split="train",
            tokenizer=inputs.tokenizer,
            sequence_column=shared.sequence_column,
        )
        return evaluate_students(
            students,
            teacher,
            inputs.tokenizer,
            test,
            settings,
            train=[protein.residues for protein in islice(proteins, FLOOR_PROTEINS)],
            clusters=clusters_of(shared.data),
            cluster_kind=cluster_kind(shared.data),
            announce=say,
        )

    def _held_out(self, student: Any, teacher: Any, settings: Any) -> TokenisedProteins:
        return tokenise(
            self.grid.shared.data,
            self.grid.split,
            self.ingredients.tokenizer,
            longest(student, teacher, settings),
            self.cache_dir,
            long_proteins="drop",
            max_proteins=self.max_proteins,
            sequence_column=self.grid.shared.sequence_column,
            quiet=True,
        )

    def _remove_leftovers(self, name: str, cells: Sequence[Cell]) -> None:
        """Remove what killed processes left half-written of a group that this one holds."""
        remove_unfinished(self.work / name)
        for path in (self._table_of(name), *map(self.file_of, cells)):
            remove_temporaries_of(path)

    def _table_of(self, name: str) -> Path:
        return self.results / f"per_protein-{self.grid.name}-{name}.parquet"

    def _write(
        self,
        name: str,
        cells: Sequence[Cell],
        evaluations: Mapping[str, Evaluation],
        trainer: CohortTrainer,
        seconds: float,
    ) -> None:
        """Write the table of single proteins first: a cell counts as done by its results file."""
        path = self._table_of(name)
        write_table(
            path, [(cell, evaluations[cell.name].per_protein) for cell in cells], self.grid.split
        )
        by_name = {member.name: member for member in trainer.members}
        inputs = self._inputs()
        for cell in cells:
            settings = self.grid.settings(cell)
            model = by_name[cell.name].model
            results = dict(evaluations[cell.name].results)
            results["settings"] = {
                "key": settings_key(settings),
                "grid": self.grid.name,
                **asdict(cell),
                "split": self.grid.split,
                "train": as_recorded(settings),
                "max_proteins": self.max_proteins,
            }
            results["training"] = {
                "curve": curve_of(trainer.state.log_history, cell.name),
                "steps": trainer.state.global_step,
                "together": len(trainer.members),
                "seconds": round(seconds, 1),
            }
            results["run"] = {
                **provenance(),
                "student": {
                    "parameters": count_parameters(model),
                    "fingerprint": model_fingerprint(model),
                },
                "teacher": {"name": settings.teacher_model, "fingerprint": inputs["teacher"]},
                "data": {"source": settings.data, "train": inputs["data"]},
            }
            write_results(self.file_of(cell), results)
        say(f"{name}: {len(cells)} cells written to {self.results}")


def write_table(path: Path, tables: Sequence[tuple[Cell, Mapping[str, Any]]], split: str) -> None:
    """Write the measurements on single proteins of some cells of a group.

    Rows of other cells in the file are kept. Sums are in nats, rounded to float32. Rows are ordered
    by arm, then by learning rate.
    """
    import pyarrow as pa

    parts = []
    for cell, table in tables:
        columns: dict[str, Any] = {}
        for name in ("arm", "seed", "size", "learning_rate"):
            columns[name] = pa.array([getattr(cell, name)] * len(table["protein"]))
        columns["split"] = pa.array([split] * len(table["protein"]))
        for name, values in table.items():
            real = isinstance(values, np.ndarray) and values.dtype.kind == "f"
            columns[name] = pa.array(values.astype(np.float32) if real else values)
        parts.append(pa.table(columns))
    rows = replace_rows(path, pa.concat_tables(parts), ("arm", "learning_rate"))
    write_parquet(path, rows, compression="zstd")


def curve_of(history: Sequence[Mapping[str, Any]], name: str) -> list[dict[str, Any]]:
    """Return the points of one student's learning curve from a cohort's log."""
    curve = []
    for record in history:
        for key, prefix in (("students", ""), ("eval_students", "eval_")):
            values = record.get(key, {}).get(name)
            if values:
                point = {f"{prefix}{k}": v for k, v in values.items()}
                curve.append({"step": record["step"], **point})
    return curve


def tuned_rates(results: Path, grid: Grid) -> dict[str, Any]:
    """Return each arm's best learning rate, and the best arm, by nats per residue on validation.

    Args:
        results: directory of the cells.
        grid: measured on validation proteins. Cells of other learning rates in the directory
            (``--rates``) count, too.

    Returns:
        ``rates`` by size and arm; ``best_arm`` by size; ``nats_per_residue`` of every rate, the
        mean over seeds; ``at_edge``, the choices at an end of the range.

    Raises:
        ValueError: the grid was measured on test proteins, or a cell is missing.
    """
    if grid.split != "validation":
        raise ValueError(
            f"the grid {grid.name} is measured on {grid.split} proteins: choose on validation only"
        )
    rates: dict[str, dict[str, float]] = {}
    tried: dict[str, dict[str, dict[str, float]]] = {}
    edges = []
    for size in grid.sizes:
        for arm in grid.arms:
            means = {}
            for rate in sorted({*grid.rates, *_rates_beyond(results, grid, arm, size)}):
                values = []
                for file in (grid.file_of(Cell(arm, size, seed, rate)) for seed in grid.seeds):
                    if (cell := read_cell(results, file)) is None:
                        raise ValueError(
                            f"{results / file} is missing: finish --grid {grid.name} first"
                        )
                    values.append(lookup(cell, "student_nats_per_residue"))
                means[rate] = sum(values) / len(values)
            best = min(means, key=lambda rate: means[rate])
            rates.setdefault(size, {})[arm] = best
            tried.setdefault(size, {})[arm] = {f"{rate:g}": v for rate, v in means.items()}
            if len(means) > 2 and best in (min(means), max(means)):
                edges.append(f"{arm} at {size}: {best:g}")
    best = {
        size: min(arms, key=lambda arm: min(arms[arm].values())) for size, arms in tried.items()
    }
    return {
        "rates": rates,
        "best_arm": best,
        "nats_per_residue": tried,
        "at_edge": edges,
        "grid": grid.name,
    }


def _rates_beyond(results: Path, grid: Grid, arm: str, size: str) -> set[float]:
    """Return the learning rates of all of an arm's cells on disk."""
    start = f"{arm}-{size}-seed{grid.seeds[0]}-lr"
    names = (Path(file).stem for file in cell_files(results))
    return {float(name.removeprefix(start)) for name in names if name.startswith(start)}

"""Runs the experiment on specialists: families, numbers of members, draws and starting points.

A cell adapts one starting point to N members of one family and measures it on held-out members.
The cells of a group (family, N and draw) share their data and the adapted models, which are removed
when the group is done. A cell with a file in ``cells/`` is not run again, and several processes
may work on one experiment. docs/EXPERIMENT.md has what is asked of it.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from src.common.cli import say, unheard
from src.common.files import read_json, write_json
from src.common.runs import InUseError, locked
from src.common.settings import StudentSettings
from src.evaluation.composition import distinct_share
from src.evaluation.per_protein import write_per_protein
from src.experiments import candidates as c
from src.experiments import specialist as s
from src.models.loading import ProteinModel, load_causal_lm, model_fingerprint
from src.proteins import profiles as p
from src.proteins.families import read_families
from src.proteins.family_split import FamilySettings, family_hits_of, split_family
from src.proteins.fasta import FastaRecord, write_fasta
from src.proteins.relatives import nearest_identities, profile_scores
from src.proteins.sources import Protein
from src.proteins.split_files import SPLIT_FILE, read_named, write_split
from src.trainer.interruption import stops_on_signals

PROFILE, TABLE = "profile", "specialists.parquet"
RATES_FILE, STARTS_FILE = "rates.json", "starts.json"
TUNING_FAMILIES, TUNING_DRAW = 3, 1000
"""Families drawn for tuning, and the number of a draw of members that is used for nothing else."""
BEYOND = 2
"""Rates tried beyond an end of the range, where the best one lies there."""
DISTILLED = 400
"""Samples of the adapted teacher that a specialist is distilled on, beside the members."""


@dataclass(frozen=True)
class Start:
    """A starting point.

    Attributes:
        name: of it.
        model: directory.
        random: take the model's shape with random weights.
        student: adapt the model and distil this shape from it; None: adapt alone.
    """

    name: str
    model: str
    random: bool = False
    student: StudentSettings | None = None


@dataclass(frozen=True)
class Cell:
    """One training; ``start`` is a name, or :data:`PROFILE`; ``rate`` None: that of the tuning."""

    family: str
    members: int
    draw: int
    start: str
    rate: float | None = None

    @property
    def group(self) -> str:
        """Family, N and draw."""
        return f"{self.family}-n{self.members}-d{self.draw}"

    @property
    def key(self) -> str:
        """Name of its file."""
        rate = "" if self.rate is None else f"-{self.rate:.1e}"
        return f"{self.group}-{self.start}{rate}"


@dataclass(frozen=True)
class FamilyGrid:
    """Settings and directories of the experiment.

    Attributes:
        families: FASTA with ``family=NAME`` in its headers.
        profiles: HMM file with gathering thresholds.
        related: table whose first column names members that the experiment leaves out.
        table: ``families.tsv`` of a split, which says whose profile is which.
        results: directory of ``cells/``, the table and the tuned rates.
        work: directory of data and models.
        starts: starting points beside the profile HMM.
        members: numbers of training members.
        draws: of the members, each.
        samples: of each adapted model, at temperature 1.
        fit: settings of every adaptation but for its rate; random weights have no dropout.
        distillation: settings of a specialist's training, those of ``scripts/specialise.py``.
        rates: tried in tuning, ascending, a constant factor apart.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        announce: called with each line for a person.
    """

    families: Path
    profiles: Path
    table: Path
    related: Path | None
    results: Path
    work: Path
    starts: tuple[Start, ...]
    members: tuple[int, ...] = (10, 30, 100)
    draws: int = 2
    samples: int = 200
    fit: s.FitSettings = s.ADAPTATION
    distillation: s.FitSettings = s.DISTILLATION
    rates: tuple[float, ...] = (5e-4, 1.5e-3, 4.5e-3)
    device: str = "cpu"
    announce: Callable[[str], None] = say

    @cached_property
    def proteins(self) -> dict[str, dict[str, str]]:
        """Residues by name, by family."""
        residues, _ = read_named(self.families)
        by_family: dict[str, dict[str, str]] = defaultdict(dict)
        lines = self.related.read_text().splitlines() if self.related else []
        related = {line.split("\t")[0] for line in lines}
        for name, family in read_families(self.families, residues).items():
            if name not in related:
                by_family[family][name] = residues[name]
        return {family: by_family[family] for family in sorted(by_family)}

    @cached_property
    def profile_keys(self) -> dict[str, str]:
        """Accession of each family's profile. Raises ``ValueError`` if one is missing."""
        head, *rows = (line.split("\t") for line in self.table.read_text().splitlines())
        keys = {row[0]: row[head.index("profile")] for row in rows}
        if missing := [family for family in self.proteins if family not in keys]:
            raise ValueError(f"{self.table}: has no family {missing[0]}, which is in the proteins")
        return keys

    def cells(self, tuning: bool = False) -> list[Cell]:
        """Return all cells, by group."""
        names = list(self.proteins)
        if not tuning:
            starts = [*(start.name for start in self.starts), PROFILE]
            return [
                Cell(family, n, draw, start)
                for family in names
                for n in self.members
                for draw in range(self.draws)
                for start in starts
            ]
        few = sorted(random.Random(0).sample(names, min(TUNING_FAMILIES, len(names))))
        return [
            Cell(family, n, TUNING_DRAW, start.name, rate)
            for family in few
            for n in self.members
            for start in self.tuned_starts
            for rate in self.wanted_rates(start.name, n, few)
        ]

    @property
    def tuned_starts(self) -> list[Start]:
        """Starting points whose rate is tuned: a specialist has the adapted model's and its own."""
        return [start for start in self.starts if start.student is None]

    def wanted_rates(self, start: str, n: int, families: Sequence[str]) -> list[float]:
        """Return the rates to try; more of them while the best one known is at an end."""
        rates = list(self.rates)
        factor = rates[1] / rates[0]
        for _ in range(BEYOND):
            losses = [self._tuning_loss(start, n, families, rate) for rate in rates]
            if None in losses:
                break
            best = int(np.argmin(np.array(losses, dtype=float)))
            if best == 0:
                rates.insert(0, float(f"{rates[0] / factor:.2g}"))
            elif best == len(rates) - 1:
                rates.append(float(f"{rates[-1] * factor:.2g}"))
            else:
                break
        return rates

    def _tuning_loss(
        self, start: str, n: int, families: Sequence[str], rate: float
    ) -> float | None:
        """Return the mean validation loss of a rate; None where a cell is missing."""
        records = [self.record_of(Cell(f, n, TUNING_DRAW, start, rate)) for f in families]
        losses = [record["validation_loss"] for record in records if record]
        return float(np.mean(losses)) if len(losses) == len(records) else None

    def file_of(self, cell: Cell) -> Path:
        """Return the path of a cell's record, until it is in the table."""
        return self.results / "cells" / f"{cell.key}.json"

    @cached_property
    def packed(self) -> dict[str, dict[str, Any]]:
        """The records that the table held when this was first asked, by key of the cell."""
        names = [field.name for field in fields(Cell)]
        return {
            Cell(**{name: row[name] for name in names}).key: row
            for row in read_rows(self.results / TABLE)
        }

    def record_of(self, cell: Cell) -> dict[str, Any] | None:
        """Return the record of a finished cell; None: it is not finished."""
        path = self.file_of(cell)
        return read_json(path) if path.is_file() else self.packed.get(cell.key)

    def is_finished(self, cell: Cell) -> bool:
        """Return whether a cell has a record."""
        return self.file_of(cell).is_file() or cell.key in self.packed

    # Before the run -----------------------------------------------------------------------------

    def plan(self, cells: Sequence[Cell]) -> list[str]:
        """Return a line for each group with its open cells, and the hours that they take.

        Hours are counted for the starts that have a finished cell.
        """
        spent: dict[str, list[float]] = defaultdict(list)
        for cell in cells:
            if record := self.record_of(cell):
                spent[cell.start].append(record["seconds"])
        seconds, lines = 0.0, []
        for group, members in groupby(cells, lambda cell: cell.group):
            left = [cell for cell in members if not self.is_finished(cell)]
            for cell in left:
                known = spent[cell.start]
                seconds += sum(known) / len(known) if known else 0.0
            if left:
                names = sorted({cell.start for cell in left})
                lines.append(f"  {group}: {len(left)} cells ({', '.join(names)})")
        left = sum(not self.is_finished(cell) for cell in cells)
        hours = f"{seconds / 3600:.1f} hours (from finished cells)"
        hours = hours if any(spent.values()) else "hours not known until one is finished"
        return [*lines, f"{left:,} of {len(cells):,} cells to run, {hours}"]

    # Running ------------------------------------------------------------------------------------

    @stops_on_signals
    def run(self, cells: Sequence[Cell]) -> None:
        """Run every cell that has no file; groups that another process runs are skipped.

        Raises:
            ValueError: an input is missing, rates are to be tuned first, or a starting point is
                another model than that of the finished cells.
        """
        self._record_starts()
        if any(cell.rate is None for cell in cells):
            self.tuned_rates()
        for group, members in groupby(cells, lambda cell: cell.group):
            left = [cell for cell in members if not self.is_finished(cell)]
            if not left:
                continue
            folder = self.work / group
            with ExitStack() as held:
                try:
                    held.enter_context(locked(folder, "--work"))
                except InUseError:
                    self.announce(f"{group}: another process is running it")
                    continue
                for cell in left:
                    if self.is_finished(cell):  # another process was quicker
                        continue
                    self.announce(f"== {cell.key}")
                    started = time.monotonic()
                    record = self._measure(cell, folder)
                    record["seconds"] = time.monotonic() - started
                    write_json(self.file_of(cell), {**asdict(cell), **record})
                shutil.rmtree(folder)

    def _record_starts(self) -> None:
        """Write which models the starting points are; a cell's file has their names alone."""
        path = self.results / STARTS_FILE
        known = read_json(path) if path.is_file() else {}
        for start in self.starts:
            what = {
                "model": model_fingerprint(load_causal_lm(start.model)),
                "random": start.random,
                "student": start.student and asdict(start.student),
            }
            if known.setdefault(start.name, what) != what:
                raise ValueError(
                    f"{path}: {start.name} was another model: give it another name, or choose "
                    "another --results"
                )
        write_json(path, known)

    def tuned_rates(self) -> dict[str, float]:
        """Return the chosen rate by ``START N``. Raises ``ValueError`` if some are not chosen."""
        path = self.results / RATES_FILE
        rates = read_json(path) if path.is_file() else {}
        wanted = [f"{start.name} {n}" for start in self.tuned_starts for n in self.members]
        if missing := [name for name in wanted if name not in rates]:
            raise ValueError(
                f"{path}: has no rate for {missing[0]}: run with --tune, then --choose"
            )
        return rates

    def choose(self) -> dict[str, float]:
        """Write and return the rate of the lowest mean validation loss of each start and N.

        Raises:
            ValueError: cells of the tuning are missing, or rates were chosen before.
        """
        path, cells = self.results / RATES_FILE, self.cells(tuning=True)
        before = read_json(path) if path.is_file() else {}
        cells = [cell for cell in cells if f"{cell.start} {cell.members}" not in before]
        if not cells:
            raise ValueError(f"{path}: has all of them already, and rates are chosen once")
        if missing := [cell.key for cell in cells if not self.is_finished(cell)]:
            raise ValueError(f"{len(missing)} cells of the tuning are missing, {missing[0]} first")
        losses: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        for cell in cells:
            record = self.record_of(cell)
            assert record is not None
            assert cell.rate is not None
            losses[f"{cell.start} {cell.members}"][cell.rate].append(record["validation_loss"])
        rates = before | {
            name: min(by_rate, key=lambda rate: float(np.mean(by_rate[rate])))
            for name, by_rate in losses.items()
        }
        write_json(path, rates)
        return rates

    def _data(self, cell: Cell, folder: Path) -> Path:
        """Return the group's data: N members drawn, and the family's held-out members."""
        split = self.work / "splits" / cell.family
        with locked(split.parent / f"{cell.family}-lock", "--work", self.announce):
            if not (split / SPLIT_FILE).is_file():
                members = self.proteins[cell.family]
                made = split_family(members, family_hits_of(members), FamilySettings())
                write_split(split, members, made.split, made.settings)
        data = folder / "data"
        pool = s.part_of(split, "train")
        drawn = random.Random(cell.group).sample(pool, min(cell.members, len(pool)))
        held_out = {part: s.part_of(split, part) for part in ("validation", "test")}
        held_out["test"] = self.judged(held_out["test"])
        for part, proteins in {"train": drawn, **held_out}.items():
            write_fasta(data / f"{part}.fasta", [FastaRecord(q.name, q.residues) for q in proteins])
        return data

    @cached_property
    def start_models(self) -> list[ProteinModel]:
        """The models of the starting points, before any adaptation."""
        return [ProteinModel.load(name) for name in {start.model for start in self.starts}]

    def judged(self, members: Sequence[Protein]) -> list[Protein]:
        """Return the members that every starting point can take whole: all are judged on these."""
        residues = [q.residues for q in members]
        fits = np.all([model.rows(residues)[1] for model in self.start_models], axis=0)
        return [q for q, fit in zip(members, fits, strict=True) if fit]

    def _measure(self, cell: Cell, folder: Path) -> dict[str, Any]:
        data = self._data(cell, folder)
        train, test = s.part_of(data, "train"), s.part_of(data, "test")
        counts = {
            "train": len(train),
            "proteins": len(test),
            "residues": sum(len(q.residues) for q in test),
        }
        if cell.start == PROFILE:
            begun = time.monotonic()
            validation = [q.residues for q in s.part_of(data, "validation")]
            aligned = p.align_family([q.residues for q in train])
            density, choice, _ = p.best_density(aligned, validation)
            nll, _ = p.profile_nll(density, [q.residues for q in test])
            spent = time.monotonic() - begun
            return {**counts, "nll": float(nll.sum()), "train_seconds": spent, "choice": choice}
        start = next(start for start in self.starts if start.name == cell.start)
        adapted = self._adapted_start(start)
        rate = cell.rate or self.tuned_rates()[f"{adapted.name} {cell.members}"]
        model, record = self._fit(cell, start, rate, data, folder)
        record = {
            **counts,
            "rate_used": rate,
            "validation_loss": s.final_loss(record),
            "train_seconds": record["train_seconds"],
            "parameters": record["student"]["parameters"],
        }
        if cell.rate is not None:  # tuning sees no test member
            return record
        proteins = [q.residues for q in test]
        record["nll"] = float(s.nats_of(model, proteins, self.device).sum())
        if adapted is start and not start.random:
            record["nll_before"] = float(s.nats_of(start.model, proteins, self.device).sum())
        return {**record, **self._sampled(cell, model, train)}

    def _fit(
        self, cell: Cell, start: Start, rate: float, data: Path, folder: Path
    ) -> tuple[Path, dict[str, Any]]:
        """Adapt, and distil where a student is wanted; return the model and its record."""
        seed = self.fit.seed + cell.draw
        dropout = 0.0 if start.random else self.fit.dropout
        fit = replace(self.fit, learning_rates=(rate,), seed=seed, dropout=dropout)
        options: dict[str, Any] = {
            "announce": unheard,
            "device_name": self.device,
            "cache_dir": str(folder / "cache"),
        }
        if start.student is None:
            place = folder / (f"{start.name}-{rate:.1e}" if cell.rate else start.name)
            return place, s.adapt(
                start.model, data, place, fit, random_weights=start.random, **options
            )
        # The teacher is the one that the cell of the same model left, or would make.
        teacher = self._adapted_start(start)
        adapted = folder / teacher.name
        s.adapt(start.model, data, adapted, fit, **options)
        place, both = folder / start.name, folder / "distillation"

        def sample() -> dict[str, Any]:
            train = [q.residues for q in s.part_of(data, "train")]
            wanted = c.CandidateSettings(num_candidates=DISTILLED, temperature=1.0, seed=cell.draw)
            longest = max(map(len, train))
            drawn = c.sample_family(adapted, wanted, longest, self.device, unheard)
            return s.write_distillation_data(both, data, list(dict.fromkeys(drawn["samples"])))

        s.run_stage(both, {"rate": rate}, sample, unheard)
        own = replace(self.distillation, seed=seed)
        return place, s.distil(str(adapted), both, place, start.student, own, **options)

    def _adapted_start(self, start: Start) -> Start:
        """Return the starting point that is adapted: a specialist's is that of its teacher."""
        if start.student is None:
            return start
        return next(t for t in self.tuned_starts if t.model == start.model and not t.random)

    def _sampled(self, cell: Cell, model: Path, train: Sequence[Any]) -> dict[str, Any]:
        """Return what is measured on samples: hits, identity, diversity and speed."""
        wanted = c.CandidateSettings(num_candidates=self.samples, temperature=1.0, seed=cell.draw)
        longest = max(len(q.residues) for q in train)
        drawn = c.sample_family(model, wanted, longest, self.device, unheard)
        samples, speed = drawn["samples"], drawn["proteins_per_second"]
        if not samples:
            return {"samples": 0, "hits": 0, "distinct_hits": 0, "proteins_per_second": speed}
        scores = profile_scores(samples, self.profiles).get(self.profile_keys[cell.family])
        identity = nearest_identities(samples, [q.residues for q in train])["identity"]
        return {
            "samples": len(samples),
            "hits": 0 if scores is None else int((scores > 0).sum()),
            "distinct_hits": 0 if scores is None else distinct_hits(samples, scores),
            "proteins_per_second": speed,
            "identity": float(identity.mean()),
            "distinct_share": len(set(samples)) / len(samples),
            "distinct_4mers": distinct_share(samples),
        }

    def write_table(self) -> list[dict[str, Any]]:
        """Write the records of finished cells into one parquet file; return its rows."""
        files = sorted((self.results / "cells").glob("*.json"))
        known = dict(self.packed)
        known.update({path.stem: read_json(path) for path in files})
        names = list(dict.fromkeys(name for row in known.values() for name in row))
        rows = [{name: known[key].get(name) for name in names} for key in sorted(known)]
        if files:
            columns = {name: [row[name] for row in rows] for name in names}
            write_per_protein(self.results / TABLE, columns)
        return rows


def distinct_hits(samples: Sequence[str], scores: np.ndarray) -> int:
    """Return how many different samples score above 0."""
    return len({sample for sample, score in zip(samples, scores, strict=True) if score > 0})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of an experiment's table; none where there is no file."""
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist() if path.is_file() else []

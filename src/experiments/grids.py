"""Tables of the experiments: the arms, sizes, learning rates and seeds of each grid.

``scripts/ablation.py --grid NAME`` runs one. ``docs/EXPERIMENT.md``, which was written before the
confirmatory runs, says what each is for.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from src.common.files import read_json
from src.common.settings import (
    BUNDLED_DATA,
    BUNDLED_TEACHER,
    DEFAULTS,
    LossSettings,
    StudentSettings,
    TrainSettings,
    as_recorded,
)
from src.evaluation.schema import Positive, check_record, record_type

PUBLISHED = {
    "baseline": LossSettings(),
    "uncertainty": LossSettings(use_uncertainty_weighting=True),
    "calibration": LossSettings(use_calibration_smoothing=True),
    "both": LossSettings(use_uncertainty_weighting=True, use_calibration_smoothing=True),
}
"""The four arms as published."""

CONTROLLED = {
    "uncertainty_mean_one": LossSettings(use_uncertainty_weighting=True, weighting="mean_one"),
    "calibration_confident": LossSettings(use_calibration_smoothing=True, smoothing="confident"),
    "both_controlled": LossSettings(
        use_uncertainty_weighting=True,
        weighting="mean_one",
        use_calibration_smoothing=True,
        smoothing="confident",
    ),
}
"""Weights with mean one, which keep the share of the hard loss; smoothing of confident targets."""

CONTROLS = {
    "weight_matched": LossSettings(use_uncertainty_weighting=True, weighting="matched"),
    "weight_permuted": LossSettings(use_uncertainty_weighting=True, weighting="permuted"),
    "weight_inverse": LossSettings(use_uncertainty_weighting=True, weighting="inverse"),
    "epsilon_matched": LossSettings(use_calibration_smoothing=True, smoothing="matched"),
    "hard_only": LossSettings(alpha=1.0),
    "soft_only": LossSettings(alpha=0.0),
}
"""Control arms that separate the effect of α, of weighting, and of which positions are weighted."""

ARMS = {**PUBLISHED, **CONTROLLED, **CONTROLS}

SIZES = {
    "s27": StudentSettings(4, 4, 128),
    "s11": StudentSettings(2, 4, 104),
    "s05": StudentSettings(2, 4, 64),
    "deep11": StudentSettings(3, 4, 92),
}
"""Students of about 27, 11 and 5 % of the bundled teacher, the last one a layer deeper."""


def shape_named(name: str) -> StudentSettings:
    """Return the shape of a name in :data:`SIZES`, or of ``LAYERSxHEADSxWIDTH``.

    Raises:
        ValueError: it is neither, or the heads do not divide the width.
    """
    if name in SIZES:
        return SIZES[name]
    numbers = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", name)
    if numbers is None:
        raise ValueError(
            f"--sizes {name}: must be one of {', '.join(SIZES)}, or layers, heads and width such "
            "as 3x4x88"
        )
    return StudentSettings(*map(int, numbers.groups()))


RATES_FILE = "learning_rates.json"
"""File with the choice of a tuning grid or a sweep, in the directory of its results."""
CHOSEN = record_type(
    {"rates": dict[Any, dict[Any, Positive]], "best_arm": dict[Any, str]}, required=True
)
"""Type of that file."""
RATES = (2e-3, 4e-3, 8e-3)
"""Learning rates that are tried for every arm."""

SHARED = TrainSettings(
    data=BUNDLED_DATA,
    teacher_model=BUNDLED_TEACHER,
    train_size_prop=1.0,
    batch_size=16,
    max_steps=120,
    precision="fp32",
    eval_steps=40,
    save_steps=40,
    validation_proteins=200,
    cached_teacher=True,
    init_from=BUNDLED_TEACHER,
)
"""Settings of all grids whose students are cut from the bundled teacher."""

RANDOM = replace(SHARED, init_from=None, max_steps=300, eval_steps=60, save_steps=60)
"""Settings of all grids whose students start from random weights, as the published ones did."""


@dataclass(frozen=True)
class Cell:
    """One training: an arm, a size, a seed and a learning rate."""

    arm: str
    size: str
    seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        """The name of the cell's results file."""
        return f"{self.arm}-{self.size}-seed{self.seed}-lr{self.learning_rate:g}"


@dataclass(frozen=True)
class Grid:
    """Arms × sizes × seeds × learning rates, and the settings that all cells share.

    Attributes:
        name: value of ``--grid``.
        purpose: one line for ``--list``.
        arms: loss settings by name.
        sizes: student shapes by name.
        seeds: seeds of the initial weights and the data order.
        rates: learning rates of every arm.
        tuned: read each arm's learning rate from the file that tuning wrote, not from ``rates``.
        split: the part that cells are measured on: ``validation`` to choose, ``test`` to confirm.
        shared: all other settings.
        cell_files: name of an arm's results file where it is not the cell's name.
    """

    name: str
    purpose: str
    arms: Mapping[str, LossSettings]
    sizes: Mapping[str, StudentSettings]
    seeds: tuple[int, ...]
    rates: tuple[float, ...] = (2e-3,)
    tuned: bool = False
    split: str = "validation"
    shared: TrainSettings = SHARED
    cell_files: Mapping[str, str] = field(default_factory=dict)

    def cells(self, tuned: Mapping[str, Mapping[str, float]] | None = None) -> list[Cell]:
        """Return all cells, ordered by seed, size and arm.

        A grid that is ``tuned`` needs the learning rate by size and arm.

        Raises:
            ValueError: a tuned learning rate is missing.
        """
        return [
            Cell(arm, size, seed, rate)
            for seed in self.seeds
            for size in self.sizes
            for arm in self.arms
            for rate in self._rates(size, arm, tuned)
        ]

    def _rates(
        self, size: str, arm: str, tuned: Mapping[str, Mapping[str, float]] | None
    ) -> tuple[float, ...]:
        if not self.tuned:
            return self.rates
        try:
            return ((tuned or {})[size][arm],)
        except KeyError:
            raise ValueError(
                f"the grid {self.name} needs a tuned learning rate for {arm} at {size}: run "
                f"--grid {self.name}-tuning and --choose first"
            ) from None

    def settings(self, cell: Cell) -> TrainSettings:
        """Return the settings of a cell, as scripts/train.py would take them."""
        return replace(
            self.shared,
            student=self.sizes[cell.size],
            loss=self.arms[cell.arm],
            learning_rate=cell.learning_rate,
            seed=cell.seed,
        )

    def group_of(self, cell: Cell) -> str:
        """Return the name of a cell's group, whose students are trained together.

        Students of one group share initial weights and batches and differ in loss and rate.
        """
        return f"{cell.size}-seed{cell.seed}"

    def file_of(self, cell: Cell) -> str:
        """Return the name of a cell's results file."""
        return self.cell_files.get(cell.arm, cell.name) + ".json"


def read_rates(folder: Path) -> dict[str, Any]:
    """Return what a tuning grid or a sweep chose: ``rates`` by size and arm, ``best_arm`` by size.

    Raises:
        ValueError: the file is missing or broken.
    """
    path = folder / RATES_FILE
    record = read_json(path)
    check_record(record, CHOSEN, path, "choose again (scripts/ablation.py --grid NAME --choose)")
    return record


def settings_key(settings: TrainSettings) -> str:
    """Return a short hash of all settings that decide a cell's outcome."""
    text = json.dumps(as_recorded(settings), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


SWEPT = {
    "temperature": ("temperature", (1, 2, 4, 6, 8, 10)),
    "alpha": ("alpha", (0.1, 0.3, 0.5, 0.7, 0.9)),
    "smoothing": ("smoothing_factor", (0.01, 0.05, 0.1, 0.2)),
}
"""Setting and values of each sweep, by the name of its grid."""


def sweep_arms(name: str, loss: LossSettings, values: Sequence[float] = ()) -> dict[str, Any]:
    """Return the arms of a sweep: a loss with one of its settings, a key of ``SWEPT``, changed.

    ``values`` are taken instead of those in ``SWEPT``.

    Raises:
        ValueError: a value is given twice or is out of range.
    """
    setting, usual = SWEPT[name]
    values = values or usual
    if len(set(values)) < len(values):
        raise ValueError("--values: the same value twice")
    smoothed = {"use_calibration_smoothing": True} if setting == "smoothing_factor" else {}
    changes: list[dict[str, Any]] = [{setting: value, **smoothed} for value in values]
    return {f"{setting}{change[setting]:g}": replace(loss, **change) for change in changes}


def sweep_of_run(
    name: str, settings: TrainSettings, size: str, values: Sequence[float] = ()
) -> Grid:
    """Return the sweep of one setting around a run, at the run's seed and learning rate.

    ``settings`` are of the run, as scripts/train.py would train it, and ``size`` names the
    student's shape; ``name`` and ``values`` are as in :func:`sweep_arms`.

    Raises:
        ValueError: a setting does not apply to students that are trained together.
    """
    for other in (
        "early_stopping", "loss_impl", "optimizer", "other_learning_rate", "skip_loss_spikes",
        "tokenizer",
    ):  # fmt: skip
        if getattr(settings, other) != getattr(DEFAULTS, other):
            raise ValueError(f"--{other}: not in a sweep, whose students are trained together")
    if settings.student is None:
        raise ValueError("--init_from: a sweep trains GPT-2 students, and this model is none")
    return Grid(
        f"sweep_{name}",
        f"{name} around a run of scripts/train.py; the best is chosen on validation",
        sweep_arms(name, settings.loss, values),
        {size: settings.student},
        (settings.seed,),
        rates=(settings.learning_rate,),
        shared=settings,
    )


def _bundled_sweep(name: str, title: str) -> Grid:
    return Grid(
        name,
        f"{title}; the best is chosen on validation",
        sweep_arms(name, LossSettings()),
        {"s11": SIZES["s11"]},
        (42, 43),
        rates=(4e-3,),
    )


def _tuned_and_confirmed(
    name: str,
    purpose: str,
    shared: TrainSettings,
) -> tuple[Grid, Grid]:
    """Return the two grids of an experiment: one tunes every arm's rate, one confirms on test."""
    tuning = Grid(
        f"{name}-tuning",
        f"{purpose}: tune every arm's learning rate, on validation proteins, at a separate seed",
        ARMS,
        {size: SIZES[size] for size in ("s27", "s11")},
        (1000,),
        rates=RATES,
        shared=shared,
    )
    confirm = replace(
        tuning,
        name=name,
        purpose=f"{purpose}: every arm at its tuned learning rate, on test proteins",
        seeds=(1, 2, 3, 4, 5),
        rates=(),
        tuned=True,
        split="test",
    )
    return tuning, confirm


GRIDS = {
    grid.name: grid
    for grid in (
        Grid(
            "owner",
            "the four published arms at one seed: results/ablation_<arm>.json",
            PUBLISHED,
            {"s27": SIZES["s27"]},
            (42,),
            rates=(4e-3,),
            split="test",
            shared=RANDOM,
            cell_files={arm: f"ablation_{arm}" for arm in PUBLISHED},
        ),
        *_tuned_and_confirmed("synergy", "the claim, for students cut from the teacher", SHARED),
        *_tuned_and_confirmed("synergy-random", "the claim, for random initial weights", RANDOM),
        _bundled_sweep("temperature", "temperature of the soft loss"),
        _bundled_sweep("alpha", "weight of the hard loss"),
        _bundled_sweep("smoothing", "largest share of the uniform distribution in a target"),
    )
}

"""The grids of experiments as tables: which arms, sizes, learning rates and seeds are run together.

Light to import. ``docs/EXPERIMENT.md`` says what each is for and was written before the
confirmatory runs; ``scripts/ablation.py --grid NAME`` runs one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from src.common.files import read_json
from src.common.settings import (
    BUNDLED_DATA,
    BUNDLED_TEACHER,
    LossSettings,
    StudentSettings,
    TrainSettings,
    as_recorded,
)
from src.evaluation.results import check_figures

PUBLISHED = {
    "baseline": LossSettings(),
    "uncertainty": LossSettings(use_uncertainty_weighting=True),
    "calibration": LossSettings(use_calibration_smoothing=True),
    "both": LossSettings(use_uncertainty_weighting=True, use_calibration_smoothing=True),
}
"""The owner's four arms, as published."""

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
"""Weights that leave the share of the hard loss alone, and smoothing of confident targets."""

CONTROLS = {
    "weight_matched": LossSettings(use_uncertainty_weighting=True, weighting="matched"),
    "weight_permuted": LossSettings(use_uncertainty_weighting=True, weighting="permuted"),
    "weight_inverse": LossSettings(use_uncertainty_weighting=True, weighting="inverse"),
    "epsilon_matched": LossSettings(use_calibration_smoothing=True, smoothing="matched"),
    "hard_only": LossSettings(alpha=1.0),
    "soft_only": LossSettings(alpha=0.0),
}
"""What tells a change of α from emphasis, and emphasis from which positions get it."""

SIZES = {
    "s27": StudentSettings(4, 4, 128),
    "s11": StudentSettings(2, 4, 104),
    "s05": StudentSettings(2, 4, 64),
}
"""About 27, 11 and 5 % of the bundled teacher."""

RATES_FILE = "learning_rates.json"
"""What a tuning grid or a sweep chose, beside its results."""
RATES = (2e-3, 4e-3, 8e-3)
"""Learning rates that every arm is tuned over."""

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
"""What all cells of the bundled grids have in common: students are cut from the teacher."""

RANDOM = replace(SHARED, init_from=None, max_steps=300, eval_steps=60, save_steps=60)
"""The same for students that start from random weights, as the published ones did."""


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
    """Arms × sizes × seeds × learning rates, and the settings that all share.

    Attributes:
        name: how it is asked for.
        purpose: a line for a person.
        arms: loss settings by name.
        sizes: shapes by name.
        seeds: of weights and data order.
        rates: learning rates that every arm is run with.
        tuned: instead of ``rates``, read each arm's from the file that tuning wrote.
        split: the part that is measured: ``validation`` to choose, ``test`` to confirm.
        shared: every other setting.
        cell_files: file name of a cell where it is not the cell's own name.
        changes: settings other than the loss that an arm changes, by arm.
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
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def cells(self, tuned: Mapping[str, Mapping[str, float]] | None = None) -> list[Cell]:
        """Return all cells, group by group.

        Args:
            tuned: learning rate by size and arm, for a grid that reads them.

        Raises:
            ValueError: a learning rate is wanted and missing.
        """
        cells = []
        for seed in self.seeds:
            for size in self.sizes:
                for arm in self.arms:
                    for rate in self._rates(size, arm, tuned):
                        cells.append(Cell(arm, size, seed, rate))
        return cells

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
            **self.changes.get(cell.arm, {}),
        )

    def group_of(self, cell: Cell) -> str:
        """Return the name of a cell's group: what is trained together, on the same batches.

        Students of one group differ in what a cohort's members may differ in: loss, learning rate
        and initial weights. An arm that changes more is trained in a group of its own.
        """
        own = self.changes.get(cell.arm, {})
        apart = [f"-{name}{own[name]}" for name in sorted(own) if name != "init_from"]
        return f"{cell.size}-seed{cell.seed}{''.join(apart)}"

    def file_of(self, cell: Cell) -> str:
        """Return the name of a cell's results file."""
        return self.cell_files.get(cell.arm, cell.name) + ".json"


def read_rates(folder: Path) -> dict[str, Any]:
    """Read what a tuning grid or a sweep chose: ``rates`` by size and arm, ``best_arm`` by size.

    Raises:
        ValueError: it is not there, or not what was written.
    """
    path = folder / RATES_FILE
    record = read_json(path)
    way_out = "choose again (scripts/ablation.py --grid NAME --choose)"
    kinds = {"rates": "object", "best_arm": "names"}
    check_figures(record, kinds, path, needed=True, way_out=way_out)
    sizes = dict.fromkeys(record["rates"], "rates")
    check_figures(record["rates"], sizes, f"{path}: rates", needed=True, way_out=way_out)
    return record


def settings_key(settings: TrainSettings) -> str:
    """Return a short hash of everything that decides a cell's outcome."""
    text = json.dumps(as_recorded(settings), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sweep(name: str, values: tuple[float, ...], title: str) -> Grid:
    def loss(value: float) -> LossSettings:
        changed: dict[str, Any] = {name: value}
        if name == "smoothing_factor":
            changed["use_calibration_smoothing"] = True
        return replace(LossSettings(), **changed)

    return Grid(
        name=name.removesuffix("_factor"),
        purpose=f"{title}; the best is chosen on validation",
        arms={f"{name}{value:g}": loss(value) for value in values},
        sizes={"s11": SIZES["s11"]},
        seeds=(42, 43),
        rates=(4e-3,),
    )


def _tuned_and_confirmed(
    name: str,
    purpose: str,
    shared: TrainSettings,
    arms: Mapping[str, LossSettings],
    sizes: Mapping[str, StudentSettings],
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5),
) -> tuple[Grid, Grid]:
    """Return the two grids of an experiment: every arm's rate is tuned, then it is confirmed."""
    tuning = Grid(
        f"{name}-tuning",
        f"{purpose}: every arm's learning rate, on validation proteins and a seed of its own",
        arms,
        sizes,
        (1000,),
        rates=RATES,
        shared=shared,
        changes=changes or {},
    )
    confirm = replace(
        tuning,
        name=name,
        purpose=f"{purpose}: every arm at its tuned learning rate, on test proteins",
        seeds=seeds,
        rates=(),
        tuned=True,
        split="test",
    )
    return tuning, confirm


RECIPES = {
    "baseline": LossSettings(),
    "cut": LossSettings(),
    "temperature_1": LossSettings(temperature=1.0),
    "temperature_4": LossSettings(temperature=4.0),
    "soft_only": LossSettings(alpha=0.0),
    "soft_only_temperature_1": LossSettings(alpha=0.0, temperature=1.0),
    "uncertainty": PUBLISHED["uncertainty"],
    "both": PUBLISHED["both"],
    "both_controlled": CONTROLLED["both_controlled"],
    "mean_one": CONTROLLED["uncertainty_mean_one"],
    "confident": CONTROLLED["calibration_confident"],
    "reverse_kl": LossSettings(divergence="reverse_kl"),
    "jsd": LossSettings(divergence="jsd"),
    "skew_kl": LossSettings(divergence="skew_kl", divergence_weight=0.1),
    "long_warmup": LossSettings(),
}
"""What might beat plain distillation. All but ``baseline`` start from the teacher's weights.

Skew 0.1: Ko et al. 2024 (arXiv:2402.03898), whose skew KL mixes that share of the teacher's
distribution into the student's.
"""

ARMS = {**PUBLISHED, **CONTROLLED, **CONTROLS}
TWO_SIZES = {name: SIZES[name] for name in ("s27", "s11")}

GRIDS = {
    grid.name: grid
    for grid in (
        Grid(
            "owner",
            "the owner's four arms at one seed: results/ablation_<arm>.json",
            PUBLISHED,
            {"s27": SIZES["s27"]},
            (42,),
            rates=(4e-3,),
            split="test",
            shared=RANDOM,
            cell_files={arm: f"ablation_{arm}" for arm in PUBLISHED},
        ),
        *_tuned_and_confirmed(
            "synergy", "the claim, for students cut from the teacher", SHARED, ARMS, TWO_SIZES
        ),
        *_tuned_and_confirmed(
            "synergy-random", "the claim, for random initial weights", RANDOM, ARMS, TWO_SIZES
        ),
        *_tuned_and_confirmed(
            "recipe",
            "what might beat plain distillation",
            SHARED,
            RECIPES,
            {"s11": SIZES["s11"]},
            {"baseline": {"init_from": None}, "long_warmup": {"warmup_steps": 36}},
            (11, 12, 13, 14, 15),
        ),
        _sweep("temperature", (1, 2, 4, 6, 8, 10), "temperature of the soft loss"),
        _sweep("alpha", (0.1, 0.3, 0.5, 0.7, 0.9), "share of the hard loss"),
        _sweep("smoothing_factor", (0.01, 0.05, 0.1, 0.2), "largest share of the uniform"),
    )
}

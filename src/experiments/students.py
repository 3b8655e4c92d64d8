"""Trains students by several recipes and measures what quality each reaches for how much compute.

The learning rate of each recipe is chosen first, at a tenth of the length. While a student is
trained, its KL divergence from the teacher on validation proteins is taken before the first step
and at times that grow geometrically. The clock runs from the reading of the proteins on, so that
cutting a student from its teacher counts; it stands still while the divergence is taken. On a CPU
it counts the seconds of the cores, which other programs do not change. A run with a file in
``results`` is not run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from src.common.cli import say
from src.common.files import read_json, remove_folder, write_json
from src.common.runs import changes_of_run
from src.common.settings import (
    OF_TEACHER,
    RECIPES,
    LossSettings,
    StudentSettings,
    TrainSettings,
    as_recorded,
)
from src.evaluation.scoring import EvaluationSettings, score_students
from src.models.initialisation import CALIBRATION_TOKENS
from src.models.loading import ProteinModel
from src.proteins.tokens import TokenisedProteins, tokenise
from src.training.stages import train

TUNING_SEED = 1000
"""Seed of the runs that choose learning rates, which no other run has."""
POINTS = 12
"""Points of a curve, from a hundredth of the steps to the last."""
BEYOND = 2
"""Rates tried beyond an end of the range, where the best one lies there."""


@dataclass(frozen=True)
class Recipe:
    """What a run changes beside the shape and the budget, and the learning rates it chooses from.

    Attributes:
        loss: settings of the loss.
        changes: other settings of the run.
        rates: tried, ascending.
        rate_of: the recipe whose chosen rate it takes; None: it has one chosen for itself.
    """

    loss: LossSettings
    changes: Mapping[str, Any]
    rates: tuple[float, ...]
    rate_of: str | None = None

    @classmethod
    def named(cls, name: str, rates: tuple[float, ...], **changes: Any) -> Recipe:
        """Return a recipe of ``train.py --recipe``, with changes beside it."""
        flags = dict(RECIPES[name])
        loss = {key: flags.pop(key) for key in list(flags) if hasattr(LossSettings(), key)}
        return cls(LossSettings(**loss), {**flags, **changes}, rates)


SOFT = LossSettings(temperature=1.0, alpha=0.0)
CUT = {"init_from": OF_TEACHER}
SMALL = {"batch_size": 4}
RECOMMENDED = Recipe.named("recommended", (5e-4, 1e-3, 2e-3), **SMALL)
COMPARED = {
    "published": Recipe.named("published", (1e-3, 2e-3, 4e-3)),
    "plain": Recipe(LossSettings(), {}, (1e-3, 2e-3, 4e-3)),
    "cut": Recipe(SOFT, CUT, (5e-4, 1e-3, 2e-3)),
    "small": Recipe(SOFT, {**CUT, **SMALL}, (5e-4, 1e-3, 2e-3)),
    "recommended": RECOMMENDED,
    "cached": replace(
        RECOMMENDED,
        changes={**RECOMMENDED.changes, "cached_teacher": True},
        rate_of="recommended",
    ),
}
"""The published recipe and plain distillation, both from random weights; students cut from the
teacher with the soft loss alone, the same in batches of four, and as recommended, which adds Muon
and a rate that is constant until it falls; the same from a cache of the teacher, for many
epochs."""


def clock() -> float:
    """Return seconds: of the cores that this process has used, or with a GPU those of the wall."""
    return time.monotonic() if torch.cuda.is_available() else time.process_time()


class Curve(TrainerCallback):
    """Takes a student's divergence from its teacher at some steps of its training.

    Args:
        steps: after which it is taken.
        measure: returns figures of a model in eval mode.
        file: where the points are kept, for a run that is stopped.
    """

    def __init__(
        self,
        steps: Sequence[int],
        measure: Callable[[Any], dict[str, float]],
        file: Path,
    ) -> None:
        self.steps, self.measure, self.file = set(steps), measure, file
        self.points: list[dict[str, float]] = []
        if file.exists():
            self.points = read_json(file)["points"]
        self.seconds, self.since = 0.0, clock()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any
    ) -> None:
        """Measure the start, or set the clock to where a stopped run goes on."""
        self.points = [point for point in self.points if point["step"] <= state.global_step]
        if state.global_step == 0 or not self.points:
            self.points = []
            self.take(state, model)
            return
        first, last = self.points[0], self.points[-1]
        self.seconds = last["seconds"]
        if last["step"]:
            pace = (last["seconds"] - first["seconds"]) / last["step"]
            self.seconds += pace * (state.global_step - last["step"])
        self.since = clock()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        """Measure, if it is time."""
        if state.global_step in self.steps:
            self.take(state, model)

    def take(self, state: Any, model: Any) -> None:
        """Stop the clock, measure, and write the points down."""
        self.seconds += clock() - self.since
        training = model.training
        model.eval()
        with torch.inference_mode():
            figures = self.measure(model)
        model.train(training)
        point = {"step": state.global_step, "seconds": self.seconds, **figures}
        self.points.append(point)
        write_json(self.file, {"points": self.points})
        say(f"step {point['step']:,}: KL {point['kl_per_residue']:.4f} nats per residue")
        self.since = clock()


@dataclass(frozen=True)
class Students:
    """An experiment on students of one teacher.

    Attributes:
        base: settings of every run: teacher, data, batch, precision, and what cut students are cut
            from (None: the teacher).
        shapes: of the students, by name.
        recipes: by name.
        results: directory of a file for each run.
        work: directory of the students.
        only_read: train nothing; a run that is missing is an error.
    """

    base: TrainSettings
    shapes: Mapping[str, StudentSettings]
    recipes: Mapping[str, Recipe]
    results: Path
    work: Path
    only_read: bool = False

    @cached_property
    def teacher(self) -> ProteinModel:
        """The teacher, loaded once."""
        return ProteinModel.load(str(self.base.teacher_model), torch.device("cpu"), announce=say)

    @cached_property
    def validation(self) -> TokenisedProteins:
        """The proteins that curves and choices are measured on."""
        longest = self.base.max_length
        return tokenise(self.base.data, "validation", self.teacher.tokenizer, longest)

    def divergence(self, student: Any) -> dict[str, float]:
        """Return KL(teacher‖student) and the student's NLL on validation, nats per residue."""
        rows = self.validation
        scores = score_students(
            [student], self.teacher.model, rows, EvaluationSettings(compute_ece=False)
        )[0]
        residues = float(rows.residues.sum())
        return {
            "kl_per_residue": float(scores.sums["kl"].sum()) / residues,
            "nats_per_residue": float(scores.sums["nll_student"].sum()) / residues,
        }

    def settings(
        self, recipe: str, shape: str, rate: float, steps: int, seed: int
    ) -> TrainSettings:
        """Return a run's settings, as scripts/train.py would take them."""
        chosen = self.recipes[recipe]
        changes = dict(chosen.changes)
        cut = changes.get("init_from") == OF_TEACHER
        changes["init_from"] = (self.base.init_from or self.base.teacher_model) if cut else None
        own = self.own_steps(recipe, steps)
        return replace(
            self.base, student=self.shapes[shape], loss=chosen.loss, learning_rate=rate,
            max_steps=own, seed=seed, eval_steps=own, save_steps=max(1, own // 10), **changes,
        )  # fmt: skip

    def own_steps(self, recipe: str, steps: int) -> int:
        """Return a recipe's steps over the proteins of so many steps of the experiment."""
        batch = self.recipes[recipe].changes.get("batch_size", self.base.batch_size)
        return steps * self.base.batch_size // batch

    def run(self, recipe: str, shape: str, rate: float, steps: int, seed: int) -> dict[str, Any]:
        """Train a student, unless it was trained; return the content of its file.

        Raises:
            ValueError: it was not trained, with ``only_read``; or it was, with other settings.
        """
        name = f"{recipe}-{shape}-steps{steps}-seed{seed}-lr{rate:g}"
        path = self.results / f"{name}.json"
        settings = self.settings(recipe, shape, rate, steps, seed)
        if path.exists():
            result = read_json(path)
            if changed := changes_of_run(result["settings"], as_recorded(settings)):
                raise ValueError(
                    f"{path}: was made with other settings ({', '.join(changed)}): choose another "
                    "--results"
                )
            return result
        if self.only_read:
            raise ValueError(f"{path}: there is no such run; leave out --summary to make it")
        say(f"== {name}")
        own = self.own_steps(recipe, steps)
        steps_of_points = np.unique(np.geomspace(max(1, own // 100), own, POINTS).astype(int))
        self.work.mkdir(parents=True, exist_ok=True)
        curve = Curve(steps_of_points.tolist(), self.divergence, self.work / f"{name}.curve.json")
        cache = self.work / f"{name}.cache"
        record = train(
            settings,
            self.work / name,
            resume=(self.work / name).exists(),
            skip_teacher_check=True,
            callbacks=[curve],
            teacher_cache=cache if settings.cached_teacher else None,
        )
        if cache.exists():
            remove_folder(cache)
        result = {
            "recipe": recipe, "shape": shape, "rate": rate, "steps": steps, "seed": seed,
            "model": str(self.work / name), "curve": curve.points,
            "tokens_per_step": tokens_per_step(record),
            "operations_per_token": operations(record, settings),
            "operations_of_start": operations_of_start(record, settings),
            **{key: record[key] for key in ("settings", "student", "device", "git", "started")},
        }  # fmt: skip
        self.results.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
        curve.file.unlink(missing_ok=True)
        return result

    def tuned(self, recipe: str, shape: str, steps: int) -> float:
        """Return the recipe's best learning rate after so many steps, by validation KL.

        Where it is at an end of the range, the rates beyond it are tried, a factor 2 apart.
        """
        if other := self.recipes[recipe].rate_of:
            return self.tuned(other, shape, steps)
        losses: dict[float, float] = {}
        wanted = list(self.recipes[recipe].rates)
        for _ in range(1 + BEYOND):
            for rate in wanted:
                tried = self.run(recipe, shape, rate, steps, TUNING_SEED)
                losses[rate] = tried["curve"][-1]["kl_per_residue"]
            best = min(losses, key=lambda rate: losses[rate])
            ends = {min(losses): best / 2, max(losses): best * 2}
            if best not in ends:
                break
            wanted = [ends[best]]
        return best


def tokens_per_step(record: Mapping[str, Any]) -> float:
    """Return the tokens of a step, on average over the training proteins."""
    data, settings = record["data"]["train"], record["settings"]
    return settings["batch_size"] * data["tokens"] / data["proteins"]


def operations(record: Mapping[str, Any], settings: TrainSettings) -> float:
    """Return the operations of training for each token: 6 P of the student and 2 P of the teacher.

    P counts the weights that take part in a matrix product, about all of them (Kaplan et al. 2020,
    arXiv:2001.08361, table 1); the student runs forward and backward, the teacher forward, unless
    it is read from a cache.
    """
    teacher = 0 if settings.cached_teacher else record["teacher"]["parameters"]
    return 6 * record["student"]["parameters"] + 2 * teacher


def operations_of_start(record: Mapping[str, Any], settings: TrainSettings) -> float:
    """Return the operations before the first step.

    Cutting a student is a pass forward of student and teacher over a few proteins (the fits of
    single matrices, about a tenth of that, are left out); filling a cache is one of the teacher
    over all of them.
    """
    student, teacher = record["student"]["parameters"], record["teacher"]["parameters"]
    cutting = 2 * (student + teacher) * CALIBRATION_TOKENS if settings.init_from else 0
    tokens = record["data"]["train"]["tokens"] if settings.cached_teacher else 0
    return cutting + 2 * teacher * tokens


def reached(curve: Sequence[Mapping[str, float]], quality: float, axis: str) -> float | None:
    """Return where on an axis a curve first reaches a KL divergence, or None where it does not.

    Between two points it is interpolated in the logarithms of both; from step 0 on, linearly.

    Args:
        curve: points with ``kl_per_residue`` and the axis.
        quality: KL per residue.
        axis: ``seconds`` or ``step``.
    """
    before = None
    for point in curve:
        if point["kl_per_residue"] <= quality:
            if before is None:
                return point[axis]
            high, low = np.log(before["kl_per_residue"]), np.log(point["kl_per_residue"])
            share = (high - np.log(quality)) / (high - low)
            if before[axis] == 0:
                return share * point[axis]
            return float(np.exp((1 - share) * np.log(before[axis]) + share * np.log(point[axis])))
        before = point
    return None


def compute_ratios(first: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float] | None:
    """Return how much more compute one run took to its end than another to the same KL.

    Args:
        first: the file of a run.
        other: that of the other.

    Returns:
        ``seconds`` and ``operations``; None where the other never was as close to the teacher.
    """
    end = first["curve"][-1]
    seconds = reached(other["curve"], end["kl_per_residue"], "seconds")
    step = reached(other["curve"], end["kl_per_residue"], "step")
    if seconds is None or step is None:
        return None

    def cost(run: Mapping[str, Any], steps: float) -> float:
        start = run.get("operations_of_start", 0)
        return start + steps * run["tokens_per_step"] * run["operations_per_token"]

    return {
        "seconds": end["seconds"] / seconds,
        "operations": cost(first, end["step"]) / cost(other, step),
    }

"""What the sections of the benchmark share: sizes, proteins, the timing, single training steps.

ProtGPT2's weights are not needed, only its shape, which decides the cost: models of that shape have
random weights. Proteins are real; they go through the bundled tokenizer, whose ids are also ids of
the larger vocabulary.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from src.common.cli import say
from src.common.settings import LossSettings, StudentSettings, TrainSettings
from src.distillation import DistillationTrainer
from src.evaluation.student_record import choose_split
from src.models.loading import (
    ProteinModel,
    build_student,
    max_positions,
    student_config,
)
from src.models.teacher_cache import CachedCollator, TeacherCache, capture
from src.proteins.batching import PaddingCollator, ProteinDataset
from src.proteins.tokens import TokenisedProteins, tokenise
from src.training.assembly import build_arguments
from tools.benchmark.loss import relative_difference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENHANCED = LossSettings(use_uncertainty_weighting=True, use_calibration_smoothing=True)
PROTEINS = 5000
"""Proteins that are read, at most: those of the right lengths are chosen among them."""
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12}
"""Dense bfloat16 operations for each second by the makers' sheets, for utilisation."""
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
"""Relative difference up to which two sides compute the same loss and gradient."""


@dataclass(frozen=True)
class Scale:
    """How large everything is. Batches are rows × tokens, students the true shapes.

    Attributes:
        teacher: shape of the random teacher.
        vocabulary: of teacher and students.
        students: by the ending of their ratios' names.
        loss_batch: of the loss alone.
        step_batch: of whole steps.
        precision: of whole steps and of comparisons with other libraries.
        rounds: timed, after one that is not.
        slow_rounds: the same for whole steps and generation.
        long_rounds: the same for three students and evaluation, whose rounds take longest.
        sampled_rows: proteins sampled at a time.
        sampled_tokens: tokens of each, at most; of the largest model 24.
        evaluated: proteins evaluated.
    """

    teacher: StudentSettings = StudentSettings(36, 20, 1280)
    vocabulary: int = 50_257
    students: tuple[tuple[str, StudentSettings], ...] = (
        ("4l512", StudentSettings(4, 4, 512)),
        ("6l768", StudentSettings(6, 8, 768)),
        ("12l1024", StudentSettings(12, 16, 1024)),
    )
    loss_batch: tuple[int, int] = (4, 512)
    step_batch: tuple[int, int] = (1, 512)
    precision: str = "fp32"
    rounds: int = 4
    slow_rounds: int = 3
    long_rounds: int = 2
    sampled_rows: tuple[int, ...] = (1, 16, 256)
    sampled_tokens: int = 256
    evaluated: int = 1000

    @property
    def dtype(self) -> str:
        """Name of the dtype that the precision computes in."""
        return "float32" if self.precision == "fp32" else "bfloat16"

    @classmethod
    def of(cls, device: torch.device, quick: bool = False) -> Scale:
        """Return what suits a device; ``quick`` is for tests and for a look at the tool itself."""
        if quick:
            shapes = (("4l512", (1, 2, 32)), ("6l768", (2, 2, 32)), ("12l1024", (2, 4, 48)))
            return cls(
                teacher=StudentSettings(3, 2, 64),
                vocabulary=1031,
                students=tuple((name, StudentSettings(*shape)) for name, shape in shapes),
                loss_batch=(2, 48),
                step_batch=(2, 32),
                rounds=2,
                slow_rounds=1,
                long_rounds=1,
                sampled_rows=(1, 16),
                sampled_tokens=16,
                evaluated=6,
            )
        if device.type == "cuda":
            return cls(
                loss_batch=(16, 512), step_batch=(16, 512), precision="bf16", rounds=20,
                slow_rounds=5, long_rounds=3,
            )  # fmt: skip
        return cls()


@dataclass
class Workbench:
    """What the sections work on: the device, sizes, real proteins, a small teacher."""

    device: torch.device
    scale: Scale
    proteins: TokenisedProteins
    tokenizer: Any
    small_teacher: PreTrainedModel
    quick: bool = False
    announce: Callable[[str], None] = say

    def rows(self, rows: int, length: int) -> TokenisedProteins:
        """Return proteins that nearly fill so many rows of so many tokens.

        Raises:
            ValueError: there are too few proteins.
        """
        lengths = np.asarray(self.proteins.lengths)
        fitting = np.flatnonzero(lengths <= length)
        if len(fitting) < rows:
            raise ValueError(f"{rows} proteins of at most {length} tokens are needed: give more")
        order = fitting[np.argsort(-lengths[fitting], kind="stable")]
        return self.proteins.subset(np.sort(order[:rows]))

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def open_workbench(
    device: torch.device,
    data: str,
    teacher_model: str,
    quick: bool = False,
    rounds: int | None = None,
    cache_dir: str | None = None,
) -> Workbench:
    """Load proteins, held out where the source has such a part, and the small teacher.

    ``quick`` takes tiny shapes; ``rounds`` are those of every section, None: what suits the device.

    Raises:
        ValueError: data or teacher cannot be had.
    """
    scale = Scale.of(device, quick)
    if rounds:
        scale = replace(scale, rounds=rounds, slow_rounds=rounds, long_rounds=rounds)
    teacher, tokenizer = ProteinModel.load(teacher_model, device)
    if len(tokenizer) > scale.vocabulary:
        raise ValueError(
            f"{teacher_model}: its tokenizer has more than {scale.vocabulary:,} tokens"
        )
    split, _ = choose_split(data, None)
    proteins = tokenise(
        data,
        split,
        tokenizer,
        max_positions(teacher.config),
        cache_dir,
        long_proteins="drop",
        max_proteins=PROTEINS,
        quiet=True,
    )
    return Workbench(device, scale, proteins, tokenizer, teacher, quick)


# Measuring -----------------------------------------------------------------------------------


def interleave(
    sides: Mapping[str, Callable[[], Any]],
    rounds: int,
    synchronise: Callable[[], None] = lambda: None,
    *,
    warm: bool = True,
    amounts: Mapping[str, float] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time every side in every round.

    Args:
        sides: what to time, by name.
        rounds: how many.
        synchronise: waits for the device.
        warm: run every side once before, untimed.
        amounts: how much each side did in its last run, where they do not do the same.
        clock: seconds; ``time.process_time`` leaves out the time that other work took the core.

    Returns:
        Seconds of each side, or seconds by amount, one for each round. Every other round goes
        through the sides backwards, so that none always follows the same other.
    """
    if warm:
        for side in sides.values():
            side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    gc.collect()
    gc.disable()  # a collection would fall on whichever side is being timed
    try:
        for number in range(rounds):
            for name in list(sides)[:: -1 if number % 2 else 1]:
                synchronise()
                started = clock()
                sides[name]()
                synchronise()
                taken = clock() - started
                seconds[name].append(taken / amounts[name] if amounts else taken)
    finally:
        gc.enable()
    return seconds


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """Return the median, lowest and highest of theirs by ours over rounds, and the rounds."""
    each = [t / o for t, o in zip(theirs, ours, strict=True)]
    return {
        "ratio": statistics.median(each),
        "lowest": min(each),
        "highest": max(each),
        "reference": list(theirs),
        "ours": list(ours),
    }


def require_same(what: str, differences: Mapping[str, float], tolerance: float) -> None:
    """Stop before timing sides that do not compute the same.

    Raises:
        RuntimeError: a difference is above the tolerance, or not a number.
    """
    for name, difference in differences.items():
        if not difference <= tolerance:
            raise RuntimeError(
                f"{what}: {name} differs by {difference:.2g}, more than {tolerance:g}: not timed"
            )


# Whole steps ---------------------------------------------------------------------------------


class Steps:
    """A teacher of the true shape, and training steps of a student in several ways.

    All ways share the student and its optimiser, made as ``scripts/train.py`` makes them.
    """

    def __init__(self, bench: Workbench, folder: Path) -> None:
        scale = bench.scale
        self.bench, self.folder = bench, folder
        shape = student_config(scale.teacher, _Vocabulary(bench.tokenizer, scale.vocabulary), 512)
        self.teacher = build_student(shape, seed=0).requires_grad_(False).eval()
        if scale.precision == "bf16":
            self.teacher.to(torch.bfloat16)  # type: ignore[call-arg]
        self.teacher.to(bench.device)  # type: ignore[arg-type]
        self.proteins = bench.rows(*scale.step_batch)
        self.collator = PaddingCollator(int(bench.tokenizer.pad_token_id))

    def capture(self, name: str, fingerprint: str | None = None) -> TeacherCache:
        """Run the teacher over the proteins and keep its hidden states."""
        folder = self.folder / name
        return capture(
            self.teacher, self.proteins, folder, announce=lambda _: None, fingerprint=fingerprint
        )

    def batch(self, cache: TeacherCache | None = None) -> dict[str, Tensor]:
        """Return the batch, as a data loader makes it."""
        dataset = ProteinDataset(self.proteins, cache=cache)
        collate: Any = self.collator if cache is None else CachedCollator(self.collator)
        return collate([dataset[i] for i in range(len(dataset))])

    def student(self, shape: StudentSettings) -> PreTrainedModel:
        """Return a new student."""
        return build_student(student_config(shape, self.teacher.config, 512), seed=1)

    def arguments(self) -> Any:
        """Return a Trainer's arguments."""
        return build_arguments(
            TrainSettings(batch_size=len(self.proteins)),
            self.folder / "run",
            steps=1,
            precision=self.bench.scale.precision,
            device=self.bench.device,
            report_to="none",
        )

    def inputs(self) -> dict[str, Any]:
        """Return what every Trainer is given. Its own loop over data is not run."""
        dataset = ProteinDataset(self.proteins)
        return {
            "args": self.arguments(),
            "data_collator": self.collator,
            "train_dataset": dataset,
            "eval_dataset": dataset,
        }

    def trainer(
        self, student: PreTrainedModel, loss_impl: str = "fused", settings: LossSettings = ENHANCED
    ) -> DistillationTrainer:
        """Return a Trainer of one student."""
        return DistillationTrainer(
            model=student,
            teacher_model=self.teacher,
            **asdict(settings),
            loss_impl=loss_impl,
            **self.inputs(),
        )


class _Vocabulary:
    """What :func:`student_config` needs of a teacher's configuration."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.vocab_size = size
        self.bos_token_id = self.eos_token_id = int(tokenizer.eos_token_id)


def student_of(trainer: DistillationTrainer) -> torch.nn.Module:
    """Return what a Trainer trains."""
    assert isinstance(trainer.model, torch.nn.Module)
    return trainer.model


def prepare(trainer: DistillationTrainer) -> None:
    """Make a Trainer ready for single steps: optimiser, and autocast where it is used."""
    trainer.create_optimizer()
    if trainer.args.bf16:
        trainer.model = trainer.accelerator.prepare_model(student_of(trainer))


def gradient(trainer: DistillationTrainer, batch: dict[str, Tensor]) -> Tensor:
    """Run forward and backward of a step and return the loss."""
    batches, count = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    return trainer.training_step(student_of(trainer), batches[0], count)


def update(trainer: DistillationTrainer, owner: DistillationTrainer | None = None) -> None:
    """Clip and apply the gradients with the optimiser of a Trainer of the same student."""
    optimizer = (owner or trainer).optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    trainer._clip_grad_norm(student_of(trainer))
    optimizer.step()
    student_of(trainer).zero_grad()


def utilisation(bench: Workbench, flops: int, seconds: Sequence[float]) -> dict[str, Any]:
    """Return operations, the rate in the median round, and its share of the device's peak."""
    rate = flops / statistics.median(seconds)
    found: dict[str, Any] = {"flops": flops, "flops_per_second": rate, "mfu": None}
    if bench.device.type == "cuda" and bench.scale.precision == "bf16":
        name = torch.cuda.get_device_name(bench.device)
        peak = next((p for key, p in PEAK_FLOPS.items() if key in name), None)
        found["mfu"] = rate / peak if peak else None
    return found


def gradients_agree(
    student: PreTrainedModel, passes: Callable[[str], Tensor], sides: Sequence[str] | Mapping
) -> dict[str, float]:
    """Return how far each side's loss and gradient are from the first's, on the same weights."""
    found: dict[str, list[Tensor]] = {}
    for side in sides:
        student.zero_grad()
        loss = passes(side)
        norms = [p.grad.double().norm() for p in student.parameters() if p.grad is not None]
        some = next(iter(student.parameters())).grad
        assert some is not None
        found[side] = [loss, torch.stack(norms), some.clone()]
    student.zero_grad()
    first, *others = found
    return {
        f"{what} of {side}": relative_difference(ours, theirs)
        for side in others
        for what, ours, theirs in zip(
            ("loss", "norms of gradients", "gradient of the embeddings"),
            found[side],
            found[first],
            strict=True,
        )
    }


def gradients_of(student: torch.nn.Module) -> list[Tensor]:
    """Take a student's gradients away from it, and return them."""
    found = [p.grad for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    return found

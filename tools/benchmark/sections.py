"""Times ours beside the plain way of doing the same, and keeps every round.

Each section names its sides, checks that they compute the same, and times them in turn in one
process (A B C, A B C, ...), so that whatever else the machine does falls on all of them; a ratio is
the median over rounds of the plain way's time by ours, of the same round. Memory is the most that
a side held beyond what it was given: of a process of its own on a CPU, of the allocator on CUDA.

ProtGPT2's weights are not needed, only its shape, which decides the cost: models of that shape have
random weights. Proteins are real; they go through the bundled tokenizer, whose ids are ids of the
larger vocabulary too.
"""

from __future__ import annotations

import gc
import importlib.util
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from src.common.cli import say
from src.common.devices import describe_device
from src.common.settings import LossSettings, StudentSettings, TrainSettings
from src.distillation import DistillationTrainer
from src.evaluation.generation import GenerationSettings, sample_proteins
from src.evaluation.scoring import EvaluationSettings, choose_split
from src.loss.fused import elementwise_for
from src.models.loading import (
    build_student,
    load_causal_lm,
    load_tokenizer,
    max_positions,
    model_fingerprint,
    student_config,
)
from src.models.teacher_cache import CachedCollator, TeacherCache, capture
from src.proteins.batching import PaddingCollator, ProteinDataset
from src.proteins.layouts import prompt_layout
from src.proteins.tokens import TokenisedProteins, tokenise
from src.training.assembly import build_arguments
from src.training.cohort import CohortTrainer, Member
from tools.benchmark.evaluation import EvaluationBench, Sums, sums_difference
from tools.benchmark.loss import LossBench, LossCase, measure_loss_peak, relative_difference
from tools.benchmark.report import KIND, SCHEMA_VERSION, SECTIONS

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
        generated: proteins sampled in a batch.
        alone: proteins of these sampled one at a time in a round.
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
    generated: int = 100
    alone: int = 8
    evaluated: int = 1000

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
                generated=4,
                alone=1,
                evaluated=6,
            )
        if device.type == "cuda":
            return cls(
                loss_batch=(16, 512), step_batch=(16, 512), precision="bf16", rounds=20,
                slow_rounds=5, long_rounds=3, alone=20,
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
    announce: Callable[[str], None] = say,
) -> Workbench:
    """Load proteins and the small teacher.

    Args:
        device: where to measure.
        data: proteins, held out where the source has such a part.
        teacher_model: the small teacher and its tokenizer.
        quick: tiny shapes.
        rounds: of every section; None: what suits the device.
        cache_dir: where tokenised proteins are kept.
        announce: called with each line for a person.

    Raises:
        ValueError: data or teacher cannot be had.
    """
    scale = Scale.of(device, quick)
    if rounds:
        scale = replace(scale, rounds=rounds, slow_rounds=rounds, long_rounds=rounds)
    tokenizer = load_tokenizer(teacher_model)
    teacher = load_causal_lm(teacher_model, device=device)
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
    return Workbench(device, scale, proteins, tokenizer, teacher, quick, announce)


# Measuring -----------------------------------------------------------------------------------


def interleave(
    sides: Mapping[str, Callable[[], Any]],
    rounds: int,
    synchronise: Callable[[], None] = lambda: None,
    *,
    warm: bool = True,
    amounts: Mapping[str, float] | None = None,
) -> dict[str, list[float]]:
    """Time every side in every round.

    Args:
        sides: what to time, by name.
        rounds: how many.
        synchronise: waits for the device.
        warm: run every side once before, untimed.
        amounts: how much each side did in its last run, where they do not do the same.

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
                started = time.perf_counter()
                sides[name]()
                synchronise()
                taken = time.perf_counter() - started
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


# The loss alone ------------------------------------------------------------------------------


def loss_case(bench: Workbench, dtype: str, settings: LossSettings) -> LossCase:
    """Return the loss of the smallest student over real proteins."""
    scale = bench.scale
    proteins = bench.rows(*scale.loss_batch)
    return LossCase(
        tuple(tuple(map(int, proteins[i])) for i in range(len(proteins))),
        scale.students[0][1].n_embd,
        scale.teacher.n_embd,
        scale.vocabulary,
        dtype,
        settings,
        str(bench.device),
        torch.get_num_threads(),
    )


def loss_section(bench: Workbench) -> dict[str, Any]:
    """Compare the fused loss with the plain one, with both enhancements on: time and memory."""
    found: dict[str, Any] = {"ratios": {}, "checks": {}, "measured": {}}
    for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        case = loss_case(bench, dtype, ENHANCED)
        losses = LossBench(case)
        check = losses.differences("fused", "reference")
        require_same(f"loss in {name}", check, TOLERANCES[dtype])
        sides = losses.sides("reference", "fused")
        seconds = interleave(sides, bench.scale.rounds, bench.synchronise)
        found["checks"][name] = check
        found["measured"][f"loss_time_{name}"] = ratio(seconds["reference"], seconds["fused"])
        found["elementwise"] = elementwise_for(losses.weight).__name__
        del losses, sides
        gc.collect()
        peaks = {side: measure_loss_peak(case, side) for side in ("reference", "fused")}
        memory = ratio(*([peaks[side]["bytes"]] for side in ("reference", "fused")))
        found["measured"]["loss_memory" if name == "fp32" else f"loss_memory_{name}"] = memory
    found["tokens"] = sum(len(row) - 1 for row in case.labels)
    return found


def liger_section(bench: Workbench) -> dict[str, Any]:
    """Compare the fused loss with Liger's chunked one, neither weighted nor smoothed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {"skipped": "liger-kernel is not installed"}
    dtype = "float32" if bench.scale.precision == "fp32" else "bfloat16"
    case = loss_case(bench, dtype, LossSettings())
    losses = LossBench(case)
    check = losses.differences("fused", "liger")
    require_same("Liger's loss", check, TOLERANCES[dtype])
    sides = losses.sides("liger", "fused")
    seconds = interleave(sides, bench.scale.rounds, bench.synchronise)
    del losses, sides
    gc.collect()
    peaks = {side: measure_loss_peak(case, side) for side in ("liger", "fused")}
    return {
        "checks": {dtype: check},
        "measured": {
            "liger_loss_time": ratio(seconds["liger"], seconds["fused"]),
            "liger_loss_memory": ratio(*([peaks[side]["bytes"]] for side in ("liger", "fused"))),
        },
        "objective": "forward KL and cross-entropy without weights or smoothing",
    }


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


def step_section(bench: Workbench) -> dict[str, Any]:
    """Compare whole steps: the plain loss with the teacher, the fused one with and without it."""
    found: dict[str, Any] = {"checks": {}, "measured": {}, "work": {}}
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps(bench, Path(folder))
        cache = steps.capture("cache")
        for name, shape in bench.scale.students:
            student = steps.student(shape)
            trainers = {
                "reference": steps.trainer(student, "reference"),
                "online": steps.trainer(student),
                "cached": steps.trainer(student),
            }
            owner = trainers["reference"]
            prepare(owner)
            caches = {"cached": cache}

            def passes(side: str, trainers: Any = trainers, caches: Any = caches) -> Tensor:
                return gradient(trainers[side], steps.batch(caches.get(side)))

            flops: dict[str, int] = {}

            def counted(side: str, passes: Any = passes, flops: dict = flops) -> Tensor:
                with FlopCounterMode(display=False) as counter:
                    loss = passes(side)
                flops[side] = counter.get_total_flops()
                return loss

            check = gradients_agree(student, counted, trainers)
            kind = "float32" if bench.scale.precision == "fp32" else "bfloat16"
            require_same(f"step of {name}", check, TOLERANCES[kind])

            def step(side: str, passes: Any = passes, trainers: Any = trainers) -> None:
                passes(side)
                update(trainers[side], trainers["reference"])

            sides = {side: lambda s=side, run=step: run(s) for side in trainers}
            seconds = interleave(sides, bench.scale.slow_rounds, bench.synchronise)
            found["checks"][name] = check
            for side in ("online", "cached"):
                measured = ratio(seconds["reference"], seconds[side])
                found["measured"][f"{side}_step_{name}"] = measured
            found["work"][name] = {
                side: utilisation(bench, flops[side], seconds[side]) for side in trainers
            }
            bench.announce(f"  {name}: {_ratios_line(found['measured'], name)}")
            del student, trainers, owner, sides
            gc.collect()
    found["tokens"] = int(np.asarray(steps.proteins.lengths).sum())
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


def students_section(bench: Workbench) -> dict[str, Any]:
    """Compare three students, three epochs: one after the other plainly, or together from a cache.

    The capture of the cache is part of ours.
    """
    epochs = 3
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps(bench, Path(folder))
        students = [steps.student(shape) for _, shape in bench.scale.students]
        members = [
            Member(name, student, ENHANCED, 1e-3)
            for (name, _), student in zip(bench.scale.students, students, strict=True)
        ]
        alone = [steps.trainer(student, "reference") for student in students]
        cohort = CohortTrainer(members, steps.teacher, **steps.inputs())
        for trainer in (*alone, cohort):
            prepare(trainer)
        # What the hash of the weights costs depends neither on proteins nor on epochs.
        started = time.perf_counter()
        fingerprint = model_fingerprint(steps.teacher)
        hashing = time.perf_counter() - started
        captures = iter(range(1 << 30))

        def plainly() -> None:
            for trainer in alone:
                for _ in range(epochs):
                    gradient(trainer, steps.batch())
                    update(trainer)

        def together() -> None:
            name = f"cache-{next(captures)}"
            cache = steps.capture(name, fingerprint)
            for _ in range(epochs):
                gradient(cohort, steps.batch(cache))
                update(cohort)
            shutil.rmtree(steps.folder / name)

        cache = steps.capture("check", fingerprint)
        plain = []
        for trainer in alone:
            gradient(trainer, steps.batch())
            plain.append(gradients_of(student_of(trainer)))
        gradient(cohort, steps.batch(cache))
        check = {
            name: max(map(relative_difference, gradients_of(student), expected))
            for (name, _), student, expected in zip(
                bench.scale.students, students, plain, strict=True
            )
        }
        student_of(cohort).zero_grad()
        kind = "float32" if bench.scale.precision == "fp32" else "bfloat16"
        require_same("gradients of students", check, 10 * TOLERANCES[kind])
        sides = {"alone": plainly, "together": together}
        # The check was their warm-up.
        seconds = interleave(sides, bench.scale.long_rounds, bench.synchronise, warm=False)
    return {
        "checks": check,
        "measured": {"three_students_three_epochs": ratio(seconds["alone"], seconds["together"])},
        "seconds_to_hash_the_teacher": hashing,
        "tokens": int(np.asarray(steps.proteins.lengths).sum()),
        "epochs": epochs,
    }


def trl_section(bench: Workbench) -> dict[str, Any]:
    """Compare whole steps with TRL's GKD loss: forward KL at T = 1, no hard loss.

    That is the objective which its trainer can express and ours too; its loss function is called
    on the two models' full logits, as its trainer does.
    """
    if importlib.util.find_spec("trl") is None:
        return {"skipped": "trl is not installed"}
    import os
    import warnings

    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gkd import GKDTrainer  # type: ignore[import]

    with tempfile.TemporaryDirectory() as folder:
        steps = Steps(bench, Path(folder))
        student = steps.student(bench.scale.students[0][1])
        ours = steps.trainer(student, settings=LossSettings(temperature=1.0, alpha=0.0))
        prepare(ours)

        def theirs() -> Tensor:
            inputs = {k: v.to(bench.device) for k, v in steps.batch().items()}
            options = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            with ours.compute_loss_context_manager():
                logits = student(**options).logits  # type: ignore[operator]
                with torch.no_grad():
                    taught = steps.teacher(**options).logits  # type: ignore[operator]
                loss = GKDTrainer.generalized_jsd_loss(
                    logits[:, :-1], taught[:, :-1], inputs["labels"][:, 1:], beta=0
                )
            ours.accelerator.backward(loss)
            return loss.detach()

        passes = {"trl": theirs, "fused": lambda: gradient(ours, steps.batch())}
        check = gradients_agree(student, lambda side: passes[side](), list(passes))
        kind = "float32" if bench.scale.precision == "fp32" else "bfloat16"
        require_same("TRL's loss", check, TOLERANCES[kind])

        def step(side: str) -> None:
            passes[side]()
            update(ours)

        sides = {side: lambda s=side: step(s) for side in passes}
        seconds = interleave(sides, bench.scale.slow_rounds, bench.synchronise)
    return {
        "checks": check,
        "measured": {"trl_step": ratio(seconds["trl"], seconds["fused"])},
        "objective": "forward KL at temperature 1, online teacher, student 4l512",
    }


# Generation and evaluation -------------------------------------------------------------------


@torch.inference_mode()
def generation_section(bench: Workbench) -> dict[str, Any]:
    """Compare sampling in a batch with ``model.generate`` one protein at a time, for each token.

    The ways draw other random numbers, so their proteins differ in length: the time for each token
    is compared. What is checked is that ours samples the same proteins in a batch and alone.
    """
    scale, model, tokenizer = bench.scale, bench.small_teacher, bench.tokenizer
    settings = GenerationSettings(scale.generated, whole_only=False, min_length=1)
    some = replace(settings, num_sequences=scale.alone, batch_size=1)
    alone = sample_proteins(model, tokenizer, some).sequences
    batched = sample_proteins(model, tokenizer, replace(some, batch_size=64)).sequences
    same = float(statistics.mean(a == b for a, b in zip(alone, batched, strict=True)))
    require_same("proteins sampled in a batch", {"their share": 1.0 - same}, 0.0)
    prompt = tokenizer(prompt_layout(), add_special_tokens=False, return_tensors="pt")
    prompt = {k: prompt[k].to(bench.device) for k in ("input_ids", "attention_mask")}
    tokens: dict[str, int] = {"one at a time": 0, "in a batch": 0}

    def one_at_a_time() -> None:
        total = 0
        for _ in range(scale.alone):
            out = model.generate(  # type: ignore[operator]
                **prompt,
                do_sample=True,
                max_length=int(model.config.n_positions),
                top_k=settings.top_k,
                repetition_penalty=settings.repetition_penalty,
                pad_token_id=int(tokenizer.pad_token_id),
            )
            total += out.shape[1] - prompt["input_ids"].shape[1]
        tokens["one at a time"] = total

    def in_a_batch() -> None:
        tokens["in a batch"] = sample_proteins(model, tokenizer, settings).tokens

    torch.manual_seed(0)
    sides = {"one at a time": one_at_a_time, "in a batch": in_a_batch}
    seconds = interleave(sides, scale.slow_rounds, bench.synchronise, warm=False, amounts=tokens)
    return {
        "checks": {"the same proteins in a batch and alone": same},
        "measured": {
            "generation_100": ratio(seconds["one at a time"], seconds["in a batch"])
            | {"unit": "seconds for each token"}
        },
        "proteins": {"one at a time": scale.alone, "in a batch": scale.generated},
        "tokens_of_the_last_round": tokens,
    }


def evaluation_bench(bench: Workbench) -> EvaluationBench:
    """Return the small teacher on as many proteins as are evaluated."""
    count = min(bench.scale.evaluated, len(bench.proteins))
    return EvaluationBench(
        bench.small_teacher, bench.proteins.subset(np.arange(count)), bench.device
    )


def evaluation_section(bench: Workbench) -> dict[str, Any]:
    """Compare evaluating a student beside its teacher in batches with a loop over proteins."""
    work = evaluation_bench(bench)
    check = sums_difference(work.batched(), work.loop())
    require_same("evaluation", check, 1e-3)
    sides = {"loop": work.loop, "batched": work.batched}
    # The check was their warm-up.
    seconds = interleave(sides, bench.scale.long_rounds, bench.synchronise, warm=False)
    return {
        "checks": check,
        "measured": {"evaluation_1000": ratio(seconds["loop"], seconds["batched"])},
        "proteins": len(work.proteins),
        "tokens": int(np.asarray(work.proteins.lengths).sum()),
    }


def evaluation_ways_section(bench: Workbench) -> dict[str, Any]:
    """Compare other ways of evaluating with the same loop; bfloat16 alone gives other figures."""
    work = evaluation_bench(bench)
    ways: dict[str, Callable[[], Sums]] = {
        "batches_4096": lambda: work.batched(EvaluationSettings(batch_size=64, batch_tokens=4096)),
        "batches_1024": lambda: work.batched(EvaluationSettings(batch_tokens=1024)),
        "bf16": work.bfloat16(),
    }
    if bench.device.type == "cpu":
        ways |= {"threads": work.one_batch_a_thread, "onednn": work.other_products}
    with FlopCounterMode(display=False) as counter:
        expected = work.batched()
    checks = {}
    for name, way in ways.items():
        check = checks[name] = sums_difference(way(), expected)
        require_same(f"evaluation, {name}", check, TOLERANCES["bfloat16"])
    seconds = interleave(
        {"loop": work.loop, **ways}, bench.scale.long_rounds, bench.synchronise, warm=False
    )
    return {
        "checks": checks,
        "measured": {f"evaluation_{name}": ratio(seconds["loop"], seconds[name]) for name in ways},
        "proteins": len(work.proteins),
        "flops": counter.get_total_flops(),
    }


# All of it -----------------------------------------------------------------------------------

MEASURES: dict[str, Callable[[Workbench], dict[str, Any]]] = {
    "loss": loss_section,
    "step": step_section,
    "students": students_section,
    "generation": generation_section,
    "evaluation": evaluation_section,
    "evaluation_ways": evaluation_ways_section,
    "trl": trl_section,
    "liger": liger_section,
}


def run_benchmark(bench: Workbench, only: Sequence[str] = SECTIONS) -> dict[str, Any]:
    """Run sections and return ratios, what they were made of, and what was checked.

    Args:
        bench: what to work on.
        only: which sections.

    Returns:
        ``ratios`` by name, of what a plain way takes by what ours takes; the ``sections``; sizes,
        device and data.
    """
    sections: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for name in only:
        bench.announce(f"{name} ...")
        started = time.perf_counter()
        section = MEASURES[name](bench)
        section["seconds"] = round(time.perf_counter() - started, 1)
        sections[name] = section
        if "skipped" in section:
            bench.announce(f"  left out: {section['skipped']}")
            continue
        ratios |= {key: each["ratio"] for key, each in section["measured"].items()}
        bench.announce(f"  {_ratios_line(section['measured'])} ({section['seconds']:.0f} s)")
        gc.collect()
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "quick": bench.quick,
        "device": describe_device(bench.device),
        "ratios": ratios,
        "sections": sections,
        "scale": asdict(bench.scale),
        "data": {"proteins": len(bench.proteins), "fingerprint": bench.proteins.fingerprint},
        "small_teacher": model_fingerprint(bench.small_teacher),
    }


def _ratios_line(measured: Mapping[str, Any], ending: str = "") -> str:
    return ", ".join(
        f"{name} {each['ratio']:.2f}" for name, each in measured.items() if name.endswith(ending)
    )

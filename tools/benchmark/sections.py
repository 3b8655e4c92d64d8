"""What the benchmark measures: each section checks that its sides agree, and then times them.

The sides run in turn in one process (A B C, C B A, ...), so that other load on the machine falls on
all of them; a ratio is the median over rounds of the plain way's time divided by ours of the same
round. Memory is the most that a side held beyond its inputs: of a process of its own on a CPU, of
the allocator on CUDA.
"""

from __future__ import annotations

import gc
import importlib.util
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from src.common.devices import describe_device
from src.common.settings import LossSettings, StudentSettings
from src.evaluation.scoring import score_students, token_statistics
from src.loss.fused import elementwise_for
from src.models.loading import build_student, model_fingerprint, student_config
from src.training.cohort import CohortTrainer, Member
from tools.benchmark.generation import generation_section
from tools.benchmark.loss import LossBench, LossCase, measure_loss_peak, relative_difference
from tools.benchmark.report import KIND, SCHEMA_VERSION, SECTIONS
from tools.benchmark.workbench import (
    ENHANCED,
    TOLERANCES,
    Steps,
    Workbench,
    gradient,
    gradients_agree,
    gradients_of,
    interleave,
    prepare,
    ratio,
    require_same,
    student_of,
    update,
    utilisation,
)

if TYPE_CHECKING:
    pass


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
    dtype = bench.scale.dtype
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
            require_same(f"step of {name}", check, TOLERANCES[bench.scale.dtype])

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
        require_same("gradients of students", check, 10 * TOLERANCES[bench.scale.dtype])
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
        require_same("TRL's loss", check, TOLERANCES[bench.scale.dtype])

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


# Evaluation ----------------------------------------------------------------------------------


def evaluation_section(bench: Workbench) -> dict[str, Any]:
    """Compare evaluating a student beside its teacher in batches with a loop over proteins."""
    teacher = bench.small_teacher
    proteins = bench.proteins.subset(np.arange(min(bench.scale.evaluated, len(bench.proteins))))
    student = build_student(student_config(StudentSettings(2, 2, 128), teacher.config), seed=2)
    student.eval().to(bench.device)  # type: ignore[arg-type]

    @torch.inference_mode()
    def loop() -> dict[str, np.ndarray]:
        sums: dict[str, list[float]] = {}
        for index in range(len(proteins)):
            ids = torch.as_tensor(np.asarray(proteins[index], dtype=np.int64))[None]
            ids = ids.to(bench.device)
            logits = [model(ids).logits[0, :-1].float() for model in (student, teacher)]  # type: ignore[operator]
            for name, values in token_statistics(logits[0], logits[1], ids[0, 1:]).items():
                sums.setdefault(name, []).append(float(values.double().sum()))
        return {name: np.array(values) for name, values in sums.items()}

    def batched() -> dict[str, np.ndarray]:
        return score_students([student], teacher, proteins, None)[0].sums

    ours, theirs = batched(), loop()
    check = {
        name: float(np.abs(ours[name] - theirs[name]).max() / (np.abs(theirs[name]).max() + 1e-30))
        for name in theirs
        if not name.startswith(("agree", "correct"))  # counts: a near tie may fall either way
    }
    require_same("evaluation", check, 1e-3)
    # The check was the warm-up.
    sides = {"loop": loop, "batched": batched}
    seconds = interleave(sides, bench.scale.long_rounds, bench.synchronise, warm=False)
    return {
        "checks": check,
        "measured": {"evaluation_1000": ratio(seconds["loop"], seconds["batched"])},
        "proteins": len(proteins),
        "tokens": int(np.asarray(proteins.lengths).sum()),
    }


# All of it -----------------------------------------------------------------------------------

MEASURES: dict[str, Callable[[Workbench], dict[str, Any]]] = {
    "loss": loss_section,
    "step": step_section,
    "students": students_section,
    "generation": generation_section,
    "evaluation": evaluation_section,
    "trl": trl_section,
    "liger": liger_section,
}


def run_benchmark(bench: Workbench, only: Sequence[str] = SECTIONS) -> dict[str, Any]:
    """Run sections and return ratios, what they were made of, and what was checked.

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

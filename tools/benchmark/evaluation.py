"""The ways of evaluating a student beside its teacher that the benchmark compares."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch

from src.common.settings import StudentSettings
from src.evaluation.scoring import EvaluationSettings, score_students
from src.evaluation.token_statistics import token_statistics
from src.models.loading import build_student, student_config
from src.proteins.tokens import TokenisedProteins

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sums = dict[str, np.ndarray]
"""Each figure ``(P,)`` summed over each protein."""


class EvaluationBench:
    """A small student and its teacher on real proteins, to be evaluated in several ways."""

    def __init__(
        self, teacher: PreTrainedModel, proteins: TokenisedProteins, device: torch.device
    ) -> None:
        self.teacher, self.proteins, self.device = teacher, proteins, device
        shape = student_config(StudentSettings(2, 2, 128), teacher.config)
        self.student = build_student(shape, seed=2).eval()
        self.student.to(device)  # type: ignore[arg-type]

    @torch.inference_mode()
    def loop(self) -> Sums:
        """Evaluate one protein after the other."""
        sums: dict[str, list[float]] = {}
        for index in range(len(self.proteins)):
            ids = torch.as_tensor(np.asarray(self.proteins[index], dtype=np.int64))[None]
            ids = ids.to(self.device)
            of_student, of_teacher = (
                model(ids).logits[0, :-1].float()  # type: ignore[operator]
                for model in (self.student, self.teacher)
            )
            found = token_statistics(of_student, of_teacher, ids[0, 1:])
            for name, values in found.items():
                sums.setdefault(name, []).append(float(values.double().sum()))
        return {name: np.array(values) for name, values in sums.items()}

    def batched(self, settings: EvaluationSettings | None = None) -> Sums:
        """Evaluate as ``scripts/evaluate.py`` does."""
        return _sums(self.student, self.teacher, self.proteins, settings)

    def one_batch_a_thread(self) -> Sums:
        """Evaluate as many batches at a time as there are threads, each with one thread."""
        threads = torch.get_num_threads()
        order = np.argsort(-np.asarray(self.proteins.lengths), kind="stable")
        parts = [np.sort(order[number::threads]) for number in range(threads)]

        def part(chosen: np.ndarray) -> Sums:
            torch.set_num_threads(1)
            return _sums(self.student, self.teacher, self.proteins.subset(chosen))

        try:
            with ThreadPoolExecutor(threads) as pool:
                found = list(pool.map(part, parts))
        finally:
            torch.set_num_threads(threads)
        joined = {name: np.zeros(len(self.proteins)) for name in found[0]}
        for chosen, sums in zip(parts, found, strict=True):
            for name, values in sums.items():
                joined[name][chosen] = values
        return joined

    def other_products(self) -> Sums:
        """Evaluate with oneDNN's products, which may round to bfloat16 where there is AMX."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            return self.batched()
        finally:
            torch.set_float32_matmul_precision(before)

    def bfloat16(self) -> Callable[[], Sums]:
        """Return what evaluates copies of both models in bfloat16."""
        student, teacher = (
            copy.deepcopy(model).to(torch.bfloat16)  # type: ignore[call-arg]
            for model in (self.student, self.teacher)
        )
        return lambda: _sums(student, teacher, self.proteins)


def _sums(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    proteins: TokenisedProteins,
    settings: EvaluationSettings | None = None,
) -> Sums:
    return score_students([student], teacher, proteins, settings)[0].sums


def sums_difference(ours: Sums, theirs: Sums) -> dict[str, float]:
    """Return the largest difference in each sum, by the largest sum."""
    return {
        name: float(np.abs(ours[name] - theirs[name]).max() / (np.abs(theirs[name]).max() + 1e-30))
        for name in theirs
        if not name.startswith(("agree", "correct"))  # counts: a near tie may fall either way
    }

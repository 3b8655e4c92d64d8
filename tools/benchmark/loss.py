"""The loss alone, computed in several ways, and the memory that each holds.

Apart from the rest of the benchmark because a process of its own measures each side's memory on a
CPU, and is to start quickly.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from src.common.settings import LossSettings
from src.loss.chunks import OutputHead
from src.loss.fused import StudentStates, fused_distillation_losses
from src.loss.reference import distillation_loss
from src.proteins.batching import PaddingCollator


def relative_difference(one: Tensor, other: Tensor) -> float:
    """Return ‖a - b‖ / ‖b‖ in float64."""
    scale = other.double().norm().clamp(min=1e-30)
    return float((one.double() - other.double()).norm() / scale)


@dataclass(frozen=True)
class LossCase:
    """Hidden states, heads and labels of a batch: random but for the labels, seeded.

    Attributes:
        labels: token ids of each row.
        width, teacher_width, vocabulary: of hidden states and logits.
        dtype: name of the dtype of hidden states and heads.
        settings: of the loss.
        device: where.
        threads: of a CPU.
    """

    labels: tuple[tuple[int, ...], ...]
    width: int
    teacher_width: int
    vocabulary: int
    dtype: str
    settings: LossSettings
    device: str
    threads: int


class LossBench:
    """One loss computed in several ways, with the gradients of hidden states and head."""

    def __init__(self, case: LossCase) -> None:
        self.case = case
        batch = PaddingCollator(0)([{"input_ids": row} for row in case.labels])
        self.labels, self.mask = (
            batch[name].to(case.device) for name in ("labels", "attention_mask")
        )
        shape = tuple(self.labels.shape)
        random = torch.Generator().manual_seed(0)
        dtype = getattr(torch, case.dtype)

        def normal(*size: int, spread: float = 1.0) -> Tensor:
            values = torch.randn(*size, generator=random).mul_(spread)
            return values.to(case.device, dtype)

        # Logits with a spread of 2, so that distributions are neither flat nor one-hot.
        self.hidden = normal(*shape, case.width).requires_grad_()
        self.weight = normal(case.vocabulary, case.width, spread=2 / math.sqrt(case.width))
        self.weight.requires_grad_()
        self.teacher_hidden = normal(*shape, case.teacher_width)
        spread = 2 / math.sqrt(case.teacher_width)
        self.teacher_weight = normal(case.vocabulary, case.teacher_width, spread=spread)

    def run(self, side: str, rows: int | None = None, tokens: int | None = None) -> Tensor:
        """Compute loss and gradients one way, of all or of some rows and tokens."""
        self.hidden.grad = self.weight.grad = None
        loss = getattr(self, side)(slice(rows), slice(tokens))
        loss.backward()
        return loss.detach()

    def sides(self, *names: str) -> dict[str, Callable[[], Tensor]]:
        """Return several ways by name, to be run."""
        return {name: lambda name=name: self.run(name) for name in names}

    def reference(self, rows: slice, tokens: slice) -> Tensor:
        """Return the plain loss, from full logits."""
        return distillation_loss(
            F.linear(self.hidden[rows, tokens], self.weight),
            F.linear(self.teacher_hidden[rows, tokens], self.teacher_weight),
            self.labels[rows, tokens],
            self.mask[rows, tokens],
            self.case.settings,
        ).loss

    def fused(self, rows: slice, tokens: slice) -> Tensor:
        """Return ours."""
        student = StudentStates(
            self.hidden[rows, tokens], OutputHead(self.weight), self.case.settings
        )
        (parts,) = fused_distillation_losses(
            [student],
            self.teacher_hidden[rows, tokens],
            OutputHead(self.teacher_weight),
            self.labels[rows, tokens],
            self.mask[rows, tokens],
        )
        return parts.loss

    def liger(self, rows: slice, tokens: slice) -> Tensor:
        """Return Liger's chunked loss; it knows neither weights nor smoothing."""
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore[import]

        settings = self.case.settings
        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=settings.alpha,
            weight_soft_loss=(1 - settings.alpha) * settings.temperature**2,
            beta=0.0,  # KL(teacher‖student)
            temperature=settings.temperature,
            compiled=self.hidden.is_cuda,
        )
        return loss(
            self.hidden[rows, tokens][:, :-1].flatten(0, 1),
            self.weight,
            self.teacher_hidden[rows, tokens][:, :-1].flatten(0, 1),
            self.teacher_weight,
            self.labels[rows, tokens][:, 1:].flatten(),
        )

    def differences(self, one: str, other: str) -> dict[str, float]:
        """Return how far one way is from another, in loss and in gradients."""
        found = []
        for side in (one, other):
            loss = self.run(side)
            assert self.hidden.grad is not None
            assert self.weight.grad is not None
            found.append((loss, self.hidden.grad.clone(), self.weight.grad.clone()))
        names = ("loss", "gradient of hidden states", "gradient of the head")
        return {n: relative_difference(a, b) for n, a, b in zip(names, *found, strict=True)}


def loss_peak(case: LossCase, side: str) -> dict[str, int]:
    """Return the most memory that one way of computing a loss holds beyond what it is given.

    Gradients are part of it. Meant for a process of its own on a CPU.
    """
    torch.set_num_threads(case.threads)
    device = torch.device(case.device)
    bench = LossBench(case)
    bench.run(side, rows=1, tokens=8)  # what libraries keep for themselves is not the loss's
    bench.hidden.grad = bench.weight.grad = None
    gc.collect()
    forget_peak(device)
    before, so_far = held_peak(device)
    bench.run(side)
    _, peak = held_peak(device)
    return {"before": before, "peak": peak, "bytes": peak - max(before, so_far)}


def measure_loss_peak(case: LossCase, side: str) -> dict[str, int]:
    """Return :func:`loss_peak`, of a new process on a CPU."""
    if case.device != "cpu":
        return loss_peak(case, side)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(loss_peak, case, side).result()


def held_peak(device: torch.device) -> tuple[int, int]:
    """Return the bytes held now, and the most held since :func:`forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return tuple(int(fields[n].split()[0]) * 1024 for n in ("VmRSS", "VmHWM"))  # type: ignore[return-value]
    factor = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor
    return peak, peak


def forget_peak(device: torch.device) -> None:
    """Begin a new peak, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak so far then counts as held before

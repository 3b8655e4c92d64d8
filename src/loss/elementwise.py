"""The element-wise part of the fused loss in plain PyTorch: logits in, losses and gradients out.

``src.loss.fused`` calls it for one chunk of logits at a time, on a CPU, and on a GPU where
``src.loss.kernels`` cannot run. It works on tiles of a few positions: on a CPU the dozen passes
over a tile then read it from the core's cache. The formulas are in ``src.loss.fused`` and
``src.loss.divergences``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from src.common.settings import LossSettings
from src.loss import divergences
from src.loss.divergences import row_sum, wide
from src.loss.reference import smooth_log_probs, smoothing_epsilon

TILE_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 25}
"""Logits that are worked on at a time."""


class ChunkLosses(NamedTuple):
    """Losses and ε at the positions of one chunk, each ``(n,)``; losses are not divided by N."""

    hard: Tensor
    soft: Tensor
    epsilon: Tensor


class TeacherStatistics(NamedTuple):
    """Statistics of the teacher's distribution at each position.

    Attributes:
        entropy: of softmax(z), in nats.
        max_logit: largest logit.
        log_sum_exp: log Σ exp(z).
        max_prob: largest probability of softmax(z / T).
    """

    entropy: Tensor
    max_logit: Tensor
    log_sum_exp: Tensor
    max_prob: Tensor


class Scratch:
    """Named buffers that are allocated once and reused for every tile."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised buffer of the shape of ``like``; its old contents are lost."""
        buffer = self._buffers.get(name)
        if (
            buffer is None
            or buffer.dtype != dtype
            or buffer.numel() < like.numel()
            or buffer.device != like.device
        ):
            buffer = torch.empty(like.numel(), dtype=dtype, device=like.device)
            self._buffers[name] = buffer
        return buffer[: like.numel()].view(like.shape)


class _Exponentials(NamedTuple):
    """Logits of r positions, with their exponentials: what a softmax is made of."""

    shifted: Tensor  # (z - max z) / T, (r, V)
    exp: Tensor  # exp of that, (r, V)
    total: Tensor  # its sum, (r, 1), float64
    top: Tensor  # max z, (r, 1)

    @classmethod
    def of(
        cls, logits: Tensor, temperature: float, name: str, scratch: Scratch, dtype: torch.dtype
    ) -> _Exponentials:
        """Return those of ``logits``, in two buffers that ``name`` chooses."""
        top = logits.amax(-1, keepdim=True).to(dtype)
        shifted = scratch.get(name, logits, dtype)
        if logits.dtype == dtype:
            torch.sub(logits, top, out=shifted)
        else:
            shifted.copy_(logits).sub_(top)
        if temperature != 1.0:
            shifted.mul_(1.0 / temperature)
        exp = torch.exp(shifted, out=scratch.get(f"{name}_exp", shifted, dtype))
        return cls(shifted, exp, row_sum(exp), top)


def distribution_statistics(
    logits: Tensor, temperature: float, scratch: Scratch
) -> TeacherStatistics:
    """Return statistics of softmax(z), and max softmax(z / T), at each position.

    With z' = z - max z and G = Σ exp z', the entropy is log G - Σ z' exp(z') / G.

    Args:
        logits: ``(n, V)``; not changed.
        temperature: T.
        scratch: buffers.

    Returns:
        Each ``(n,)``, float32 or float64.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    columns = []
    for tile in _tiles(logits):
        z = _Exponentials.of(logits[tile], 1.0, "teacher", scratch, dtype)
        tempered = z.total
        if temperature != 1.0:
            work = scratch.get("work", z.shifted, dtype)
            tempered = row_sum(torch.mul(z.shifted, 1.0 / temperature, out=work).exp_())
        inner = row_sum(z.exp.mul_(z.shifted))
        top, log_total = wide(z.top), z.total.log()
        values = [log_total - inner / z.total, top, top + log_total, 1.0 / tempered]
        columns.append(torch.cat(values, -1).t())
    statistics = torch.cat(columns, -1) if columns else logits.new_zeros(4, 0)
    return TeacherStatistics(*statistics.to(dtype).unbind())


def chunk_losses(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    settings: LossSettings,
    uncertainty_mean: Tensor | float | None,
    with_gradient: bool,
    scratch: Scratch,
) -> ChunkLosses:
    """Return the losses at each position of a chunk, and write N times dz over the logits.

    Args:
        student_logits: ``(n, V)``; replaced by α (softmax(z) - onehot) + (1 - α) T w g where a
            gradient is wanted, otherwise not changed.
        teacher_logits: ``(n, V)``, not changed; None with α = 1.
        targets: ``(n,)`` ids of the tokens to predict.
        weights: ``(n,)`` of the soft loss.
        settings: temperature, α, smoothing, divergence.
        uncertainty_mean: mean of 1 - max p, for ``matched`` smoothing.
        with_gradient: whether dz is wanted.
        scratch: buffers.

    Returns:
        Hard losses, soft losses times their weights, and ε.

    Raises:
        ValueError: the divergence is unknown.
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    if teacher_logits is not None:
        dtype = torch.promote_types(dtype, teacher_logits.dtype)
    columns = [
        _tile_losses(
            student_logits[tile],
            None if teacher_logits is None else teacher_logits[tile],
            targets[tile].unsqueeze(-1),
            weights[tile].to(dtype).unsqueeze(-1),
            settings,
            uncertainty_mean,
            with_gradient,
            scratch,
            dtype,
        )
        for tile in _tiles(student_logits)
    ]
    if not columns:
        return ChunkLosses(*torch.zeros(3, 0, dtype=dtype, device=targets.device).unbind())
    return ChunkLosses(
        *(torch.cat(column).to(dtype).squeeze(-1) for column in zip(*columns, strict=True))
    )


def _tiles(logits: Tensor) -> list[slice]:
    elements = TILE_ELEMENTS.get(logits.device.type, TILE_ELEMENTS["cuda"])
    rows = max(1, elements // logits.shape[-1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


def _tile_losses(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    settings: LossSettings,
    uncertainty_mean: Tensor | float | None,
    with_gradient: bool,
    scratch: Scratch,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return :func:`chunk_losses` of one tile; what is ``(n,)`` there is ``(r, 1)`` here."""
    temperature = 1.0 if teacher_logits is None else settings.temperature
    student = _Exponentials.of(student_logits, temperature, "student", scratch, dtype)
    x, e, sum_q, _ = student
    work = scratch.get("work", x, dtype)
    if temperature == 1.0:
        sum_h = sum_q
    elif temperature == 2.0:  # exp(2x) = exp(x)²
        sum_h = row_sum(torch.mul(e, e, out=work))
    else:
        sum_h = row_sum(torch.mul(x, temperature, out=work).exp_())
    hard = sum_h.log() - temperature * wide(x.gather(-1, targets))
    soft = epsilon = torch.zeros_like(hard)
    minus_g = times_q = None
    if teacher_logits is not None:
        teacher = _Exponentials.of(teacher_logits, temperature, "teacher", scratch, dtype)
        epsilon = torch.zeros_like(weights)
        if settings.use_calibration_smoothing:
            epsilon = smoothing_epsilon(
                teacher.total.reciprocal().to(dtype),
                torch.ones_like(targets, dtype=torch.bool),
                settings.smoothing_factor,
                settings.smoothing,
                uncertainty_mean,
            )
        share = weights * ((1.0 - settings.alpha) * temperature)  # (1 - α) T w
        if settings.divergence == "forward_kl":
            soft, minus_g, divisor = _forward_kl(student, teacher, epsilon, settings, work)
            minus_g, times_q = minus_g.mul_(share / divisor) if with_gradient else None, share
        else:
            soft, g = _other_divergence(student, teacher, epsilon, settings, work)
            minus_g = g.mul_(-share)
        soft = weights * soft
    if with_gradient:
        alpha = 1.0 if teacher_logits is None else settings.alpha
        dz = _gradient(student, minus_g, times_q, sum_h, targets, alpha, temperature, scratch)
        student_logits.copy_(dz)
    return hard, soft, epsilon


def _forward_kl(
    student: _Exponentials,
    teacher: _Exponentials,
    epsilon: Tensor,
    settings: LossSettings,
    work: Tensor,
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Return KL(p̄‖q) ``(r, 1)``, and a tensor and its divisor whose ratio is p̄.

    The default divergence has a form of its own, which needs no log p̄ without smoothing, and no
    log q: g = q - p̄. The tensor is ``teacher.exp``, which is overwritten.
    """
    x, f = student.shifted, teacher.exp
    if not settings.use_calibration_smoothing:
        inner = row_sum(torch.sub(teacher.shifted, x, out=work).mul_(f))
        value = inner / teacher.total + student.total.log() - teacher.total.log()
        return value, f, teacher.total.to(f.dtype)
    # The smallest normal number replaces 0 where ε = 0, so that 0 log 0 is 0.
    floor = (epsilon / f.shape[-1]).clamp(min=torch.finfo(f.dtype).tiny)
    f.mul_(((1.0 - epsilon) / teacher.total).to(f.dtype)).add_(floor)
    return row_sum(torch.log(f, out=work).sub_(x).mul_(f)) + student.total.log(), f, 1.0


def _other_divergence(
    student: _Exponentials,
    teacher: _Exponentials,
    epsilon: Tensor,
    settings: LossSettings,
    work: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return D(p̄, q) ``(r, 1)`` and g ``(r, V)``; ``shifted`` of both is overwritten."""
    entry = divergences.named(settings.divergence)
    dtype = work.dtype
    log_q = student.shifted.sub_(student.total.log().to(dtype))
    log_p = teacher.shifted.sub_(teacher.total.log().to(dtype))
    if settings.use_calibration_smoothing:
        log_p = smooth_log_probs(log_p, epsilon.squeeze(-1))
    q = torch.mul(student.exp, student.total.reciprocal().to(dtype), out=work)
    return entry.value_and_gradient(log_p, log_q, q, settings.divergence_weight)


def _gradient(
    student: _Exponentials,
    minus_g: Tensor | None,
    times_q: Tensor | None,
    sum_h: Tensor,
    targets: Tensor,
    alpha: float,
    temperature: float,
    scratch: Scratch,
) -> Tensor:
    """Return α (h - onehot) + times_q · q - minus_g, in a buffer; ``student.exp`` is overwritten.

    Args:
        student: logits and exponentials; h = exp(T x) / sum_h and q = exp(x) / total.
        minus_g: ``(r, V)`` to subtract; None: nothing.
        times_q: ``(r, 1)``; None: 0, and ``student.shifted`` may have been overwritten.
        sum_h: ``(r, 1)``.
        targets: ``(r, 1)``.
        alpha: α.
        temperature: T.
        scratch: buffers.
    """
    x, e, sum_q, _ = student
    dtype = e.dtype
    per_q = None if times_q is None else times_q / sum_q.to(dtype)
    per_h = (alpha / sum_h).to(dtype)
    if alpha == 0.0:
        assert minus_g is not None
        return minus_g.neg_() if per_q is None else e.mul_(per_q).sub_(minus_g)
    if temperature == 1.0:
        dz = e.mul_(per_h if per_q is None else per_h + per_q)
    elif temperature == 2.0:
        factor = torch.mul(e, per_h, out=scratch.get("student", e, dtype))
        dz = (factor if per_q is None else factor.add_(per_q)).mul_(e)
    elif per_q is None:
        dz = torch.pow(e, temperature, out=e).mul_(per_h)
    else:
        h = torch.mul(x, temperature, out=scratch.get("work", e, dtype)).exp_()
        dz = h.mul_(per_h).add_(e.mul_(per_q))
    if minus_g is not None:
        dz.sub_(minus_g)
    return dz.scatter_add_(-1, targets, dz.new_full((1, 1), -alpha).expand_as(targets))

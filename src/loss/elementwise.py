"""The element-wise part of the fused loss in plain PyTorch: logits in, losses and gradients out.

``src.loss.fused`` calls it for a chunk of logits at a time, on a CPU, and on a GPU where ``src.loss.kernels``
cannot run. It works on tiles of a few positions, so that on a CPU the dozen passes over a tile
find it in the core's cache. The formulas stand at the head of ``src.loss.fused``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from src.common.settings import LossSettings
from src.loss.reference import at_least_float32, smooth_log_probs, smoothing_epsilon

TILE_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 25}
"""Logits that are worked on at a time."""


class ChunkLosses(NamedTuple):
    """What one chunk's positions contribute, each ``(n,)``: losses are not divided by N."""

    hard: Tensor
    soft: Tensor
    epsilon: Tensor


class Figures(NamedTuple):
    """Entropy, largest logit, log-sum-exp at T = 1, largest probability at T: each ``(n,)``."""

    entropy: Tensor
    max_logit: Tensor
    log_sum_exp: Tensor
    max_prob: Tensor


class Scratch:
    """Named buffers that are allocated once and used for every tile."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised buffer of the shape of ``like``; its last contents are lost."""
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


def distribution_figures(logits: Tensor, temperature: float, scratch: Scratch) -> Figures:
    """Return figures of softmax(z), and max softmax(z / T), at each position.

    With z' = z - max z and G = Σ exp z', the entropy is log G - Σ z' exp(z') / G.

    Args:
        logits: ``(n, V)``; left as they are.
        temperature: T.
        scratch: buffers.

    Returns:
        Float32 or float64.
    """
    dtype = at_least_float32(logits[:0]).dtype
    found = []
    for tile in _tiles(logits):
        shifted, top = _shift(logits[tile], 1.0, "teacher", scratch, dtype)
        each = scratch.get("work", shifted, dtype)
        torch.exp(shifted, out=each)
        total = wide(each.sum(-1))
        sharpest = total
        if temperature != 1.0:
            other = scratch.get("target", shifted, dtype)
            sharpest = wide(torch.mul(shifted, 1.0 / temperature, out=other).exp_().sum(-1))
        inner = wide(each.mul_(shifted).sum(-1))
        log_total = total.log()
        found.append(
            torch.stack(
                [log_total - inner / total, wide(top), wide(top) + log_total, 1.0 / sharpest]
            )
        )
    columns = torch.cat(found, -1) if found else logits.new_zeros(4, 0)
    return Figures(*columns.to(dtype).unbind())


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
        student_logits: ``(n, V)``; with a gradient wanted, they are replaced by
            α (softmax(z) - onehot) + (1 - α) T w g, else left as they are.
        teacher_logits: ``(n, V)``, left as they are; None with α = 1.
        targets: ``(n,)`` ids of the tokens to predict.
        weights: ``(n,)`` of the soft loss.
        settings: temperature, α, smoothing, divergence.
        uncertainty_mean: mean of 1 - max p, for ``matched`` smoothing.
        with_gradient: whether dz is wanted.
        scratch: buffers.

    Returns:
        Hard losses, soft losses times their weights, and ε.
    """
    dtype = at_least_float32(student_logits[:0]).dtype
    if teacher_logits is not None:
        dtype = torch.promote_types(dtype, at_least_float32(teacher_logits[:0]).dtype)
    found = []
    for tile in _tiles(student_logits):
        found.append(
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
        )
    if not found:
        return ChunkLosses(*torch.zeros(3, 0, dtype=dtype, device=targets.device).unbind())
    return ChunkLosses(*(torch.cat(each).squeeze(-1) for each in zip(*found, strict=True)))


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor of one figure for each position in float64, where the device has it.

    Differences between log-sum-exps lose digits, and there are only as many as positions.
    """
    return tensor if tensor.device.type == "mps" else tensor.double()


def _tiles(logits: Tensor) -> list[slice]:
    elements = TILE_ELEMENTS.get(logits.device.type, TILE_ELEMENTS["cuda"])
    rows = max(1, elements // logits.shape[-1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


def _shift(
    logits: Tensor, scale: float, name: str, scratch: Scratch, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return (z - max z) · scale in buffer ``name``, and max z ``(r,)``."""
    top = logits.amax(-1, keepdim=True).to(dtype)
    shifted = scratch.get(name, logits, dtype)
    if logits.dtype == dtype:
        torch.sub(logits, top, out=shifted)
    else:
        shifted.copy_(logits).sub_(top)
    if scale != 1.0:
        shifted.mul_(scale)
    return shifted, top.squeeze(-1)


def _row_sum(tensor: Tensor) -> Tensor:
    return wide(tensor.sum(-1, keepdim=True))


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
    """Do :func:`chunk_losses` for one tile; all that is ``(r,)`` there is ``(r, 1)`` here."""
    temperature = 1.0 if teacher_logits is None else settings.temperature
    alpha = settings.alpha
    # x = (z - max z)/T, q = e/S; h = exp(T x)/H is the softmax at T = 1.
    x, _ = _shift(student_logits, 1.0 / temperature, "student", scratch, dtype)
    e = torch.exp(x, out=scratch.get("student_exp", x, dtype))
    sum_q = _row_sum(e)
    work = scratch.get("work", x, dtype)
    if temperature == 1.0:
        sum_h = sum_q
    elif temperature == 2.0:
        sum_h = _row_sum(torch.mul(e, e, out=work))
    else:
        sum_h = _row_sum(torch.mul(x, temperature, out=work).exp_())
    hard = sum_h.log() - temperature * wide(x.gather(-1, targets))
    if teacher_logits is None:
        soft = epsilon = torch.zeros_like(hard)
        if with_gradient:
            dz = e.mul_(sum_q.reciprocal().to(dtype))
            _subtract_targets(dz, targets, 1.0)
            student_logits.copy_(dz)
        return hard.to(dtype), soft.to(dtype), epsilon.to(dtype)

    y, _ = _shift(teacher_logits, 1.0 / temperature, "teacher", scratch, dtype)
    f = torch.exp(y, out=scratch.get("target", y, dtype))
    sum_p = _row_sum(f)
    epsilon = torch.zeros_like(weights)
    if settings.use_calibration_smoothing:
        epsilon = smoothing_epsilon(
            sum_p.reciprocal().to(dtype),
            torch.ones_like(targets, dtype=torch.bool),
            settings.smoothing_factor,
            settings.smoothing,
            uncertainty_mean,
        )
    share = weights * ((1.0 - alpha) * temperature)  # what multiplies g
    if settings.divergence == "forward_kl":
        soft = _forward_kl(x, y, f, sum_q, sum_p, epsilon, settings, scratch)
        # f now holds p̄ or a multiple of it; what is missing is in ``missing``.
        missing = share if settings.use_calibration_smoothing else share / sum_p.to(dtype)
        minus_g, times_e = f.mul_(missing) if with_gradient else None, share
    else:
        soft, minus_g = _other_divergence(x, y, e, sum_q, sum_p, epsilon, settings, scratch)
        minus_g, times_e = minus_g.mul_(-share) if with_gradient else None, None
    if minus_g is not None:
        _write_gradient(
            student_logits, x, e, minus_g, times_e, sum_q, sum_h, targets, settings, scratch
        )
    return hard.to(dtype), (weights * soft).to(dtype), epsilon


def _forward_kl(
    x: Tensor,
    y: Tensor,
    f: Tensor,
    sum_q: Tensor,
    sum_p: Tensor,
    epsilon: Tensor,
    settings: LossSettings,
    scratch: Scratch,
) -> Tensor:
    """Return KL(p̄‖q) at each position; ``f``, exp y, becomes p̄ where there is smoothing."""
    work = scratch.get("work", x, x.dtype)
    if not settings.use_calibration_smoothing:
        inner = _row_sum(torch.sub(y, x, out=work).mul_(f))
        return inner / sum_p + sum_q.log() - sum_p.log()
    # The smallest normal number stands for 0 where ε = 0, so that 0 log 0 is 0.
    floor = (epsilon / f.shape[-1]).clamp(min=torch.finfo(f.dtype).tiny)
    f.mul_(((1.0 - epsilon) / sum_p).to(f.dtype)).add_(floor)
    return _row_sum(torch.log(f, out=work).sub_(x).mul_(f)) + sum_q.log()


def _other_divergence(
    x: Tensor,
    y: Tensor,
    e: Tensor,
    sum_q: Tensor,
    sum_p: Tensor,
    epsilon: Tensor,
    settings: LossSettings,
    scratch: Scratch,
) -> tuple[Tensor, Tensor]:
    """Return the divergence ``(r, 1)`` and g ``(r, V)``; ``x`` and ``y`` become log q and log p̄."""
    log_q = x.sub_(sum_q.log().to(x.dtype))
    log_p = y.sub_(sum_p.log().to(y.dtype))
    if settings.use_calibration_smoothing:
        log_p = smooth_log_probs(log_p, epsilon.squeeze(-1))
    q = torch.mul(e, sum_q.reciprocal().to(e.dtype), out=scratch.get("work", e, e.dtype))
    if settings.divergence == "reverse_kl":
        ratio = torch.where(q > 0, log_q - log_p, 0.0)
        value = _row_sum(q * ratio)
        return value, ratio.sub_(value.to(q.dtype)).mul_(q)
    share = settings.divergence_weight
    log_m = torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
    p = log_p.exp()
    forward = _row_sum(torch.where(p > 0, p * (log_p - log_m), 0.0))
    if settings.divergence == "skew_kl":
        ratio = log_p.sub_(log_m).exp_()  # p̄/m, at most 1/λ
        inner = (q * ratio).sum(-1, keepdim=True)
        return forward, ratio.neg_().add_(inner).mul_(q).mul_(1.0 - share)
    ratio = torch.where(q > 0, log_q - log_m, 0.0)
    backward = _row_sum(q * ratio)
    g = ratio.sub_(backward.to(q.dtype)).mul_(q).mul_(1.0 - share)
    return share * forward + (1.0 - share) * backward, g


def _write_gradient(
    out: Tensor,
    x: Tensor,
    e: Tensor,
    minus_g: Tensor,
    times_e: Tensor | None,
    sum_q: Tensor,
    sum_h: Tensor,
    targets: Tensor,
    settings: LossSettings,
    scratch: Scratch,
) -> None:
    """Write α (h - onehot) + (1 - α) T w g to ``out``.

    ``minus_g`` is what (1 - α) T w g subtracts, and ``times_e`` (or None) the multiple of q that
    it adds. ``e`` is used up.
    """
    dtype, alpha, temperature = e.dtype, settings.alpha, settings.temperature
    per_q = None if times_e is None else times_e / sum_q.to(dtype)
    per_h = (alpha / sum_h).to(dtype)
    if alpha == 0.0:
        dz = minus_g.neg_() if per_q is None else e.mul_(per_q).sub_(minus_g)
        out.copy_(dz)
        return
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
    dz.sub_(minus_g)
    _subtract_targets(dz, targets, alpha)
    out.copy_(dz)


def _subtract_targets(dz: Tensor, targets: Tensor, alpha: float) -> None:
    """Subtract α at each position's target."""
    dz.scatter_add_(-1, targets, dz.new_full((1, 1), -alpha).expand_as(targets))

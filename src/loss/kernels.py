"""The element-wise part of the fused loss as Triton kernels: ``src.loss.elementwise`` on a GPU.

Importing this module imports Triton, so ``src.loss.fused`` imports it only where it is used. Both
public functions take the arguments and return the results of those in ``src.loss.elementwise``.

One program works on one position and reads its vocabulary in blocks, up to three times. The first
pass computes the sums of all softmaxes, of student and teacher, at T and at 1, and rescales them
whenever a larger logit appears (online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867). It
also sums KL(p‖q), as Σ exp(y) (y - x) with both shifted by their running maxima, unless the target
is smoothed. The second pass computes the sums in the gradients of reverse KL, JSD and skew KL. The
last pass writes the gradient over the student's logits, and sums the KL of smoothed targets. Logits
may be bfloat16, float16 or float32; sums are float32, and the last differences between
log-sum-exps, a few for each position, are float64.
"""

from __future__ import annotations

# Triton is optional, and its dialect of Python confuses the type checker.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportOperatorIssue=false
import contextlib
import math
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from src.common.settings import LossSettings
from src.loss import divergences, elementwise
from src.loss.elementwise import ChunkLosses, Scratch, TeacherStatistics
from src.loss.reference import SMOOTHING_SHARES

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton interprets the kernels, on any device (``TRITON_INTERPRET=1``); for tests."""
BLOCK = 4096
"""Most logits that a program holds at a time: 16 for each thread of 8 warps."""
LOGITS_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Replaces -∞: its exponential is 0 too, and 0 times it is 0.
LOW = tl.constexpr(-1e30)
TINY = tl.constexpr(1.1754943508222875e-38)  # smallest normal float32
# Numbers of the divergences; the kernel relies on HARD < FORWARD < the others.
HARD = tl.constexpr(0)
FORWARD = tl.constexpr(divergences.TABLE["forward_kl"].kernel)
REVERSE = tl.constexpr(divergences.TABLE["reverse_kl"].kernel)
JSD = tl.constexpr(divergences.TABLE["jsd"].kernel)
SKEW = tl.constexpr(divergences.TABLE["skew_kl"].kernel)


@triton.jit
def _load(row, at, vocabulary, width):
    """Load logits in float32, ``LOW`` outside the vocabulary.

    Several are loaded at once where the mask ends at a multiple of 16 (``width``).
    """
    z = tl.load(row + at, mask=at < width, other=0.0).to(tl.float32)
    return tl.where(at < vocabulary, z, LOW)


@triton.jit
def _log_add_exp(a, b):
    return tl.maximum(a, b) + tl.log(1.0 + tl.exp(-tl.abs(a - b)))


@triton.jit
def _log_target(y, log_rest, log_uniform, SMOOTH: tl.constexpr):
    """Return log p̄ from log p: log((1 - ε) p + ε / V)."""
    if SMOOTH:
        return _log_add_exp(y + log_rest, log_uniform)
    else:
        return y


@triton.jit
def _statistics(
    logits_ptr,
    stride,
    width,
    statistics_ptr,
    rows,
    vocabulary,
    per_temperature,
    BLOCK: tl.constexpr,
):
    """Write entropy, largest logit, log-sum-exp and max softmax(z / T): ``(4, rows)``."""
    number = tl.program_id(0)
    row = logits_ptr + number.to(tl.int64) * stride
    columns = tl.arange(0, BLOCK)
    top = LOW
    total = tl.zeros((BLOCK,), tl.float32)
    inner = tl.zeros((BLOCK,), tl.float32)
    tempered = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        at = start + columns
        z = _load(row, at, vocabulary, width)
        old, top = top, tl.maximum(top, tl.max(z, 0))
        drop = old - top
        shifted = z - top
        e = tl.exp(shifted)
        shrink = tl.exp(drop)
        inner = (inner + total * drop) * shrink + e * shifted
        total = total * shrink + e
        tempered = tempered * tl.exp(drop * per_temperature) + tl.exp(shifted * per_temperature)
    sum_e = tl.sum(total, 0).to(tl.float64)
    log_sum = tl.log(sum_e)
    tl.store(statistics_ptr + number, (log_sum - tl.sum(inner, 0) / sum_e).to(tl.float32))
    tl.store(statistics_ptr + rows + number, top)
    tl.store(statistics_ptr + 2 * rows + number, (top + log_sum).to(tl.float32))
    tl.store(statistics_ptr + 3 * rows + number, 1.0 / tl.sum(tempered, 0))


@triton.jit
def _losses(
    student_ptr,
    student_stride,
    student_width,
    teacher_ptr,
    teacher_stride,
    teacher_width,
    targets_ptr,
    weights_ptr,
    base_ptr,  # ε = base + slope · max p
    losses_ptr,  # (3, rows): hard, weighted soft, ε
    rows,
    vocabulary,
    slope,
    alpha,
    temperature,
    per_temperature,
    share,  # β of jsd, λ of skew_kl
    log_share,
    log_other,  # log(1 - share)
    KIND: tl.constexpr,
    SMOOTH: tl.constexpr,
    GRADIENT: tl.constexpr,
    POWER: tl.constexpr,  # 1 or 2 where the temperature is that, else 0
    BLOCK: tl.constexpr,
):
    """Write one position's losses and, over the student's logits, N times its gradient."""
    number = tl.program_id(0)
    student = student_ptr + number.to(tl.int64) * student_stride
    teacher = teacher_ptr + number.to(tl.int64) * teacher_stride
    columns = tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + number)
    aim = tl.load(student + target).to(tl.float32)

    # First pass: maxima and sums. With x and y the logits less their maxima, over T, these are
    # Σ exp x, Σ exp(T x), Σ exp y and Σ exp(y) (y - x).
    top_x = LOW
    top_y = LOW
    sum_q = tl.zeros((BLOCK,), tl.float32)
    sum_h = tl.zeros((BLOCK,), tl.float32)
    sum_p = tl.zeros((BLOCK,), tl.float32)
    inner = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        at = start + columns
        inside = at < vocabulary
        z = _load(student, at, vocabulary, student_width)
        old_x, top_x = top_x, tl.maximum(top_x, tl.max(z, 0))
        drop_x = (old_x - top_x) * per_temperature
        x = (z - top_x) * per_temperature
        e = tl.exp(x)
        shrink = tl.exp(drop_x)
        sum_q = sum_q * shrink + e
        if POWER == 2:
            sum_h = sum_h * (shrink * shrink) + e * e
        if POWER == 0:
            sum_h = sum_h * tl.exp(old_x - top_x) + tl.exp(z - top_x)
        if KIND != HARD:
            z = _load(teacher, at, vocabulary, teacher_width)
            old_y, top_y = top_y, tl.maximum(top_y, tl.max(z, 0))
            drop_y = (old_y - top_y) * per_temperature
            y = (z - top_y) * per_temperature
            f = tl.exp(y)
            shrink = tl.exp(drop_y)
            if KIND == FORWARD and not SMOOTH:
                inner = (inner + sum_p * (drop_y - drop_x)) * shrink + f * (y - x)
            sum_p = sum_p * shrink + f
    all_q = tl.sum(sum_q, 0)
    all_h = all_q
    if POWER != 1:
        all_h = tl.sum(sum_h, 0)
    log_q = tl.log(all_q.to(tl.float64))
    log_h = tl.log(all_h.to(tl.float64))
    tl.store(losses_ptr + number, (log_h - (aim - top_x)).to(tl.float32))

    soft = tl.zeros((), tl.float64)
    epsilon = 0.0
    weight = 0.0
    if KIND != HARD:
        weight = tl.load(weights_ptr + number)
        all_p = tl.sum(sum_p, 0)
        log_p = tl.log(all_p.to(tl.float64))
        if SMOOTH:
            epsilon = tl.load(base_ptr) + slope / all_p
        if KIND == FORWARD and not SMOOTH:
            soft = tl.sum(inner, 0) / all_p.to(tl.float64) + log_q - log_p
        uniform = tl.maximum(epsilon / vocabulary, TINY)
        keep = (1.0 - epsilon) / all_p
        log_rest = tl.log(1.0 - epsilon)
        log_uniform = tl.log(uniform)
        per_x = log_q.to(tl.float32)
        per_y = log_p.to(tl.float32)

    # Second pass, where the gradient holds a sum of its own.
    middle = 0.0
    if KIND > FORWARD:
        ahead = tl.zeros((BLOCK,), tl.float32)
        back = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocabulary, BLOCK):
            at = start + columns
            inside = at < vocabulary
            x = (_load(student, at, vocabulary, student_width) - top_x) * per_temperature - per_x
            y = (_load(teacher, at, vocabulary, teacher_width) - top_y) * per_temperature - per_y
            y = _log_target(y, log_rest, log_uniform, SMOOTH)
            q = tl.exp(x)
            if KIND == REVERSE:
                back += q * (x - y)
            else:
                mixture = _log_add_exp(y + log_share, x + log_other)
                ahead += tl.where(inside, tl.exp(y) * (y - mixture), 0.0)
                if KIND == JSD:
                    back += q * (x - mixture)
                else:
                    back += q * tl.exp(y - mixture)
        middle = tl.sum(back, 0)
        if KIND == REVERSE:
            soft += middle
        elif KIND == JSD:
            soft += share * tl.sum(ahead, 0) + (1.0 - share) * middle
        else:
            soft += tl.sum(ahead, 0)

    # Last pass: the gradient, and the forward KL of a smoothed target.
    if GRADIENT or (KIND == FORWARD and SMOOTH):
        value = tl.zeros((BLOCK,), tl.float32)
        scale = weight * (1.0 - alpha) * temperature
        for start in range(0, vocabulary, BLOCK):
            at = start + columns
            inside = at < vocabulary
            logits = tl.load(student + at, mask=at < student_width, other=0.0)
            z = tl.where(inside, logits.to(tl.float32), LOW) - top_x
            x = z * per_temperature
            e = tl.exp(x)
            if POWER == 1:
                dz = e * (alpha / all_h)
            elif POWER == 2:
                dz = e * e * (alpha / all_h)
            else:
                dz = tl.exp(z) * (alpha / all_h)
            if KIND != HARD:
                y = (_load(teacher, at, vocabulary, teacher_width) - top_y) * per_temperature
            if KIND == FORWARD:
                p = tl.exp(y) * keep
                if SMOOTH:
                    p += uniform
                    value += tl.where(inside, p * (tl.log(p) - x), 0.0)
                dz += scale * (e / all_q - p)
            elif KIND != HARD:
                q = e / all_q
                x -= per_x
                y = _log_target(y - per_y, log_rest, log_uniform, SMOOTH)
                if KIND == REVERSE:
                    dz += scale * q * (x - y - middle)
                else:
                    mixture = _log_add_exp(y + log_share, x + log_other)
                    g = x - mixture - middle if KIND == JSD else middle - tl.exp(y - mixture)
                    dz += scale * (1.0 - share) * q * g
            if GRADIENT:
                dz -= tl.where(at == target, alpha, 0.0)
                # The columns between vocabulary and width keep their content.
                dz = tl.where(inside, dz.to(student_ptr.dtype.element_ty), logits)
                tl.store(student + at, dz, mask=at < student_width)
        if KIND == FORWARD and SMOOTH:
            soft = tl.sum(value, 0) + log_q
    tl.store(losses_ptr + rows + number, (weight * soft).to(tl.float32))
    tl.store(losses_ptr + 2 * rows + number, epsilon)


def distribution_statistics(
    logits: Tensor, temperature: float, scratch: Scratch
) -> TeacherStatistics:
    """Return :func:`src.loss.elementwise.distribution_statistics`."""
    del scratch
    rows, vocabulary = logits.shape
    statistics = torch.empty(4, rows, dtype=torch.float32, device=logits.device)
    if rows:
        with _on(logits.device):
            _statistics[(rows,)](
                *_row_arguments(logits),
                statistics,
                rows,
                vocabulary,
                1.0 / temperature,
                **_shape(vocabulary),
            )
    return TeacherStatistics(*statistics.unbind())


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
    """Return :func:`src.loss.elementwise.chunk_losses`, and write the gradient as it does.

    Raises:
        ValueError: the divergence is unknown, or has no kernel.
    """
    del scratch
    hard_only = teacher_logits is None
    kind = HARD.value if hard_only else _kernel_number(settings.divergence)
    teacher = student_logits if teacher_logits is None else teacher_logits
    rows, vocabulary = student_logits.shape
    device = student_logits.device
    losses = torch.empty(3, rows, dtype=torch.float32, device=device)
    if rows:
        temperature = 1.0 if hard_only else settings.temperature
        smooth = settings.use_calibration_smoothing and not hard_only
        base, slope = _smoothing(settings, uncertainty_mean) if smooth else (0.0, 0.0)
        other = settings.divergence_weight
        constants: dict[str, Any] = {
            "KIND": kind,
            "SMOOTH": smooth,
            "GRADIENT": with_gradient,
            "POWER": int(temperature) if temperature in (1.0, 2.0) else 0,
            **_shape(vocabulary),
        }
        with _on(device):
            _losses[(rows,)](
                *_row_arguments(student_logits),
                *_row_arguments(teacher),
                targets,
                weights.float(),
                torch.as_tensor(base, dtype=torch.float32).to(device),
                losses,
                rows,
                vocabulary,
                slope,
                1.0 if hard_only else settings.alpha,
                temperature,
                1.0 / temperature,
                other,
                math.log(other),
                math.log1p(-other),
                **constants,
            )
    return ChunkLosses(*losses.unbind())


def check_against_torch(device: torch.device) -> None:
    """Compile the kernels, and compare them with ``src.loss.elementwise`` on a few logits.

    Raises:
        RuntimeError: they differ. Errors of compilers and drivers pass through.
    """
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 336, generator=random).bfloat16().to(device)[..., :323]
    targets = torch.arange(4, device=device)
    settings = LossSettings(use_calibration_smoothing=True)
    results = []
    for module in (elementwise, sys.modules[__name__]):
        student, teacher = logits.clone(memory_format=torch.preserve_format)
        options = (targets, torch.ones(4, device=device), settings, None, True, Scratch())
        losses = module.chunk_losses(student, teacher, *options)
        statistics = module.distribution_statistics(teacher, 2.0, Scratch())
        results.append(torch.cat([*losses, *statistics, student.float().flatten()]))
    if not torch.allclose(*results, rtol=1e-2, atol=1e-4):
        raise RuntimeError("their results differ from plain PyTorch's")


def _kernel_number(divergence: str) -> int:
    number = divergences.named(divergence).kernel
    if number is None:
        raise ValueError(f"the divergence {divergence} has no Triton kernel")
    assert number in (FORWARD.value, REVERSE.value, JSD.value, SKEW.value)
    return number


def _smoothing(settings: LossSettings, mean: Tensor | float | None) -> tuple[Tensor | float, float]:
    """Return base and slope of ε as a linear function of max p."""
    share = SMOOTHING_SHARES[settings.smoothing]
    assert mean is not None or not settings.needs_uncertainty_mean
    base = settings.smoothing_factor * share(0.0, mean)
    # The mean changes no slope; reading it here would wait for the GPU.
    slope = settings.smoothing_factor * (share(1.0, 0.0) - share(0.0, 0.0))
    return base, float(slope)


def _row_arguments(logits: Tensor) -> tuple[Tensor, int, int]:
    """Return logits, the stride of their rows, and the column up to which a row may be read.

    That is a multiple of 16 where there is room; on a GPU ``src.loss.fused`` leaves it.
    """
    assert logits.dtype in LOGITS_DTYPES
    assert logits.stride(-1) == 1
    rows, vocabulary = logits.shape
    stride = logits.stride(0)
    width = -(-vocabulary // 16) * 16
    stop = logits.storage_offset() + (rows - 1) * stride + width
    room = logits.untyped_storage().nbytes() // logits.element_size()
    return logits, stride, width if width <= stride and stop <= room else vocabulary


def _shape(vocabulary: int) -> dict[str, Any]:
    """Return the block of logits that a program holds, and the warps that share it."""
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    return {"BLOCK": block, "num_warps": max(1, block // 512)}


def _on(device: torch.device) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

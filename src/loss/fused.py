"""The distillation loss from hidden states: the head and the loss in one, chunk by chunk.

``src.loss.reference.distillation_loss`` needs the logits of the whole batch, several tensors of
batch × length × vocabulary. Here the valid positions are gathered first, so that padding costs
nothing; then, for some hundreds of positions at a time, the logits are computed, the gradient of
the loss is written over them in closed form, and its products with head and hidden states are
added up. Autograd sees neither logits nor probabilities.

With z the student's logits, h = softmax(z), q = softmax(z / T), p̄ the smoothed target and w the
weight of a position, the gradient of one position's loss, times N, is

    dz = α (h - onehot) + (1 - α) T w g

where g is T times the gradient of the divergence D(p̄, q) with respect to z. As dq/dz =
(diag(q) - q qᵀ) / T, it is q_v (∂D/∂q_v - Σ_u q_u ∂D/∂q_u):

    forward_kl  ∂D/∂q = -p̄/q               g = q - p̄
    reverse_kl  ∂D/∂q = log(q/p̄) + 1       g = q (log(q/p̄) - D)
    skew_kl     ∂D/∂q = -(1-λ) p̄/m         g = (1-λ) q (Σ q p̄/m - p̄/m),  m = λp̄ + (1-λ)q
    jsd         ∂D/∂q = (1-β) log(q/m)     g = (1-β) q (log(q/m) - Σ q log(q/m)),  m = βp̄ + (1-β)q

(for jsd the terms from m cancel: (βp̄ + (1-β)q)/m = 1). At T = 2, exp(z) = exp(z/2)², so that one
exponential serves both softmaxes. Logits have the dtype of the inputs (bfloat16 products are
summed in float32 and rounded once, as in any linear layer); everything after them is float32, and
so is the sum of the head's gradient over chunks. Float64 stays float64.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from src.common.settings import LossSettings
from src.loss import elementwise
from src.loss.elementwise import Scratch, wide
from src.loss.reference import LossParts, check_vocabularies, position_weights, valid_positions

CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}
"""Logits of a chunk: enough positions for fast matrix products, little beside the batch's."""
LONG_SEQUENCE = 4
"""A chunk grows to at most so many times its usual size to hold one sequence whole."""
KERNELS_VARIABLE = "DISTILL_KERNELS"
"""Environment variable that forces what does the element-wise part: ``torch`` or ``triton``."""
HEAD_TILE_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Elements of the head's gradient that are multiplied out in half precision before being added."""


class Student(NamedTuple):
    """One of the students that share a teacher pass.

    ``hidden`` ``(B, T, E)`` after the last norm, ``weight`` ``(V, E)`` and ``bias`` ``(V,)`` or
    None of its head; ``uncertainty_mean`` as in :func:`fused_distillation_loss`.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    settings: LossSettings
    uncertainty_mean: Tensor | float | None = None


@dataclass
class TeacherStatistics:
    """Figures of the teacher's distribution at each position, 0 where not valid.

    Attributes:
        entropy: of softmax(z), in nats.
        max_logit: largest logit.
        log_sum_exp: log Σ exp(z).
        max_prob: largest probability at the temperature that was asked for.
    """

    entropy: Tensor
    max_logit: Tensor
    log_sum_exp: Tensor
    max_prob: Tensor


def fused_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    settings: LossSettings | None = None,
    *,
    segments: Tensor | None = None,
    num_positions: Tensor | float | None = None,
    weight_mean: Tensor | float | None = None,
    uncertainty_mean: Tensor | float | None = None,
    teacher_entropy: Tensor | None = None,
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
) -> LossParts:
    """Return what ``src.loss.reference.distillation_loss`` returns, without the logits of the batch.

    Args:
        student_hidden: ``(B, T, E)`` hidden states after the last norm.
        student_weight: ``(V, E)`` output head; may be tied to the input embedding.
        student_bias: ``(V,)`` or None.
        teacher_hidden: ``(B, T, F)``; never gets a gradient. None with α = 1, where the teacher is
            not looked at: soft loss, ε and entropy are then reported as 0 and weights as 1.
        teacher_weight: ``(V, F)``.
        teacher_bias: ``(V,)`` or None.
        labels: ``(B, T)`` token ids, -100 where not to be predicted; not shifted.
        attention_mask: ``(B, T)``, 0 at padding.
        settings: temperature, α, weighting, smoothing, divergence.
        segments: ``(B, T)`` protein number within packed rows.
        num_positions: N, valid positions of the whole optimiser step; None: of this batch.
        weight_mean: mean published weight of the whole optimiser step; None: of this batch.
        uncertainty_mean: mean of 1 - max p of the whole optimiser step; None: of this batch.
        teacher_entropy: ``(B, T)`` or ``(B, T-1)`` entropies at T = 1 in nats, from a cache.
        chunk_tokens: positions for which logits are held at a time; None: chosen by vocabulary and
            device. Weights need the entropies of a whole sequence: where one is longer than a
            chunk, the teacher's head runs twice.
        vocab_size: columns beyond it are padding of the vocabulary and left out.

    Returns:
        The loss, with gradients for the student's hidden states, head and bias, and its parts.
        Only first derivatives.

    Raises:
        ValueError: shapes or vocabularies do not fit, a label is outside the vocabulary, or α < 1
            without a teacher.
    """
    student = Student(
        student_hidden,
        student_weight,
        student_bias,
        settings or LossSettings(),
        uncertainty_mean,
    )
    (parts,) = fused_distillation_losses(
        [student],
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        labels,
        attention_mask,
        segments=segments,
        num_positions=num_positions,
        weight_mean=weight_mean,
        teacher_entropy=teacher_entropy,
        chunk_tokens=chunk_tokens,
        vocab_size=vocab_size,
    )
    return parts


def fused_distillation_losses(
    students: Sequence[Student],
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    *,
    segments: Tensor | None = None,
    num_positions: Tensor | float | None = None,
    weight_mean: Tensor | float | None = None,
    teacher_entropy: Tensor | None = None,
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
) -> list[LossParts]:
    """Return the losses of several students of one batch; the teacher's logits are shared.

    Args:
        students: on a CPU the result of each is, to the bit, that of a list of one.
        teacher_hidden: as all that follows in :func:`fused_distillation_loss`.
        teacher_weight: see there.
        teacher_bias: see there.
        labels: see there.
        attention_mask: see there.
        segments: see there.
        num_positions: see there.
        weight_mean: see there.
        teacher_entropy: see there.
        chunk_tokens: see there.
        vocab_size: see there.

    Returns:
        One :class:`LossParts` for each student. Their losses can be differentiated in any order.

    Raises:
        ValueError: as in :func:`fused_distillation_loss`.
    """
    teacher = None
    if any(student.settings.alpha < 1.0 for student in students):
        if teacher_hidden is None or teacher_weight is None:
            raise ValueError("teacher hidden states and head are needed unless alpha is 1")
        teacher = _Head.of(teacher_hidden, teacher_weight, teacher_bias, vocab_size)
    heads = [_Head.of(s.hidden, s.weight, s.bias, vocab_size) for s in students]
    _check_inputs(heads if teacher is None else [*heads, teacher], labels)
    valid = valid_positions(labels, attention_mask, segments)
    plan = _Plan.make(valid, labels, segments, heads[0].vocabulary, chunk_tokens)
    here = valid.sum()
    count = max(float(here if num_positions is None else num_positions), 1.0)
    # Gathered with autograd on, so that its backward puts zeros where nothing was valid.
    gathered = [s.hidden.flatten(0, 1).index_select(0, plan.index) for s in students]
    wants = [_wanted_gradients(student) for student in students]
    with torch.no_grad(), torch.autocast(labels.device.type, enabled=False):
        teacher_pass = None
        if teacher is not None:
            entropy = _at_positions(teacher_entropy, plan, valid)
            teacher_pass = _TeacherPass(teacher, plan, entropy, weight_mean, students)
        jobs = [
            _Job(student, head, rows, wanted, count)
            for student, head, rows, wanted in zip(students, heads, gathered, wants, strict=True)
        ]
        _run(jobs, plan, teacher_pass)
    return [job.parts(rows, here) for job, rows in zip(jobs, gathered, strict=True)]


@torch.no_grad()
def teacher_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    valid: Tensor | None = None,
    temperature: float = 1.0,
    *,
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
) -> TeacherStatistics:
    """Return entropy, largest logit, log-sum-exp and largest probability at each position.

    Args:
        hidden: ``(..., E)`` hidden states after the last norm.
        weight: ``(V, E)`` output head.
        bias: ``(V,)`` or None.
        valid: ``(...)`` bool, where to compute; None: everywhere.
        temperature: of ``max_prob`` alone.
        chunk_tokens: positions for which logits are held at a time.
        vocab_size: columns beyond it are left out.

    Returns:
        Each figure ``(...)``, float32 or float64, 0 where not valid.
    """
    shape = hidden.shape[:-1]
    rows = hidden.flatten(0, -2)
    where = None if valid is None else valid.flatten().nonzero().squeeze(-1)
    if where is not None:
        rows = rows.index_select(0, where)
    found = []
    scratch = Scratch()
    for _, logits in logits_chunks(rows, weight, bias, chunk_tokens, vocab_size):
        figures = elementwise_for(logits).distribution_figures(logits, temperature, scratch)
        found.append(torch.stack(figures))
    columns = torch.cat(found, -1) if found else torch.zeros(4, 0, device=hidden.device)
    if where is not None:
        columns = columns.new_zeros(4, math.prod(shape)).index_copy_(1, where, columns)
    return TeacherStatistics(*columns.unflatten(1, shape).unbind())


def logits_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits of hidden states, some positions at a time.

    Args:
        hidden: ``(N, E)`` hidden states after the last norm.
        weight: ``(V, E)`` output head.
        bias: ``(V,)`` or None.
        chunk_tokens: positions at a time; None: chosen by vocabulary and device.
        vocab_size: columns beyond it are left out.

    Yields:
        The positions as a slice, and their logits ``(n, V)`` in the dtype of the product. They are
        overwritten by the next chunk, and have no gradient.
    """
    head = _Head.of(hidden, weight, bias, vocab_size)
    capacity = chunk_tokens or usual_chunk(head.vocabulary, hidden.device)
    buffer = None
    for start, stop in _even_chunks(len(hidden), capacity):
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            if buffer is None:
                buffer = head.buffer(min(capacity, len(hidden)))
            logits = head.project(head.hidden[start:stop], buffer)
        yield slice(start, stop), logits


def usual_chunk(vocabulary: int, device: torch.device) -> int:
    """Return for how many positions logits are held at a time."""
    elements = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"])
    return max(16, elements // vocabulary)


# What does the element-wise part ---------------------------------------------------------------


def elementwise_for(*logits: Tensor | None) -> Any:
    """Return the module whose functions take such logits: ``src.loss.kernels`` or ``src.loss.elementwise``.

    On a CUDA device it is the Triton kernels, where Triton is installed and its kernels agree with
    plain PyTorch there, unless the environment variable ``DISTILL_KERNELS`` says ``torch``.
    Float64 is always plain PyTorch's.

    Raises:
        ValueError: ``DISTILL_KERNELS`` is neither ``auto``, ``torch`` nor ``triton``, or says
            ``triton`` where that cannot run.
    """
    given = [z for z in logits if z is not None]
    device = given[0].device
    wanted = os.environ.get(KERNELS_VARIABLE) or "auto"
    if wanted not in ("auto", "torch", "triton"):
        raise ValueError(f"{KERNELS_VARIABLE} must be auto, torch or triton, got {wanted!r}")
    if wanted == "torch" or any(z.dtype == torch.float64 for z in given):
        return elementwise
    if wanted == "auto":
        return _kernels_that_agree(device) or elementwise if device.type == "cuda" else elementwise
    try:
        from src.loss import kernels
    except ImportError as error:
        raise ValueError(
            f"{KERNELS_VARIABLE}=triton: Triton cannot be imported ({error}); install it, or leave "
            f"{KERNELS_VARIABLE} unset for plain PyTorch"
        ) from None
    if device.type != "cuda" and not kernels.INTERPRETED:
        raise ValueError(
            f"{KERNELS_VARIABLE}=triton needs a CUDA device, and the loss runs on {device.type}: "
            f"leave {KERNELS_VARIABLE} unset for plain PyTorch"
        )
    return kernels


@functools.cache
def _kernels_that_agree(device: torch.device) -> Any:
    """Return the Triton kernels, or None, with one warning where they are there but do not work.

    A machine can have Triton and lack what it compiles with; the loss then runs all the same.
    """
    try:
        from src.loss import kernels
    except ImportError:
        return None
    try:
        kernels.check_against_torch(device)
    except Exception as error:  # a compiler, a driver or a launch fails in whatever way it likes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        warnings.warn(
            f"the Triton kernels do not work here, so the loss runs in plain PyTorch: {reason}",
            stacklevel=3,
        )
        return None
    return kernels


# Heads and the batch's plan ------------------------------------------------------------------


@dataclass
class _Head:
    """Hidden states and the output head they go through, in the dtype they are multiplied in."""

    hidden: Tensor  # (B·T, E)
    shape: torch.Size  # (B, T, E)
    weight: Tensor  # (V, E), without padded rows
    bias: Tensor | None  # (V,)

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab_size: int | None
    ) -> _Head:
        if hidden.shape[-1] != weight.shape[-1]:
            raise ValueError(
                f"hidden states have {hidden.shape[-1]} features, their head {weight.shape[-1]}"
            )
        dtype = _product_dtype(hidden, weight)
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        weight = weight.detach()[:vocab_size].to(dtype)
        bias = None if bias is None else bias.detach()[:vocab_size].to(dtype)
        return cls(flat, hidden.shape, weight, bias)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def vocabulary(self) -> int:
        return len(self.weight)

    def buffer(self, positions: int) -> Tensor:
        """Return room for the logits ``(n, V)`` of so many positions.

        On a GPU rows begin at multiples of 64 elements: matrix products with rows of an odd
        length, such as 50,257, are slow.
        """
        width = self.vocabulary
        if self.weight.device.type == "cuda":
            width = math.ceil(width / 64) * 64
        buffer = torch.empty(positions, width, dtype=self.dtype, device=self.weight.device)
        return buffer[:, : self.vocabulary]

    def project(self, rows: Tensor, buffer: Tensor) -> Tensor:
        """Return the logits ``(n, V)`` of ``rows`` ``(n, E)``, held in ``buffer``."""
        out = buffer[: len(rows)]
        if self.bias is None:
            return torch.mm(rows.to(self.dtype), self.weight.t(), out=out)
        return torch.addmm(self.bias, rows.to(self.dtype), self.weight.t(), out=out)


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer would multiply these, autocast respected."""
    if torch.float64 in (hidden.dtype, weight.dtype):
        return torch.float64
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    for dtype in (hidden.dtype, weight.dtype):
        if dtype in (torch.bfloat16, torch.float16):
            return dtype
    return torch.float32


def _math_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_inputs(heads: Sequence[_Head], labels: Tensor) -> None:
    for head in heads:
        check_vocabularies(heads[0].vocabulary, head.vocabulary)
        if head.shape[:-1] != labels.shape:
            raise ValueError(
                f"hidden states of shape {tuple(head.shape)} do not fit labels of shape "
                f"{tuple(labels.shape)}"
            )


@dataclass
class _Plan:
    """The valid positions of a batch, sequence by sequence, and the chunks they are taken in."""

    index: Tensor  # (N,) position in the flattened (B, T)
    targets: Tensor  # (N,) token to predict
    sequence: Tensor  # (N,) number of the sequence, ascending
    chunks: list[tuple[int, int]]
    whole: bool  # whether each sequence lies in one chunk

    @classmethod
    def make(
        cls,
        valid: Tensor,
        labels: Tensor,
        segments: Tensor | None,
        vocabulary: int,
        chunk_tokens: int | None,
    ) -> _Plan:
        """Plan a batch. A plan depends on the batch alone, never on a student's settings."""
        row, column = valid.nonzero(as_tuple=True)
        sequence = row
        if segments is not None:
            within = segments[row, column].clamp(min=0).long()
            widest = int(within.max()) + 1 if len(within) else 1
            sequence, order = (row * widest + within).sort(stable=True)
            row, column = row[order], column[order]
        _, sequence, counts = sequence.unique_consecutive(return_inverse=True, return_counts=True)
        targets = labels[row, column + 1]
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
            raise ValueError(
                f"a label is outside the vocabulary of {vocabulary:,} tokens (-100 marks what is "
                "not to be predicted)"
            )
        lengths: list[int] = counts.tolist()
        longest = max(lengths, default=0)
        capacity = limit = chunk_tokens or usual_chunk(vocabulary, labels.device)
        if chunk_tokens is None and longest <= LONG_SEQUENCE * capacity:
            limit = max(capacity, longest)
        whole = longest <= limit
        chunks = _whole_chunks(lengths, limit) if whole else _even_chunks(len(row), capacity)
        return cls(row * labels.shape[1] + column, targets, sequence, chunks, whole)

    @property
    def largest(self) -> int:
        """Positions of the largest chunk."""
        return max((stop - start for start, stop in self.chunks), default=0)


def _whole_chunks(lengths: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Return bounds of chunks of consecutive whole sequences, at most ``limit`` positions each."""
    chunks = []
    start = stop = 0
    for length in lengths:
        if stop > start and stop + length - start > limit:
            chunks.append((start, stop))
            start = stop
        stop += length
    return [*chunks, (start, stop)] if stop > start else chunks


def _even_chunks(count: int, capacity: int) -> list[tuple[int, int]]:
    """Return bounds of the fewest chunks of at most ``capacity``, as even as can be."""
    number = math.ceil(count / capacity)
    bounds = [count * i // number for i in range(number + 1)] if number else []
    return list(itertools.pairwise(bounds))


def _at_positions(values: Tensor | None, plan: _Plan, valid: Tensor) -> Tensor | None:
    """Return ``(B, T)`` or ``(B, T-1)`` figures at the plan's positions, ``(N,)``."""
    if values is None:
        return None
    rows, length = valid.shape[0], valid.shape[1] + 1
    if values.shape not in ((rows, length), (rows, length - 1)):
        raise ValueError(
            f"teacher entropies of shape {tuple(values.shape)} do not fit a batch of shape "
            f"{(rows, length)}"
        )
    found = values[plan.index // length, plan.index % length]
    return found.to(_math_dtype(values.dtype))


# The teacher's side --------------------------------------------------------------------------


class _TeacherPass:
    """The teacher's logits, chunk by chunk, and what the students must know of them.

    Where a student needs a figure of the whole batch, or of a sequence that is longer than a
    chunk, all chunks are looked at once before the students' turn.
    """

    def __init__(
        self,
        head: _Head,
        plan: _Plan,
        entropy: Tensor | None,
        weight_mean: Tensor | float | None,
        students: Sequence[Student],
    ) -> None:
        self._head, self._plan, self._weight_mean = head, plan, weight_mean
        self._buffer = head.buffer(plan.largest)
        self._held: tuple[int, int] | None = None
        self._scratch = Scratch()
        self._entropy = entropy  # (N,), or None where it is found chunk by chunk
        self._weights: dict[str, Tensor] = {}  # (N,) by kind
        self._doubt: dict[float, Tensor] = {}  # mean of 1 - max p by temperature
        self._survey(students)

    def logits(self, chunk: tuple[int, int]) -> Tensor:
        """Return the logits ``(n, V)`` of a chunk. Those asked for last are kept."""
        start, stop = chunk
        if self._held != chunk:
            rows = self._head.hidden.index_select(0, self._plan.index[start:stop])
            self._head.project(rows, self._buffer)
            self._held = chunk
        return self._buffer[: stop - start]

    def entropy(self, chunk: tuple[int, int]) -> Tensor:
        """Return entropies ``(n,)`` at T = 1."""
        if self._entropy is not None:
            return self._entropy[slice(*chunk)]
        return self._figures(chunk, 1.0).entropy

    def _figures(self, chunk: tuple[int, int], temperature: float) -> elementwise.Figures:
        logits = self.logits(chunk)
        return elementwise_for(logits).distribution_figures(logits, temperature, self._scratch)

    def weights(self, settings: LossSettings, chunk: tuple[int, int], entropy: Tensor) -> Tensor:
        """Return the weights ``(n,)`` of a chunk's positions, given its entropies."""
        if not settings.use_uncertainty_weighting:
            return torch.ones_like(entropy)
        kind = settings.weighting
        if self._entropy is None:
            return self._weigh(entropy, self._plan.sequence[slice(*chunk)], kind)
        if kind not in self._weights:
            self._weights[kind] = self._weigh(self._entropy, self._plan.sequence, kind)
        return self._weights[kind][slice(*chunk)]

    def uncertainty_mean(self, student: Student) -> Tensor | float | None:
        """Return the mean of 1 - max p that a student's ``matched`` smoothing refers to."""
        if student.uncertainty_mean is not None:
            return student.uncertainty_mean
        return self._doubt.get(student.settings.temperature)

    def _weigh(self, entropy: Tensor, sequence: Tensor, kind: str) -> Tensor:
        everything = torch.ones_like(sequence, dtype=torch.bool)
        number = sequence - sequence[:1]
        one_row = (t.unsqueeze(0) for t in (entropy, everything, number))
        entropies, valid, segments = one_row
        return position_weights(entropies, valid, kind, segments, self._weight_mean).squeeze(0)

    def _survey(self, students: Sequence[Student]) -> None:
        """Look at all chunks for what is needed of all of them at once, if anything is."""
        means = ("mean_one", "matched")
        settings = [s.settings for s in students if s.settings.alpha < 1.0]
        entropies = self._entropy is None and any(
            s.use_uncertainty_weighting
            and (not self._plan.whole or (s.weighting in means and self._weight_mean is None))
            for s in settings
        )
        temperatures = {
            student.settings.temperature
            for student in students
            if student.settings.alpha < 1.0
            and student.settings.use_calibration_smoothing
            and student.settings.smoothing == "matched"
            and student.uncertainty_mean is None
        }
        if not entropies and not temperatures:
            return
        found = []
        doubt: dict[float, Any] = dict.fromkeys(temperatures, 0.0)
        for chunk in self._plan.chunks:
            figures = None
            for temperature in sorted(temperatures) or [1.0]:
                figures = self._figures(chunk, temperature)
                if temperature in doubt:
                    doubt[temperature] = doubt[temperature] + (1.0 - figures.max_prob).sum()
            assert figures is not None
            found.append(figures.entropy)
        if not found:
            return
        if entropies:
            self._entropy = torch.cat(found)
        positions = len(self._plan.index)
        self._doubt = {t: torch.as_tensor(value) / positions for t, value in doubt.items()}


# The students' side --------------------------------------------------------------------------


def _wanted_gradients(student: Student) -> tuple[bool, bool, bool]:
    """Return whether hidden states, head and bias need a gradient."""
    tensors = (student.hidden, student.weight, student.bias)
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
    return wanted[0], wanted[1], wanted[2]


class _Job:
    """One student's sums and gradients while the chunks go by.

    Gradients are those of N times the loss until a chunk is added, and of the loss itself then:
    dividing late keeps small probabilities from vanishing in half precision.
    """

    def __init__(
        self,
        student: Student,
        head: _Head,
        rows: Tensor,
        wanted: tuple[bool, bool, bool],
        count: float,
    ) -> None:
        self.student, self.head, self._rows, self._count = student, head, rows.detach(), count
        self._dtype = _math_dtype(head.dtype)
        self._sums = torch.zeros(5, dtype=wide(rows[:0]).dtype, device=rows.device)
        self._with_gradient = any(wanted)
        like = (rows, student.weight, student.bias)
        self.d_rows, self.d_weight, self.d_bias = (
            torch.empty(tensor.shape, dtype=self._dtype, device=rows.device)
            if want and tensor is not None
            else None
            for want, tensor in zip(wanted, like, strict=True)
        )
        if self.d_weight is not None:
            self.d_weight[head.vocabulary :].zero_()
        if self.d_bias is not None:
            self.d_bias.zero_()
        self._first = True

    def take(
        self,
        chunk: tuple[int, int],
        targets: Tensor,
        teacher: _TeacherPass | None,
        entropy: Tensor | None,
        buffer: Tensor,
        scratch: Scratch,
    ) -> None:
        """Add one chunk's losses and gradients."""
        settings = self.student.settings
        rows = self._rows[slice(*chunk)].to(self.head.dtype)
        logits = self.head.project(rows, buffer)
        weights = torch.ones(len(rows), dtype=self._dtype, device=rows.device)
        mean = teacher_logits = None
        if settings.alpha == 1.0 or teacher is None or entropy is None:
            entropy = torch.zeros_like(weights)
        else:
            weights = teacher.weights(settings, chunk, entropy)
            mean = teacher.uncertainty_mean(self.student)
            teacher_logits = teacher.logits(chunk)
        losses = elementwise_for(logits, teacher_logits).chunk_losses(
            logits,
            teacher_logits,
            targets,
            weights,
            settings,
            mean,
            self._with_gradient,
            scratch,
        )
        columns = (losses.hard, losses.soft, weights, losses.epsilon, entropy)
        self._sums += torch.stack([wide(column).sum() for column in columns])
        if self._with_gradient:
            self._add_gradients(logits, rows, chunk)

    def _add_gradients(self, dz: Tensor, rows: Tensor, chunk: tuple[int, int]) -> None:
        """Add the products of ``dz`` ``(n, V)`` with the head and with ``rows`` ``(n, E)``."""
        each = 1.0 / self._count
        if self.d_rows is not None:
            d_rows = self.d_rows[slice(*chunk)]
            if dz.dtype == self._dtype:
                torch.addmm(d_rows, dz, self.head.weight, beta=0, alpha=each, out=d_rows)
            else:
                d_rows.copy_(torch.mm(dz, self.head.weight)).mul_(each)
        if self.d_weight is not None:
            d_weight = self.d_weight[: self.head.vocabulary]
            if dz.dtype == self._dtype:
                d_weight.addmm_(dz.t(), rows, beta=0 if self._first else 1, alpha=each)
            else:
                self._add_half(d_weight, dz, rows, each)
        if self.d_bias is not None:
            d_bias = self.d_bias[: self.head.vocabulary]
            d_bias.add_(dz.sum(0, dtype=self._dtype), alpha=each)
        self._first = False

    def _add_half(self, d_weight: Tensor, dz: Tensor, rows: Tensor, each: float) -> None:
        """Add ``each`` · dzᵀ rows to a float32 gradient, some of the vocabulary at a time."""
        elements = HEAD_TILE_ELEMENTS.get(dz.device.type, HEAD_TILE_ELEMENTS["cuda"])
        step = max(1, elements // rows.shape[1])
        for start in range(0, len(d_weight), step):
            part = torch.mm(dz[:, start : start + step].t(), rows)
            tile = d_weight[start : start + step]
            if self._first:
                torch.mul(part, each, out=tile)
            else:
                tile.add_(part, alpha=each)

    def parts(self, rows: Tensor, here: Tensor) -> LossParts:
        """Return the loss, tied to ``rows`` and the head in autograd's graph, and its parts."""
        settings, positions = self.student.settings, here.clamp(min=1)
        sums = self._sums.to(self._dtype)
        hard, soft = (self._sums[:2] / self._count).to(self._dtype)
        loss = settings.alpha * hard + (1.0 - settings.alpha) * settings.temperature**2 * soft
        if self._first and self.d_weight is not None:
            self.d_weight.zero_()
        if self._with_gradient:
            loss = _Loss.apply(
                loss,
                rows,
                self.student.weight,
                self.student.bias,
                self.d_rows,
                self.d_weight,
                self.d_bias,
            )
        return LossParts(loss, hard, soft, *(sums[2:] / positions), positions=here)


def _run(jobs: Sequence[_Job], plan: _Plan, teacher: _TeacherPass | None) -> None:
    """Take all chunks, each student in turn."""
    scratch = Scratch()
    buffers: dict[torch.dtype, Tensor] = {}
    for chunk in plan.chunks:
        entropy = None if teacher is None else teacher.entropy(chunk)
        for job in jobs:
            dtype = job.head.dtype
            if dtype not in buffers:
                buffers[dtype] = job.head.buffer(plan.largest)
            targets = plan.targets[slice(*chunk)]
            job.take(chunk, targets, teacher, entropy, buffers[dtype], scratch)


class _Loss(torch.autograd.Function):
    """A loss whose gradients are known already; backward scales them."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *tensors: Tensor | None) -> Tensor:
        """Return ``loss``; ``tensors`` are three inputs and the loss's gradients by them."""
        ctx.dtypes = [None if t is None else t.dtype for t in tensors[:3]]
        ctx.save_for_backward(*tensors[3:])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients times ``grad_output``."""
        # Not looking at a number on a GPU saves waiting for it.
        as_it_is = grad_output.device.type == "cpu" and grad_output.item() == 1.0
        scaled = (
            None if g is None else (g if as_it_is else g * grad_output).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (None, *scaled, None, None, None)

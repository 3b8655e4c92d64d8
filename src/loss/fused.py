"""The distillation loss from hidden states: the output head and the loss in one, chunk by chunk.

``src.loss.reference.distillation_loss`` needs the logits of the whole batch, several tensors of
batch × length × vocabulary. Here the valid positions are gathered first, so that padding costs
nothing. Then, for some hundreds of positions at a time, the logits are computed, the gradient of
the loss is written over them in closed form, and its products with head and hidden states are
added up. Autograd sees neither logits nor probabilities.

With z the student's logits, h = softmax(z), q = softmax(z / T), p̄ the smoothed target and w the
weight of a position, the gradient of one position's loss, times N, is

    dz = α (h - onehot) + (1 - α) T w g

times the slope of a scaled or capped head (:meth:`src.loss.chunks.Head.slope`), where g is T times
the gradient of the divergence D(p̄, q) with respect to z (``src.loss.divergences``). At T = 2,
exp(z) = exp(z/2)², so that one exponential serves both softmaxes. Logits have the dtype of the
inputs (bfloat16 products are summed in float32 and rounded once, as in any linear layer).
Everything after them is float32, and so is the sum of the head's gradient over chunks. Float64
stays float64.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from src.common.settings import LossSettings, require_choice
from src.loss import divergences, elementwise
from src.loss.chunks import Head, OutputHead, Plan, check_inputs, even_chunks, usual_chunk
from src.loss.divergences import wide
from src.loss.elementwise import Scratch, TeacherStatistics
from src.loss.reference import LossParts, position_weights, valid_positions

KERNELS_VARIABLE = "DISTILL_KERNELS"
"""Environment variable that chooses the element-wise part: ``auto``, ``torch`` or ``triton``."""
HEAD_TILE_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Elements of the head's gradient that are multiplied out in half precision before being added."""


class StudentStates(NamedTuple):
    """Hidden states and head of one student, with its loss settings.

    ``hidden`` ``(B, T, E)`` is the input of its output head ``head``, whose weight may be tied to
    the input embedding. ``uncertainty_mean`` is the mean of 1 - max p over the whole optimiser
    step; None: over this batch.
    """

    hidden: Tensor
    head: OutputHead
    settings: LossSettings
    uncertainty_mean: Tensor | float | None = None


def fused_distillation_losses(
    students: Sequence[StudentStates],
    teacher_hidden: Tensor | None,
    teacher_head: OutputHead | None,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    *,
    segments: Tensor | None = None,
    num_positions: Tensor | float | None = None,
    weight_mean: Tensor | float | None = None,
    teacher_entropy: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> list[LossParts]:
    """Return what ``distillation_loss`` returns, for students that share a batch and a teacher.

    The logits of the whole batch are never held, and the teacher's are computed once for all.

    Args:
        students: on a CPU the result of each is, to the bit, that of a list of one.
        teacher_hidden: ``(B, T, F)``; never gets a gradient. None where every α is 1. Of a student
            with α = 1 soft loss, ε and entropy are reported as 0 and weights as 1.
        teacher_head: its output head, W ``(V, F)``.
        labels: ``(B, T)`` token ids, not shifted; -100 where there is nothing to predict.
        attention_mask: ``(B, T)``, 0 at padding.
        segments: ``(B, T)`` protein number within packed rows.
        num_positions: N, valid positions of the whole optimiser step; None: of this batch.
        weight_mean: mean published weight of the whole optimiser step; None: of this batch.
        teacher_entropy: ``(B, T)`` or ``(B, T-1)`` entropies at T = 1 in nats, from a cache.
        chunk_tokens: positions for which logits are held at a time; None: chosen by vocabulary and
            device. Weights need the entropies of a whole sequence: where one is longer than a
            chunk, the teacher's head runs twice.

    Returns:
        One :class:`LossParts` for each student; its loss has gradients for hidden states, head and
        bias (first derivatives only). The losses can be differentiated in any order.

    Raises:
        ValueError: shapes or vocabularies do not fit, a label is outside the vocabulary, a
            divergence is unknown, or α < 1 without a teacher.
    """
    teacher = None
    if any(student.settings.alpha < 1.0 for student in students):
        if teacher_hidden is None or teacher_head is None:
            raise ValueError("teacher hidden states and head are needed unless alpha is 1")
        teacher = Head.of(teacher_hidden, teacher_head)
    heads = [Head.of(s.hidden, s.head) for s in students]
    check_inputs(heads if teacher is None else [*heads, teacher], labels)
    valid = valid_positions(labels, attention_mask, segments)
    plan = Plan.make(valid, labels, segments, heads[0].vocabulary, chunk_tokens)
    here = valid.sum()
    count = max(float(here if num_positions is None else num_positions), 1.0)
    # Gathered with autograd on, so that its backward puts zeros where nothing was valid.
    gathered = [s.hidden.flatten(0, 1).index_select(0, plan.index) for s in students]
    with_grad = torch.is_grad_enabled()
    with torch.no_grad(), torch.autocast(labels.device.type, enabled=False):
        teacher_pass = None
        if teacher is not None:
            entropy = _at_positions(teacher_entropy, plan, valid)
            teacher_pass = _TeacherPass(teacher, plan, entropy, weight_mean, students)
        passes = [
            _StudentPass(student, head, rows, with_grad, count)
            for student, head, rows in zip(students, heads, gathered, strict=True)
        ]
        scratch = Scratch()
        buffers = {head.dtype: head.buffer(plan.largest) for head in heads}
        for chunk in plan.chunks:
            for student_pass in passes:
                buffer = buffers[student_pass.head.dtype]
                student_pass.add_chunk(chunk, plan, teacher_pass, buffer, scratch)
    return [student_pass.parts(here) for student_pass in passes]


@torch.no_grad()
def teacher_statistics(
    hidden: Tensor,
    output_head: OutputHead,
    valid: Tensor | None = None,
    temperature: float = 1.0,
    *,
    chunk_tokens: int | None = None,
) -> TeacherStatistics:
    """Return entropy, largest logit, log-sum-exp and largest probability at each position.

    Args:
        hidden: ``(..., E)`` inputs of the output head.
        output_head: of the model.
        valid: ``(...)`` bool, where to compute; None: everywhere.
        temperature: of ``max_prob`` alone.
        chunk_tokens: positions for which logits are held at a time.

    Returns:
        Each statistic ``(...)``, float32 or float64, 0 where not valid.
    """
    shape = hidden.shape[:-1]
    rows = hidden.flatten(0, -2)
    where = None if valid is None else valid.flatten().nonzero().squeeze(-1)
    if where is not None:
        rows = rows.index_select(0, where)
    head = Head.of(rows, output_head)
    chunks = even_chunks(len(rows), chunk_tokens or usual_chunk(head.vocabulary, rows.device))
    of_chunks = []
    scratch = Scratch()
    with torch.autocast(hidden.device.type, enabled=False):
        buffer = head.buffer(max((stop - start for start, stop in chunks), default=0))
        for start, stop in chunks:
            logits = head.project(head.hidden[start:stop], buffer)
            statistics = elementwise_for(logits).distribution_statistics(
                logits, temperature, scratch
            )
            of_chunks.append(torch.stack(statistics))
    columns = torch.cat(of_chunks, -1) if of_chunks else torch.zeros(4, 0, device=hidden.device)
    if where is not None:
        columns = columns.new_zeros(4, math.prod(shape)).index_copy_(1, where, columns)
    return TeacherStatistics(*columns.unflatten(1, shape).unbind())


# The choice between kernels and plain PyTorch ---------------------------------------------------


def elementwise_for(*logits: Tensor | None, divergence: str | None = None) -> Any:
    """Return the module for the element-wise part: ``src.loss.kernels`` or ``.elementwise``.

    The Triton kernels are used on a CUDA device where Triton is installed and agrees with plain
    PyTorch, unless the environment variable ``DISTILL_KERNELS`` is ``torch``. Float64, and a
    divergence without a kernel, always use plain PyTorch.

    Raises:
        ValueError: ``DISTILL_KERNELS`` is neither ``auto``, ``torch`` nor ``triton``, or is
            ``triton`` where that cannot run, or the divergence is unknown.
    """
    given = [z for z in logits if z is not None]
    device = given[0].device
    wanted = os.environ.get(KERNELS_VARIABLE) or "auto"
    require_choice(KERNELS_VARIABLE, wanted, ("auto", "torch", "triton"))
    has_kernel = divergence is None or divergences.named(divergence).kernel is not None
    if wanted == "torch" or not has_kernel or any(z.dtype == torch.float64 for z in given):
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
    """Return the Triton kernels, or None; warn once where they are installed but do not work.

    A machine can have Triton without a compiler for it. The loss must run there all the same.
    """
    try:
        from src.loss import kernels
    except ImportError:
        return None
    try:
        kernels.check_against_torch(device)
    except Exception as error:  # compilers, drivers and launches raise many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        warnings.warn(
            f"the Triton kernels do not work here, so the loss runs in plain PyTorch: {reason}",
            stacklevel=3,
        )
        return None
    return kernels


# The teacher's side --------------------------------------------------------------------------


def _at_positions(values: Tensor | None, plan: Plan, valid: Tensor) -> Tensor | None:
    """Return the values ``(B, T)`` or ``(B, T-1)`` at the plan's positions, ``(N,)``."""
    if values is None:
        return None
    rows, length = valid.shape[0], valid.shape[1] + 1
    if values.shape not in ((rows, length), (rows, length - 1)):
        raise ValueError(
            f"teacher entropies of shape {tuple(values.shape)} do not fit a batch of shape "
            f"{(rows, length)}"
        )
    picked = values[plan.index // length, plan.index % length]
    return picked.to(torch.promote_types(values.dtype, torch.float32))


class _TeacherPass:
    """The teacher's logits, entropies and weights, chunk by chunk.

    Where a student needs a mean over the whole batch, or the entropies of a sequence that is longer
    than a chunk, a first pass over all chunks computes them.
    """

    def __init__(
        self,
        head: Head,
        plan: Plan,
        entropy: Tensor | None,
        weight_mean: Tensor | float | None,
        students: Sequence[StudentStates],
    ) -> None:
        self._head, self._plan, self._weight_mean = head, plan, weight_mean
        self._buffer = head.buffer(plan.largest)
        self._held: tuple[int, int] | None = None
        self._scratch = Scratch()
        self._entropy = entropy  # (N,), or None where it is computed chunk by chunk
        self._chunk_entropy: tuple[tuple[int, int], Tensor] | None = None
        self._weights: dict[str, Tensor] = {}  # (N,) by kind
        self._uncertainty: dict[float, Tensor] = {}  # mean of 1 - max p by temperature
        self._first_pass([s for s in students if s.settings.alpha < 1.0])

    def _first_pass(self, students: Sequence[StudentStates]) -> None:
        """Compute what the students need of all chunks at once, if anything."""
        needs_entropy = self._entropy is None and any(
            (s.settings.use_uncertainty_weighting and not self._plan.whole)
            or (s.settings.needs_weight_mean and self._weight_mean is None)
            for s in students
        )
        temperatures = sorted(
            {
                s.settings.temperature
                for s in students
                if s.settings.needs_uncertainty_mean and s.uncertainty_mean is None
            }
        )
        if not self._plan.chunks or not (needs_entropy or temperatures):
            return
        statistics = [
            [self._statistics(chunk, temperature) for temperature in temperatures or [1.0]]
            for chunk in self._plan.chunks
        ]
        if needs_entropy:
            self._entropy = torch.cat([of_chunk[0].entropy for of_chunk in statistics])
        for number, temperature in enumerate(temperatures):
            total = sum((1.0 - of_chunk[number].max_prob).sum() for of_chunk in statistics)
            self._uncertainty[temperature] = torch.as_tensor(total) / len(self._plan.index)

    def logits(self, chunk: tuple[int, int]) -> Tensor:
        """Return the logits ``(n, V)`` of a chunk; those of the last chunk are kept."""
        start, stop = chunk
        if self._held != chunk:
            rows = self._head.hidden.index_select(0, self._plan.index[start:stop])
            self._head.project(rows, self._buffer)
            self._held = chunk
        return self._buffer[: stop - start]

    def _statistics(self, chunk: tuple[int, int], temperature: float) -> TeacherStatistics:
        logits = self.logits(chunk)
        return elementwise_for(logits).distribution_statistics(logits, temperature, self._scratch)

    def entropy(self, chunk: tuple[int, int]) -> Tensor:
        """Return entropies ``(n,)`` at T = 1; those of the last chunk are kept."""
        if self._entropy is not None:
            return self._entropy[slice(*chunk)]
        if self._chunk_entropy is None or self._chunk_entropy[0] != chunk:
            self._chunk_entropy = (chunk, self._statistics(chunk, 1.0).entropy)
        return self._chunk_entropy[1]

    def weights(self, settings: LossSettings, chunk: tuple[int, int]) -> Tensor:
        """Return the weights ``(n,)`` of a chunk's positions."""
        entropy = self.entropy(chunk)
        if not settings.use_uncertainty_weighting:
            return torch.ones_like(entropy)
        kind = settings.weighting
        if self._entropy is None:
            return self._weigh(entropy, self._plan.sequence[slice(*chunk)], kind)
        if kind not in self._weights:
            self._weights[kind] = self._weigh(self._entropy, self._plan.sequence, kind)
        return self._weights[kind][slice(*chunk)]

    def _weigh(self, entropy: Tensor, sequence: Tensor, kind: str) -> Tensor:
        valid = torch.ones_like(sequence, dtype=torch.bool)
        segments = sequence - sequence[:1]
        entropies, valid, segments = (t.unsqueeze(0) for t in (entropy, valid, segments))
        return position_weights(entropies, valid, kind, segments, self._weight_mean).squeeze(0)

    def uncertainty_mean(self, student: StudentStates) -> Tensor | float | None:
        """Return the mean of 1 - max p that a student's ``matched`` smoothing refers to."""
        if student.uncertainty_mean is not None:
            return student.uncertainty_mean
        return self._uncertainty.get(student.settings.temperature)


# The students' side --------------------------------------------------------------------------


class _StudentPass:
    """Sums and gradients of one student over the chunks.

    The logits' gradients are those of N times the loss; the division by N follows the products
    with them, so that small probabilities do not vanish in half precision.
    """

    def __init__(
        self, student: StudentStates, head: Head, rows: Tensor, with_grad: bool, count: float
    ) -> None:
        self.student, self.head, self._rows, self._count = student, head, rows, count
        self._dtype = torch.promote_types(head.dtype, torch.float32)
        self._sums = torch.zeros(5, dtype=wide(rows[:0]).dtype, device=rows.device)
        self._first = True
        self._gradients = [
            torch.empty(tensor.shape, dtype=self._dtype, device=rows.device)
            if with_grad and tensor is not None and tensor.requires_grad
            else None
            for tensor in (rows, *student.head[:2])
        ]
        self._with_gradient = any(gradient is not None for gradient in self._gradients)
        if self._gradients[2] is not None:
            self._gradients[2].zero_()

    def add_chunk(
        self,
        chunk: tuple[int, int],
        plan: Plan,
        teacher: _TeacherPass | None,
        buffer: Tensor,
        scratch: Scratch,
    ) -> None:
        """Add one chunk's losses and gradients; ``buffer`` has room for its logits."""
        settings = self.student.settings
        rows = self._rows.detach()[slice(*chunk)].to(self.head.dtype)
        logits = self.head.project(rows, buffer)
        slope = self.head.slope(logits) if self._with_gradient else None
        mean = teacher_logits = divergence = None
        if settings.alpha == 1.0 or teacher is None:
            weights = torch.ones(len(rows), dtype=self._dtype, device=rows.device)
            entropy = torch.zeros_like(weights)
        else:
            weights, entropy = teacher.weights(settings, chunk), teacher.entropy(chunk)
            mean, teacher_logits = teacher.uncertainty_mean(self.student), teacher.logits(chunk)
            divergence = settings.divergence
        losses = elementwise_for(logits, teacher_logits, divergence=divergence).chunk_losses(
            logits,
            teacher_logits,
            plan.targets[slice(*chunk)],
            weights,
            settings,
            mean,
            self._with_gradient,
            scratch,
        )
        columns = (losses.hard, losses.soft, weights, losses.epsilon, entropy)
        self._sums += torch.stack([wide(column).sum() for column in columns])
        if self._with_gradient:
            if slope is not None:
                logits.mul_(slope)
            self._add_gradients(logits, rows, chunk)

    def _add_gradients(self, dz: Tensor, rows: Tensor, chunk: tuple[int, int]) -> None:
        """Add the products of ``dz`` ``(n, V)`` with the head's weight and with ``rows``."""
        scale = 1.0 / self._count
        d_rows, d_weight, d_bias = self._gradients
        if d_rows is not None:
            own, weight = d_rows[slice(*chunk)], self.head.form.weight
            if weight is None:
                own.copy_(dz).mul_(scale)
            elif dz.dtype == self._dtype:
                torch.addmm(own, dz, weight, beta=0, alpha=scale, out=own)
            else:
                own.copy_(torch.mm(dz, weight)).mul_(scale)
        if d_weight is not None:
            if dz.dtype == self._dtype:
                beta = 0 if self._first else 1
                d_weight.addmm_(dz.t(), rows, beta=beta, alpha=scale)
            else:
                self._add_half(d_weight, dz, rows, scale)
        if d_bias is not None:
            d_bias.add_(dz.sum(0, dtype=self._dtype), alpha=scale)
        self._first = False

    def _add_half(self, d_weight: Tensor, dz: Tensor, rows: Tensor, scale: float) -> None:
        """Add ``scale`` · dzᵀ rows to a float32 gradient, part of the vocabulary at a time."""
        elements = HEAD_TILE_ELEMENTS.get(dz.device.type, HEAD_TILE_ELEMENTS["cuda"])
        step = max(1, elements // rows.shape[1])
        for start in range(0, len(d_weight), step):
            part = torch.mm(dz[:, start : start + step].t(), rows)
            tile = d_weight[start : start + step]
            if self._first:
                torch.mul(part, scale, out=tile)
            else:
                tile.add_(part, alpha=scale)

    def parts(self, here: Tensor) -> LossParts:
        """Return the loss, with its place in autograd's graph, and its parts."""
        settings, positions = self.student.settings, here.clamp(min=1)
        sums = self._sums.to(self._dtype)
        hard, soft = (self._sums[:2] / self._count).to(self._dtype)
        loss = settings.alpha * hard + (1.0 - settings.alpha) * settings.temperature**2 * soft
        if self._with_gradient:
            d_weight = self._gradients[1]
            if self._first and d_weight is not None:
                d_weight.zero_()
            inputs = (self._rows, *self.student.head[:2])
            loss = _Loss.apply(loss, *inputs, *self._gradients)
        return LossParts(loss, hard, soft, *(sums[2:] / positions), positions=here)


class _Loss(torch.autograd.Function):
    """A loss whose gradients are already computed; backward scales them."""

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
        # Reading the number on a GPU would wait for it.
        unscaled = grad_output.device.type == "cpu" and grad_output.item() == 1.0
        scaled = (
            None if g is None else (g if unscaled else g * grad_output).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (None, *scaled, None, None, None)

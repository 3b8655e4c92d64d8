"""The distillation loss as pure functions of tensors.

For a valid position t, which predicts token t+1, with student logits z_S, teacher logits z_T,
temperature T and vocabulary size V:

    p = softmax(z_T / T)                         teacher's distribution
    q = softmax(z_S / T)                         student's distribution
    p̄ = (1 - ε) p + ε / V                        smoothed target
    soft = Σ_t w_t D(p̄_t, q_t) / N               D: forward KL unless chosen otherwise
    hard = -Σ_t log softmax(z_S)_t(x_{t+1}) / N
    loss = α hard + (1 - α) T² soft              Hinton et al. 2015, arXiv:1503.02531, section 2

N is the number of valid positions in the whole optimiser step, so that accumulating eight rows one
by one gives the gradient of one batch of eight. docs/METHODS.md ties each equation to its function
and its test. The functions work in log space and in float32 (float64 stays float64).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from src.common.settings import SMOOTHINGS, WEIGHTINGS, LossSettings, require_choice
from src.loss import divergences
from src.proteins.batching import IGNORED_LABEL

CONSTANT_ENTROPY = 1e-6
"""Nats. A sequence whose entropies differ by no more counts as constant."""


@dataclass
class LossParts:
    """A loss and its parts: scalars, of which ``loss`` alone has a gradient.

    ``hard`` and ``soft`` are divided by the same N as ``loss``; the means of weight, ε and teacher
    entropy (nats, T = 1) are over the ``positions`` valid positions of this batch.
    """

    loss: Tensor
    hard: Tensor
    soft: Tensor
    mean_weight: Tensor
    mean_epsilon: Tensor
    teacher_entropy: Tensor
    positions: Tensor


def valid_positions(
    labels: Tensor, attention_mask: Tensor | None = None, segments: Tensor | None = None
) -> Tensor:
    """Return which positions are trained on: those that predict a real next token.

    Args:
        labels: ``(B, T)`` token ids, -100 where there is nothing to predict.
        attention_mask: ``(B, T)``, 0 at padding; None means that nothing is padding.
        segments: ``(B, T)`` number of the protein that each token of a packed row belongs to.

    Returns:
        ``(B, T-1)`` bool. Position t counts when tokens t and t+1 are attended, belong to the same
        protein, and label t+1 is not -100.
    """
    valid = labels[:, 1:] != IGNORED_LABEL  # (B, T-1)
    if attention_mask is not None:
        attended = attention_mask.bool()
        valid = valid & attended[:, :-1] & attended[:, 1:]
    if segments is not None:
        valid = valid & (segments[:, :-1] == segments[:, 1:])
    return valid


def entropy(log_probs: Tensor) -> Tensor:
    """Return H = -Σ p log p in nats. ``log_probs`` ``(..., V)`` → ``(...)``; 0 log 0 is 0."""
    return torch.special.entr(log_probs.exp()).sum(-1)


def published_weights(entropies: Tensor, valid: Tensor, segments: Tensor | None = None) -> Tensor:
    """Return w = 0.5 + 0.5 (H - min H) / (max H - min H), min and max over each sequence.

    Args:
        entropies: ``(B, T)`` teacher entropies in nats.
        valid: ``(B, T)`` bool; only these enter min and max.
        segments: ``(B, T)`` sequence number within a packed row; None: each row is one sequence.

    Returns:
        ``(B, T)`` weights in [0.5, 1], 0 where not valid. A sequence of constant entropy gets 0.5.
    """
    low, high = _extremes(entropies, valid, segments)
    spread = high - low
    varied = spread > CONSTANT_ENTROPY
    relative = torch.where(varied, (entropies - low) / torch.where(varied, spread, 1.0), 0.0)
    return torch.where(valid, 0.5 + 0.5 * relative, 0.0)


def _extremes(values: Tensor, valid: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return min and max over the valid positions of each sequence, ``(B, 1)`` or ``(B, T)``."""
    low = values.masked_fill(~valid, math.inf)
    high = values.masked_fill(~valid, -math.inf)
    if segments is None:
        return low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
    count = int(segments.max()) + 1 if segments.numel() else 1
    blank = values.new_full((values.shape[0], count), 0.0)
    where = segments.clamp(min=0).long()
    low = blank.scatter_reduce(1, where, low, "amin", include_self=False)
    high = blank.scatter_reduce(1, where, high, "amax", include_self=False)
    return low.gather(1, where), high.gather(1, where)


def position_weights(
    entropies: Tensor,
    valid: Tensor,
    kind: str = "published",
    segments: Tensor | None = None,
    mean: Tensor | float | None = None,
) -> Tensor:
    """Return the weight of each position in the soft loss.

    Args:
        entropies: ``(B, T)`` teacher entropies at T = 1, in nats.
        valid: ``(B, T)`` bool.
        kind: ``published`` (:func:`published_weights`); ``mean_one`` (the same divided by their
            mean, so that weighting does not change the share of the hard loss); and the controls
            ``inverse`` (1.5 - published), ``permuted`` (published, shuffled within each sequence)
            and ``matched`` (every position the mean of the published weights).
        segments: ``(B, T)`` sequence number within packed rows, or None.
        mean: mean of the published weights over the whole optimiser step; None: over this batch.

    Returns:
        ``(B, T)``, 0 where not valid.

    Raises:
        ValueError: ``kind`` is unknown.
    """
    require_choice("weighting", kind, _WEIGHTING_RULES)
    weights = published_weights(entropies, valid, segments)
    if mean is None:
        mean = weights.sum() / valid.sum().clamp(min=1)
    mean = torch.as_tensor(mean, dtype=weights.dtype, device=weights.device)
    return torch.where(valid, _WEIGHTING_RULES[kind](weights, mean, valid, segments), 0.0)


def _permuted(weights: Tensor, mean: Tensor, valid: Tensor, segments: Tensor | None) -> Tensor:
    """Return each sequence's weights, shuffled among its valid positions.

    The order depends on the number of positions and the ranks of their weights alone, not on the
    global generator: a resumed run, and every arm that shares a batch, get the same order.
    """
    permuted = weights.clone()
    sequence = torch.zeros_like(valid, dtype=torch.long) if segments is None else segments
    for row in range(weights.shape[0]):
        for number in sequence[row][valid[row]].unique().tolist():
            where = (valid[row] & (sequence[row] == number)).nonzero().squeeze(-1)
            own = weights[row, where]
            ranking = own.cpu().argsort(stable=True).numpy().tobytes()
            seed = int.from_bytes(hashlib.sha256(ranking).digest()[:8], "little")
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(where), generator=generator).to(where.device)
            permuted[row, where] = own[order]
    return permuted


_WEIGHTING_RULES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]] = {
    "published": lambda weights, mean, valid, segments: weights,
    "mean_one": lambda weights, mean, *_: weights / torch.where(mean > 0, mean, 1.0),
    "inverse": lambda weights, mean, valid, segments: 1.5 - weights,
    "permuted": _permuted,
    "matched": lambda weights, mean, valid, segments: mean,
}
"""Published weights, their mean, valid positions and segments → weights, by name."""
assert tuple(_WEIGHTING_RULES) == WEIGHTINGS


def smoothing_epsilon(
    max_prob: Tensor,
    valid: Tensor,
    factor: float,
    kind: str = "published",
    mean: Tensor | float | None = None,
) -> Tensor:
    """Return ε, the share of the uniform distribution mixed into the teacher's.

    Args:
        max_prob: ``(B, T)`` largest probability of the teacher at the loss's temperature.
        valid: ``(B, T)`` bool.
        factor: λ in [0, 1).
        kind: ``published`` λ(1 - max p), which smooths uncertain targets; ``confident`` λ max p,
            which smooths confident targets; ``constant`` λ, plain label smoothing of the teacher;
            ``matched`` the mean of the published ε at every position.
        mean: mean of 1 - max p over the whole optimiser step; None: over this batch.

    Returns:
        ``(B, T)`` in [0, λ], 0 where not valid.

    Raises:
        ValueError: ``kind`` is unknown.
    """
    require_choice("smoothing", kind, SMOOTHING_SHARES)
    if mean is None and kind == "matched":
        mean = torch.where(valid, 1.0 - max_prob, 0.0).sum() / valid.sum().clamp(min=1)
    share = torch.as_tensor(SMOOTHING_SHARES[kind](max_prob, mean), dtype=max_prob.dtype)
    return torch.where(valid, factor * share.to(max_prob.device), 0.0)


SMOOTHING_SHARES: dict[str, Callable[..., Tensor | float]] = {
    "published": lambda max_prob, mean: 1.0 - max_prob,
    "confident": lambda max_prob, mean: max_prob,
    "constant": lambda max_prob, mean: 1.0,
    "matched": lambda max_prob, mean: mean,
}
"""Largest probability and mean of 1 - max p → ε / λ, by name. The kernels need each to be linear in
max p."""
assert tuple(SMOOTHING_SHARES) == SMOOTHINGS


def smooth_log_probs(log_probs: Tensor, epsilon: Tensor) -> Tensor:
    """Return log((1 - ε) p + ε / V).

    Args:
        log_probs: ``(..., V)`` log p.
        epsilon: ``(...)`` in [0, 1).

    Returns:
        ``(..., V)``; with ε = 0 the input itself, to the bit.
    """
    epsilon = epsilon.unsqueeze(-1)
    uniform = epsilon.log() - math.log(log_probs.shape[-1])
    return torch.logaddexp(log_probs + torch.log1p(-epsilon), uniform)


def divergence(
    target_log_probs: Tensor,
    student_log_probs: Tensor,
    kind: str = "forward_kl",
    weight: float = 0.5,
) -> Tensor:
    """Return the divergence between target p and student q at each position, in nats.

    Args:
        target_log_probs: ``(..., V)`` log p.
        student_log_probs: ``(..., V)`` log q.
        kind: a name of :data:`src.loss.divergences.TABLE`: ``forward_kl`` KL(p‖q);
            ``reverse_kl`` KL(q‖p); ``jsd`` the generalised Jensen-Shannon divergence
            β KL(p‖m) + (1-β) KL(q‖m) with m = βp + (1-β)q (Agarwal et al. 2024, arXiv:2306.13649,
            eq. 1); ``skew_kl`` KL(p‖λp + (1-λ)q) (Ko et al. 2024, arXiv:2402.03898, eq. 4).
        weight: β of ``jsd`` or λ of ``skew_kl``, in (0, 1).

    Returns:
        ``(...)``.

    Raises:
        ValueError: ``kind`` is unknown.
    """
    return divergences.named(kind).value(target_log_probs, student_log_probs, weight)


def hard_loss(student_logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log softmax(z_S)(x) at each position.

    Args:
        student_logits: ``(..., V)``.
        targets: ``(...)`` token ids; where -100 (or any negative), the result is 0.

    Returns:
        ``(...)`` in nats.
    """
    log_probs = student_logits.log_softmax(-1)
    picked = log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(targets >= 0, -picked, 0.0)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or as it is where it is already float32 or float64."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    settings: LossSettings | None = None,
    *,
    segments: Tensor | None = None,
    num_positions: Tensor | float | None = None,
    weight_mean: Tensor | float | None = None,
    uncertainty_mean: Tensor | float | None = None,
) -> LossParts:
    """Return the loss of a batch from full logits. The fused form must equal it.

    Args:
        student_logits: ``(B, T, V)``.
        teacher_logits: ``(B, T, V)``, taken as constants.
        labels: ``(B, T)`` token ids, not shifted; -100 where there is nothing to predict.
        attention_mask: ``(B, T)``, 0 at padding.
        settings: temperature, α, weighting, smoothing, divergence.
        segments: ``(B, T)`` protein number within packed rows.
        num_positions: N, valid positions of the whole optimiser step; None: of this batch.
        weight_mean: mean published weight of the whole optimiser step; None: of this batch.
        uncertainty_mean: mean of 1 - max p of the whole optimiser step; None: of this batch.

    Returns:
        The loss and its parts.

    Raises:
        ValueError: the vocabularies of student and teacher differ.
    """
    settings = settings or LossSettings()
    check_vocabularies(student_logits.shape[-1], teacher_logits.shape[-1])
    valid = valid_positions(labels, attention_mask, segments)  # (B, T-1)
    shifted_segments = None if segments is None else segments[:, :-1]
    student = at_least_float32(student_logits[:, :-1])  # (B, T-1, V)
    teacher = at_least_float32(teacher_logits[:, :-1].detach())
    # A masked position may hold anything, even NaN, which must not reach the gradient.
    student = torch.where(valid.unsqueeze(-1), student, 0.0)
    teacher = torch.where(valid.unsqueeze(-1), teacher, 0.0)
    targets = labels[:, 1:].masked_fill(~valid, IGNORED_LABEL)
    temperature = settings.temperature

    entropies = entropy(teacher.log_softmax(-1))
    log_p = (teacher / temperature).log_softmax(-1)
    weights = valid.to(student.dtype)
    if settings.use_uncertainty_weighting:
        weights = position_weights(
            entropies, valid, settings.weighting, shifted_segments, weight_mean
        )
    epsilon = torch.zeros_like(weights)
    if settings.use_calibration_smoothing:
        epsilon = smoothing_epsilon(
            log_p.amax(-1).exp(),
            valid,
            settings.smoothing_factor,
            settings.smoothing,
            uncertainty_mean,
        )
        log_p = smooth_log_probs(log_p, epsilon)

    log_q = (student / temperature).log_softmax(-1)
    here = valid.sum()
    count = here if num_positions is None else torch.as_tensor(num_positions, device=here.device)
    count = count.clamp(min=1)
    distances = divergence(log_p, log_q, settings.divergence, settings.divergence_weight)
    soft = (weights * distances).sum() / count
    hard = hard_loss(student, targets).sum() / count
    loss = settings.alpha * hard + (1.0 - settings.alpha) * temperature**2 * soft
    return LossParts(
        loss=loss,
        hard=hard.detach(),
        soft=soft.detach(),
        mean_weight=masked_mean(weights, valid),
        mean_epsilon=masked_mean(epsilon, valid),
        teacher_entropy=masked_mean(entropies, valid),
        positions=here,
    )


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Return the mean of ``values`` where ``valid``; 0 where nothing is valid."""
    return torch.where(valid, values, 0.0).sum().detach() / valid.sum().clamp(min=1)


def check_vocabularies(student: int, teacher: int) -> None:
    """Raise ``ValueError`` unless student and teacher have vocabularies of one size."""
    if student != teacher:
        raise ValueError(
            f"the student has a vocabulary of {student:,} tokens, the teacher of {teacher:,}: "
            "distillation needs one tokenizer for both"
        )


def segments_from_positions(position_ids: Tensor) -> Tensor:
    """Return the number, from 0, of the protein that each token of a packed row belongs to.

    Args:
        position_ids: ``(B, T)``, starting at 0 with each protein.

    Returns:
        ``(B, T)``.
    """
    return ((position_ids == 0).cumsum(-1) - 1).clamp(min=0)

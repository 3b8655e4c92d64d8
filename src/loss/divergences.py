"""The divergences of the soft loss, in ``TABLE``, which every form of the loss reads.

D(p, q) compares the target p with the student's q at one position, in nats. To add a divergence,
add its name to ``src.common.settings.DIVERGENCES``, an entry here, and a test. A ``gradient`` and a
``kernel`` make it faster; without them autograd and plain PyTorch do the work.

The gradient g of D is T times that with respect to the student's logits z, with q = softmax(z / T).
As dq/dz = (diag(q) - q qᵀ) / T, it is g_v = q_v (∂D/∂q_v - Σ_u q_u ∂D/∂q_u):

    forward_kl  ∂D/∂q = -p/q              g = q - p
    reverse_kl  ∂D/∂q = log(q/p) + 1      g = q (log(q/p) - D)
    skew_kl     ∂D/∂q = -(1-λ) p/m        g = (1-λ) q (Σ q p/m - p/m),  m = λp + (1-λ)q
    jsd         ∂D/∂q = (1-β) log(q/m)    g = (1-β) q (log(q/m) - Σ q log(q/m)),  m = βp + (1-β)q

(for jsd the terms from m cancel: (βp + (1-β)q)/m = 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from src.common import settings


class Divergence(NamedTuple):
    """One divergence. ``weight`` is the β or λ of those that have one.

    Attributes:
        value: ``(log_p, log_q, weight)`` → D; ``(..., V)`` → ``(...)``, differentiable.
        gradient: ``(log_p, log_q, q, weight)`` → D ``(r, 1)`` and g ``(r, V)``; may overwrite its
            arguments. None: autograd of ``value``. Forward KL has a faster form in
            ``src.loss.elementwise``.
        kernel: its number in ``src.loss.kernels``; None: plain PyTorch on a GPU too.
    """

    value: Callable[[Tensor, Tensor, float], Tensor]
    gradient: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] | None = None
    kernel: int | None = None

    def value_and_gradient(
        self, log_p: Tensor, log_q: Tensor, q: Tensor, weight: float
    ) -> tuple[Tensor, Tensor]:
        """Return D ``(r, 1)`` and g ``(r, V)`` at ``r`` positions; arguments may be overwritten."""
        if self.gradient is not None:
            return self.gradient(log_p, log_q, q, weight)
        with torch.enable_grad():
            z = log_q.detach().requires_grad_()
            value = self.value(log_p, z.log_softmax(-1), weight)
            (g,) = torch.autograd.grad(value.sum(), z)
        return wide(value.detach()).unsqueeze(-1), g


def named(name: str) -> Divergence:
    """Return the entry of a divergence. Raises ``ValueError`` where the name is unknown."""
    settings.require_choice("divergence", name, TABLE)
    return TABLE[name]


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor of one number for each position in float64, where the device has it.

    Differences between log-sum-exps lose digits; float64 costs little for so few numbers.
    """
    return tensor if tensor.device.type == "mps" else tensor.double()


def row_sum(tensor: Tensor) -> Tensor:
    """Return the sum over the vocabulary in float64: ``(r, V)`` → ``(r, 1)``."""
    return wide(tensor.sum(-1, keepdim=True))


def _kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p (log p - log q); a p of 0 gives 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p‖q)."""
    return _kl_terms(log_p, log_q).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """Return log(weight · p + (1 - weight) · q)."""
    return torch.logaddexp(log_p + math.log(weight), log_q + math.log1p(-weight))


def _skew_kl(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    return _kl(log_p, _log_mixture(log_p, log_q, weight))


def _jsd(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    log_m = _log_mixture(log_p, log_q, weight)
    return weight * _kl(log_p, log_m) + (1.0 - weight) * _kl(log_q, log_m)


def _reverse_kl_gradient(
    log_p: Tensor, log_q: Tensor, q: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    ratio = torch.where(q > 0, log_q - log_p, 0.0)
    value = row_sum(q * ratio)
    return value, ratio.sub_(value.to(q.dtype)).mul_(q)


def _skew_kl_gradient(
    log_p: Tensor, log_q: Tensor, q: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    log_m = _log_mixture(log_p, log_q, weight)
    value = row_sum(_kl_terms(log_p, log_m))
    ratio = log_p.sub_(log_m).exp_()  # p/m, at most 1/λ
    inner = (q * ratio).sum(-1, keepdim=True)
    return value, ratio.neg_().add_(inner).mul_(q).mul_(1.0 - weight)


def _jsd_gradient(log_p: Tensor, log_q: Tensor, q: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    log_m = _log_mixture(log_p, log_q, weight)
    forward = row_sum(_kl_terms(log_p, log_m))
    ratio = torch.where(q > 0, log_q - log_m, 0.0)
    backward = row_sum(q * ratio)
    g = ratio.sub_(backward.to(q.dtype)).mul_(q).mul_(1.0 - weight)
    return weight * forward + (1.0 - weight) * backward, g


TABLE = {
    "forward_kl": Divergence(lambda log_p, log_q, weight: _kl(log_p, log_q), kernel=1),
    "reverse_kl": Divergence(
        lambda log_p, log_q, weight: _kl(log_q, log_p), _reverse_kl_gradient, kernel=2
    ),
    # Agarwal et al. 2024, arXiv:2306.13649, eq. 1: β KL(p‖m) + (1-β) KL(q‖m).
    "jsd": Divergence(_jsd, _jsd_gradient, kernel=3),
    # Ko et al. 2024, arXiv:2402.03898, eq. 4: KL(p‖m).
    "skew_kl": Divergence(_skew_kl, _skew_kl_gradient, kernel=4),
}
assert tuple(TABLE) == settings.DIVERGENCES

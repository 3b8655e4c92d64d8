"""Measures each predicted token: likelihood, divergence of the two models, confidence.

All logarithms are natural. Sums over proteins of these values are what metrics are computed from.
"""

from __future__ import annotations

from torch import Tensor

from src.loss.reference import at_least_float32, check_vocabularies, divergence, entropy


def token_statistics(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Return the statistics of each predicted token, at temperature 1 and in float32 or better.

    Takes about six times the memory of one model's logits while it works: 1.3 GB for 1,024 tokens
    of ProtGPT2's 50,257.

    Args:
        student_logits: ``(N, V)``.
        teacher_logits: ``(N, V)``.
        targets: ``(N,)`` ids of the true tokens.

    Returns:
        ``(N,)`` each: ``kl`` KL(teacher‖student), ``reverse_kl`` KL(student‖teacher), ``js`` their
        Jensen-Shannon divergence (at most ln 2), ``agree`` (both rank the same token first); and
        for ``student`` and ``teacher`` the keys of :func:`model_statistics` with that ending,
        ``nll_student`` for example.

    Raises:
        ValueError: the vocabularies differ.
    """
    check_vocabularies(student_logits.shape[-1], teacher_logits.shape[-1])
    log_q = at_least_float32(student_logits).log_softmax(-1)  # (N, V)
    log_p = at_least_float32(teacher_logits).log_softmax(-1)
    statistics = {
        # Rounding can push the divergence of two equal distributions a hair below 0.
        "kl": divergence(log_p, log_q, "forward_kl").clamp(min=0),
        "reverse_kl": divergence(log_p, log_q, "reverse_kl").clamp(min=0),
        "js": divergence(log_p, log_q, "jsd", 0.5).clamp(min=0),
        "agree": (log_p.argmax(-1) == log_q.argmax(-1)).to(log_q.dtype),
    }
    for name, log_probs in (("student", log_q), ("teacher", log_p)):
        for key, value in model_statistics(log_probs, targets).items():
            statistics[f"{key}_{name}"] = value
    return statistics


def model_statistics(log_probs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return the statistics of one model at each predicted token.

    Args:
        log_probs: ``(N, V)``.
        targets: ``(N,)``.

    Returns:
        ``(N,)`` each: ``nll`` -log p(target); ``confidence`` max p; ``correct`` (the most probable
        token is the true one); ``brier`` Σ_v (p_v - [v = target])², in [0, 2] (Brier 1950, Monthly
        Weather Review 78:1); ``entropy``.
    """
    confidence, top = log_probs.max(-1)
    picked = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    squares = (2.0 * log_probs).exp().sum(-1)
    return {
        "nll": -picked,
        "confidence": confidence.exp(),
        "correct": (top == targets).to(log_probs.dtype),
        "brier": squares - 2.0 * picked.exp() + 1.0,
        "entropy": entropy(log_probs),
    }

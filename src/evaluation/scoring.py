"""Runs models over proteins: likelihoods, and statistics of each token summed by protein.

Statistics are likelihood, divergence of the two models, and confidence; all logarithms are natural,
and metrics are computed from the sums. Both models see the same whole proteins. Every token after
the first is predicted: residues, line breaks and the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from src.common import processes
from src.common.cli import progress
from src.evaluation.metrics import MODELS
from src.loss.reference import at_least_float32, check_vocabularies, divergence, entropy
from src.models.forward import final_hidden_states, output_head
from src.models.loading import ProteinModel
from src.proteins.batching import TokenSequences, cut_batches, padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}
"""Tokens of a batch with its padding, at most (one protein may exceed it), by kind of device;
larger ones do not fit a CPU's caches and gain no speed there."""
CHUNK_TOKENS = 1024
"""Tokens whose logits exist at a time."""
KEPT = ("confidence", "correct")
"""Statistics that are kept of every token, for calibration."""

Tokens = TokenSequences | Sequence[np.ndarray]
"""Token ids of proteins, by index."""
Proteins = Tokens | Sequence[str]
"""Proteins as token ids or as residues."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How models are measured.

    Attributes:
        batch_size: proteins of a batch, at most.
        max_length: longest protein in tokens; None: what both models can take.
        compute_ece: measure calibration.
        bootstrap: replicates for the intervals; 0: none.
        seed: of shuffling and bootstrap.
        check: stop where the teacher fails its sanity checks.
    """

    batch_size: int = 32
    max_length: int | None = None
    compute_ece: bool = True
    bootstrap: int = 2000
    seed: int = 0
    check: bool = True

    def __post_init__(self) -> None:
        """Check every setting. Raises ``ValueError``."""
        if self.batch_size < 1:
            raise ValueError(f"--batch_size must be at least 1, got {self.batch_size}")
        if self.bootstrap < 0:
            raise ValueError(f"--bootstrap must not be negative, got {self.bootstrap}")


@dataclass
class Scores:
    """Statistics of P proteins with N predicted tokens.

    Attributes:
        sums: ``(P,)`` each, over the protein's tokens: the keys of :func:`token_statistics`.
        tokens: ``(P,)`` predicted tokens.
        targets: ``(N,)`` ids of the tokens that came.
        owners: ``(N,)`` protein of each token.
        confidence: for each model ``(N,)``.
        correct: for each model ``(N,)``.
    """

    sums: dict[str, np.ndarray]
    tokens: np.ndarray
    targets: np.ndarray
    owners: np.ndarray
    confidence: dict[str, np.ndarray]
    correct: dict[str, np.ndarray]


def length_batches(lengths: np.ndarray, batch_size: int, batch_tokens: int) -> list[np.ndarray]:
    """Group sequences of similar length, longest first, so that memory peaks at once.

    Returns:
        Indices of the sequences of each batch; rows × longest stays within ``batch_tokens``
        unless one sequence alone is longer.
    """
    order = np.argsort(-lengths, kind="stable")
    return cut_batches(lengths, order, batch_size, batch_tokens)


def _chunks_of_states(
    models: Sequence[PreTrainedModel],
    proteins: Tokens,
    lengths: np.ndarray,
    settings: EvaluationSettings,
    description: str,
    shared: bool = False,
) -> Iterator[tuple[np.ndarray, Tensor, list[Tensor]]]:
    """Yield, chunk by chunk, the owner of each predicted token, its id, and each model's logits.

    Owners are ``(n,)`` in numpy, targets ``(n,)``, logits ``(n, V)`` in float32. Shared, only this
    process's batches are run.
    """
    heads = [output_head(model) for model in models]
    check_vocabularies(student=models[-1].config.vocab_size, teacher=models[0].config.vocab_size)
    device = models[0].device
    tokens = BATCH_TOKENS.get(device.type, BATCH_TOKENS["cuda"])
    batches = length_batches(lengths, settings.batch_size, tokens)
    if shared:
        batches = processes.mine(batches)
    for batch in progress(batches, len(batches), description, "batches"):
        ids, mask = (t.to(device) for t in padded([proteins[int(i)] for i in batch]))
        predicts = (mask[:, :-1] & mask[:, 1:]).bool()  # (B, T-1)
        targets = ids[:, 1:][predicts]  # (n,)
        owners = batch[predicts.nonzero()[:, 0].cpu().numpy()]
        states = [final_hidden_states(m, ids, mask)[:, :-1][predicts] for m in models]  # (n, E)
        for start in range(0, len(targets), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits = [
                head.logits(state[part]).float()  # (chunk, V)
                for state, head in zip(states, heads, strict=True)
            ]
            yield owners[part], targets[part], logits


@torch.inference_mode()
def protein_nll(
    model: PreTrainedModel,
    proteins: Tokens,
    settings: EvaluationSettings | None = None,
    description: str = "scoring",
    shared: bool = False,
) -> np.ndarray:
    """Return -log p(tokens after the first | the first) of each protein, ``(P,)`` in nats.

    Args:
        model: a causal language model.
        proteins: token ids of each protein.
        settings: batches.
        description: for the progress.
        shared: all processes call this together, and each runs a share of the batches. They are
            the batches of one process, so the sums are its sums, bit by bit.
    """
    settings = settings or EvaluationSettings()
    lengths = np.array([len(proteins[i]) for i in range(len(proteins))])
    total = np.zeros(len(lengths))
    training = model.training
    model.eval()
    for owners, targets, (logits,) in _chunks_of_states(
        [model], proteins, lengths, settings, description, shared
    ):
        nll = F.cross_entropy(logits, targets, reduction="none")
        total += np.bincount(owners, nll.cpu().double().numpy(), minlength=len(total))
    model.train(training)
    return np.sum(processes.gathered(total), axis=0) if shared else total  # 0 in other processes


@torch.inference_mode()
def score_students(
    students: Sequence[PreTrainedModel],
    teacher: PreTrainedModel,
    proteins: Tokens,
    settings: EvaluationSettings | None = None,
) -> list[Scores]:
    """Measure students and their teacher at every predicted token of every protein.

    Args:
        students: causal language models.
        teacher: one with the same vocabulary, on the same device; it runs once for all students.
        proteins: token ids of each protein.
        settings: batches, and whether confidences are kept for calibration.

    Returns:
        For each student sums over each protein, in float64.

    Raises:
        ValueError: the vocabularies differ, or a value is NaN.
    """
    settings = settings or EvaluationSettings()
    lengths = np.array([len(proteins[i]) for i in range(len(proteins))])
    tallies = [_Tally(len(lengths), settings.compute_ece) for _ in students]
    all_targets: list[np.ndarray] = []
    all_owners: list[np.ndarray] = []
    for owners, targets, (teacher_logits, *student_logits) in _chunks_of_states(
        [teacher, *students], proteins, lengths, settings, "evaluating"
    ):
        for tally, logits in zip(tallies, student_logits, strict=True):
            tally.add(owners, token_statistics(logits, teacher_logits, targets))
        if settings.compute_ece:
            all_targets.append(targets.cpu().numpy().astype(np.int32))
            all_owners.append(owners.astype(np.int32))
    joined = _join(all_targets), _join(all_owners)
    return [tally.scores(lengths - 1, *joined) for tally in tallies]


class _Tally:
    """Adds up the statistics of one student, chunk by chunk."""

    def __init__(self, proteins: int, keep: bool) -> None:
        self.proteins = proteins
        self.sums: dict[str, np.ndarray] = {}
        self.kept: dict[str, list[np.ndarray]] = {}
        if keep:
            self.kept = {f"{k}_{m}": [] for k in KEPT for m in MODELS}

    def add(self, owners: np.ndarray, statistics: Mapping[str, Tensor]) -> None:
        """Add the statistics of a chunk's tokens to the sums of their proteins."""
        table = torch.stack(list(statistics.values())).cpu().double().numpy()  # (K, n)
        if np.isnan(table).any():
            raise ValueError("a model's output is not a number: its weights are broken or overflow")
        for name, values in zip(statistics, table, strict=True):
            here = np.bincount(owners, values, minlength=self.proteins)
            self.sums[name] = self.sums[name] + here if name in self.sums else here
        for name, values in self.kept.items():
            values.append(statistics[name].cpu().numpy())

    def scores(self, tokens: np.ndarray, targets: np.ndarray, owners: np.ndarray) -> Scores:
        """Return everything together."""
        joined = {name: _join(values) for name, values in self.kept.items()}
        confidence, correct = (
            {m: joined.get(f"{kind}_{m}", np.zeros(0)) for m in MODELS} for kind in KEPT
        )
        return Scores(self.sums, tokens, targets, owners, confidence, correct)


def _join(pieces: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(pieces) if pieces else np.zeros(0)


# Tokens --------------------------------------------------------------------------------------


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


# Whole proteins ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProteinScores:
    """Likelihoods of P proteins: ``nll`` in nats, ``residues`` and predicted ``tokens``, ``(P,)``.

    The NLL of a protein that does not fit the model or its tokenizer is NaN.
    """

    nll: np.ndarray
    residues: np.ndarray
    tokens: np.ndarray

    @property
    def perplexity_per_residue(self) -> list[float | None]:
        """exp(NLL / residues) of each protein; None where it does not fit the model."""
        values = np.exp(self.nll / self.residues)
        return [float(value) if math.isfinite(value) else None for value in values]


def score_proteins(
    model: PreTrainedModel,
    tokenizer: Any,
    proteins: Sequence[str],
    whole: Sequence[bool] | None = None,
    batch_size: int = 32,
    shared: bool = False,
) -> ProteinScores:
    """Score proteins under a model: -log p(the laid-out protein after its first token | that).

    Line breaks and, of a whole protein, the end are counted.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        proteins: residues of each.
        whole: of each, whether its end counts; None: of all.
        batch_size: proteins scored at a time; they are grouped by length.
        shared: all processes call this together, and each scores a share.

    Returns:
        Their likelihoods: NaN where a protein is longer than the model takes, or its tokens do not
        spell it, which would be another protein's.

    Raises:
        ValueError: the model does not know a token.
    """
    rows, takes = ProteinModel(model, tokenizer).rows(proteins, whole)
    fits, lengths = np.flatnonzero(takes), np.array([len(row) for row in rows], dtype=np.int64)
    nll = np.full(len(rows), np.nan)
    if len(fits):
        settings = EvaluationSettings(batch_size=batch_size)
        nll[fits] = protein_nll(model, [rows[i] for i in fits], settings, shared=shared)
    return ProteinScores(nll, np.array([len(p) for p in proteins]), lengths - 1)

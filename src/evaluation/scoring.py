"""Measures a student beside its teacher on held-out proteins, and refuses to measure nonsense.

Both models see the same whole proteins. Every token after the first is predicted: residues, line
breaks and the end. What is summed over each protein is kept, so that every figure gets an interval
from a bootstrap over clusters of related proteins (``src.evaluation.statistics``).
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from src.common.cli import progress
from src.common.devices import peak_memory
from src.common.files import atomic_write
from src.common.runs import RUN_FILE, read_run
from src.evaluation import metrics
from src.evaluation.results import MODELS, figure, finite_or_none, put_figure
from src.evaluation.statistics import (
    Estimate,
    PairedTest,
    cluster_bootstrap,
    paired_test,
    plain_estimates,
)
from src.loss.reference import check_vocabularies
from src.models.loading import (
    NoTokenizerError,
    count_parameters,
    final_hidden_states,
    load_tokenizer,
    max_positions,
    output_head,
)
from src.models.sizes import threshold_for
from src.proteins.batching import TokenSequences
from src.proteins.layouts import residues_of, shuffled
from src.proteins.ngrams import UNIFORM_NATS, NgramModel, fit_ngrams
from src.proteins.sources import has_split
from src.proteins.splits import CLUSTERS_FILE, read_clusters
from src.proteins.tokens import encode, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECKED_PROTEINS = 200
FLOOR_PROTEINS = 50_000
"""Training proteins, at most, that n-gram floors are fitted on where the caller has more."""
BATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}
"""Tokens of a batch: on a CPU larger ones leave its caches and gain nothing."""
GATE_LEVEL = 0.01
KEPT = ("confidence", "correct")
"""What is kept of every token, for calibration."""

Tokens = TokenSequences | Sequence[np.ndarray]
"""Token ids of proteins, by index."""
Proteins = Tokens | Sequence[str]
"""Proteins as token ids or as residues."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How models are measured.

    Attributes:
        batch_size: proteins of a batch, at most.
        batch_tokens: tokens of a batch with its padding, at most (one protein may exceed it);
            None: what suits the device (:data:`BATCH_TOKENS`).
        chunk_tokens: tokens whose logits exist at a time.
        max_length: longest protein in tokens; None: what both models can take.
        compute_ece: measure calibration.
        bootstrap: replicates for the intervals; 0: none.
        level: of the intervals.
        seed: of shuffling and bootstrap.
        check: stop where the teacher fails its sanity checks.
    """

    batch_size: int = 32
    batch_tokens: int | None = None
    chunk_tokens: int = 1024
    max_length: int | None = None
    compute_ece: bool = True
    bootstrap: int = 2000
    level: float = 0.95
    seed: int = 0
    check: bool = True

    def __post_init__(self) -> None:
        """Check every setting. Raises ``ValueError``."""
        for name in ("batch_size", "batch_tokens", "chunk_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if self.bootstrap < 0:
            raise ValueError(f"--bootstrap must not be negative, got {self.bootstrap}")
        if not 0 < self.level < 1:
            raise ValueError(f"the level of an interval is in (0, 1), got {self.level}")


@dataclass
class Scores:
    """What was measured on each protein; P proteins, N predicted tokens.

    Attributes:
        sums: ``(P,)`` each, over the protein's tokens: the keys of ``metrics.token_statistics``.
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


@dataclass
class Evaluation:
    """The results, ready for ``src.evaluation.results``, and the table of single proteins by column."""

    results: dict[str, Any]
    per_protein: dict[str, Any]


def length_batches(lengths: np.ndarray, batch_size: int, batch_tokens: int) -> list[np.ndarray]:
    """Group sequences of similar length, longest first, so that memory peaks at once.

    Returns:
        Indices of the sequences of each batch; rows × longest stays within ``batch_tokens``
        unless one sequence alone is longer.
    """
    batches = []
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        rows = max(1, min(batch_size, batch_tokens // max(1, int(lengths[order[start]]))))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def _padded(sequences: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask ``(B, T)``, padded on the right with an id never read."""
    width = max(map(len, sequences))
    ids = torch.zeros((len(sequences), width), dtype=torch.long)
    mask = torch.zeros((len(sequences), width), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.as_tensor(np.asarray(sequence, dtype=np.int64))
        mask[row, : len(sequence)] = 1
    return ids.to(device), mask.to(device)


def _chunks_of_states(
    models: Sequence[PreTrainedModel],
    proteins: Tokens,
    lengths: np.ndarray,
    settings: EvaluationSettings,
    description: str,
) -> Iterator[tuple[np.ndarray, Tensor, list[Tensor]]]:
    """Yield, chunk by chunk, the owner of each predicted token, its id, and each model's logits.

    Owners are ``(n,)`` in numpy, targets ``(n,)``, logits ``(n, V)`` in float32.
    """
    heads = [output_head(model) for model in models]
    check_vocabularies(heads[0][0].shape[0], heads[-1][0].shape[0])
    device = heads[0][0].device
    tokens = settings.batch_tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cuda"])
    batches = length_batches(lengths, settings.batch_size, tokens)
    for batch in progress(batches, len(batches), description, "batches"):
        ids, mask = _padded([proteins[int(i)] for i in batch], device)
        predicts = (mask[:, :-1] & mask[:, 1:]).bool()  # (B, T-1)
        targets = ids[:, 1:][predicts]  # (n,)
        owners = batch[predicts.nonzero()[:, 0].cpu().numpy()]
        states = [final_hidden_states(m, ids, mask)[:, :-1][predicts] for m in models]  # (n, E)
        for start in range(0, len(targets), settings.chunk_tokens):
            part = slice(start, start + settings.chunk_tokens)
            logits = [
                F.linear(state[part], weight, bias).float()  # (chunk, V)
                for state, (weight, bias) in zip(states, heads, strict=True)
            ]
            yield owners[part], targets[part], logits


@torch.inference_mode()
def protein_nll(
    model: PreTrainedModel,
    proteins: Tokens,
    settings: EvaluationSettings | None = None,
    description: str = "scoring",
) -> np.ndarray:
    """Return -log p(tokens after the first | the first) of each protein, ``(P,)`` in nats.

    Args:
        model: a causal language model.
        proteins: token ids of each protein.
        settings: batches and chunks.
        description: for the progress.
    """
    settings = settings or EvaluationSettings()
    lengths = np.array([len(proteins[i]) for i in range(len(proteins))])
    total = np.zeros(len(lengths))
    training = model.training
    model.eval()
    for owners, targets, (logits,) in _chunks_of_states(
        [model], proteins, lengths, settings, description
    ):
        nll = F.cross_entropy(logits, targets, reduction="none")
        total += np.bincount(owners, nll.double().cpu().numpy(), minlength=len(total))
    model.train(training)
    return total


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
        settings: batches, chunks, and whether confidences are kept for calibration.

    Returns:
        For each student sums over each protein, in float64.

    Raises:
        ValueError: the vocabularies differ, or a figure is not finite.
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
            tally.add(owners, metrics.token_statistics(logits, teacher_logits, targets))
        if settings.compute_ece:
            all_targets.append(targets.cpu().numpy().astype(np.int32))
            all_owners.append(owners.astype(np.int32))
    joined = _join(all_targets), _join(all_owners)
    return [tally.scores(lengths - 1, *joined) for tally in tallies]


class _Tally:
    """Adds up what is measured of one student, chunk by chunk."""

    def __init__(self, proteins: int, keep: bool) -> None:
        self.proteins = proteins
        self.sums: dict[str, np.ndarray] = {}
        self.kept: dict[str, list[np.ndarray]] = {}
        if keep:
            self.kept = {f"{k}_{m}": [] for k in KEPT for m in MODELS}

    def add(self, owners: np.ndarray, statistics: Mapping[str, Tensor]) -> None:
        """Add a chunk's figures to the proteins that its tokens belong to."""
        table = torch.stack(list(statistics.values())).double().cpu().numpy()  # (K, n)
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


def residues_of_tokens(proteins: Proteins, tokenizer: Any) -> list[str]:
    """Read proteins back from their tokens; proteins that are strings are returned as they are.

    Raises:
        ValueError: the tokens are not those of a laid-out protein, as with a foreign tokenizer.
    """
    found = []
    for index in range(len(proteins)):
        protein = proteins[index]
        if not isinstance(protein, str):
            text = tokenizer.decode(
                [int(i) for i in protein],
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
            )
            try:
                protein = residues_of(text)
            except ValueError as error:
                raise ValueError(
                    f"protein {index + 1} does not read back from its tokens ({error}): "
                    "wrong layout or tokenizer"
                ) from None
            if not protein:
                raise ValueError(f"protein {index + 1} has no residues: wrong tokenizer?")
        found.append(protein)
    return found


def sample(proteins: Proteins, count: int, seed: int) -> list[Any]:
    """Return at most ``count`` proteins, drawn without replacement, in their order."""
    if len(proteins) <= count:
        return [proteins[i] for i in range(len(proteins))]
    chosen = np.random.default_rng(seed).choice(len(proteins), count, replace=False)
    return [proteins[int(i)] for i in np.sort(chosen)]


def floor_nll(
    residues: Sequence[str],
    train: Sequence[str] | None,
    clusters: Sequence[Any],
    seed: int = 0,
) -> tuple[dict[str, np.ndarray], str]:
    """Return each n-gram floor's NLL on each protein, and what it was fitted on.

    Args:
        residues: of the proteins to score.
        train: proteins to fit on. None: each half of the scored proteins is fitted on the other,
            divided by cluster, so that none is scored by a model that has seen a relative.
        clusters: ``(P,)``.
        seed: of the division and of the fit.

    Returns:
        ``unigram``, ``bigram`` and ``trigram`` ``(P,)`` in nats, and ``train`` or ``other half``;
        no floors where there are too few proteins to fit any.
    """
    if train is not None and len(train) >= 2:
        models = fit_ngrams(train, seed=seed)
        return {name: model.nll(residues) for name, model in models.items()}, "train"
    labels = sorted(set(clusters), key=str)
    random.Random(seed).shuffle(labels)
    left = set(labels[: len(labels) // 2])
    inside = np.array([cluster in left for cluster in clusters])
    if min(inside.sum(), (~inside).sum()) < 2:
        return {}, "nothing"
    floors: dict[str, np.ndarray] = {}
    for half in (inside, ~inside):
        fitted = fit_ngrams(_select(residues, ~half), seed=seed)
        for name, model in fitted.items():
            values = floors.setdefault(name, np.zeros(len(residues)))
            values[half] = model.nll(_select(residues, half))
    return floors, "other half"


def _select(items: Sequence[str], chosen: np.ndarray) -> list[str]:
    return [item for item, wanted in zip(items, chosen.tolist(), strict=True) if wanted]


def check_teacher(
    model: PreTrainedModel,
    tokenizer: Any,
    proteins: Tokens,
    train: Proteins | None = None,
    *,
    count: int = CHECKED_PROTEINS,
    seed: int = 0,
    unigram: NgramModel | None = None,
    settings: EvaluationSettings | None = None,
    name: str = "the teacher",
) -> dict[str, Any]:
    """Stop unless a model prefers natural proteins to shuffled ones and beats unigram models.

    A model that does not sees proteins in another layout than it was trained on, or through
    another tokenizer, or is no model of proteins; distilling or measuring it would be worthless.
    Two unigram models are needed: long tokens alone carry so much structure that a model which
    ignores its input can beat the frequencies of residues, and finds shuffled proteins, which take
    more tokens, less likely. It cannot beat the frequencies of tokens.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        proteins: token ids of natural proteins, as they will be used.
        train: training proteins (residues or tokens) that the unigram floor is fitted on; None:
            the checked proteins themselves, which makes the floor a little harder.
        count: proteins checked, at most.
        seed: draws and shuffles them.
        unigram: the floor where it is already fitted.
        settings: batches and chunks.
        name: of the model, for messages.

    Returns:
        ``summary`` (a line for a person); ``natural``, ``shuffled``, ``unigram`` (of residues) and
        ``token_unigram`` in nats for each residue; ``shuffled_minus_natural`` with ``mean``,
        ``low``, ``high``, ``p_value`` and ``pairs`` (nats for each residue, protein by protein);
        ``passed`` (always true).

    Raises:
        ValueError: a check failed, or there are no proteins to check with.
    """
    if not len(proteins):
        raise ValueError("there are no proteins to check the teacher with")
    limit = max_positions(model.config)
    chosen = [ids for ids in sample(proteins, count, seed) if len(ids) <= limit]
    residues = residues_of_tokens(chosen, tokenizer)
    mixtures = encode(tokenizer, [shuffled(r, seed) for r in residues])
    # Shuffled proteins take more tokens: those that no longer fit are left out with their pair.
    fit = [i for i, ids in enumerate(mixtures) if len(ids) <= limit]
    mixtures = [np.asarray(mixtures[i]) for i in fit]
    chosen, residues = [chosen[i] for i in fit], [residues[i] for i in fit]
    if not chosen:
        raise ValueError(f"all proteins are longer than the {limit} tokens that {name} takes")
    lengths = np.array([len(r) for r in residues])
    natural = protein_nll(model, chosen, settings, "natural proteins")
    mixed = protein_nll(model, mixtures, settings, "shuffled proteins")
    fitted_on = residues if train is None or len(train) < 2 else train
    drawn = residues_of_tokens(sample(fitted_on, 5000, seed), tokenizer)
    if unigram is None:
        unigram = fit_ngrams(drawn if len(drawn) > 1 else drawn * 2, seed=seed)["unigram"]
    floor = unigram.nll(residues)
    token_floor = token_unigram_nll(
        chosen, encode(tokenizer, drawn), output_head(model)[0].shape[0]
    )
    test = paired_test((mixed - natural) / lengths)
    per_residue = {
        key: float(values.sum() / lengths.sum())
        for key, values in (
            ("natural", natural),
            ("shuffled", mixed),
            ("unigram", floor),
            ("token_unigram", token_floor),
        )
    }
    figures = (
        f"natural {per_residue['natural']:.3f}, shuffled {per_residue['shuffled']:.3f}, unigram "
        f"floor {per_residue['unigram']:.3f} (of tokens {per_residue['token_unigram']:.3f}) nats "
        f"per residue over {len(residues)} proteins"
    )
    if not all(map(math.isfinite, per_residue.values())):
        raise ValueError(f"{name} gives likelihoods that are not finite: its weights are broken")
    if not (test.difference > 0 and test.p_value < GATE_LEVEL):
        raise ValueError(
            f"{name} does not find natural proteins clearly more likely than shuffled ones "
            f"({figures}; p = {test.p_value:.2g}): wrong layout or tokenizer, or no protein model"
        )
    if per_residue["natural"] >= min(per_residue["unigram"], per_residue["token_unigram"]):
        raise ValueError(
            f"{name} predicts proteins worse than a unigram model does ({figures}): wrong layout "
            "or tokenizer, or no protein model"
        )
    return {
        "summary": f"{name} checked: {figures}",
        "passed": True,
        **per_residue,
        "shuffled_minus_natural": _test_record(test),
    }


def token_unigram_nll(
    proteins: Sequence[np.ndarray], train: Sequence[Sequence[int]], vocab_size: int
) -> np.ndarray:
    """Return the NLL of each protein's tokens after the first by token frequencies, ``(P,)`` nats.

    Args:
        proteins: token ids of each protein to score.
        train: token ids of the proteins whose frequencies are taken, half a count added to each.
        vocab_size: number of tokens.
    """
    counts = np.full(vocab_size, 0.5)
    for row in train:
        counts += np.bincount(np.asarray(row)[1:], minlength=vocab_size)
    log_probs = np.log(counts / counts.sum())
    return np.array([-log_probs[np.asarray(row)[1:]].sum() for row in proteins])


def _test_record(test: PairedTest) -> dict[str, Any]:
    return {
        "mean": test.difference,
        "low": finite_or_none(test.low),
        "high": finite_or_none(test.high),
        "p_value": test.p_value,
        "pairs": test.pairs,
    }


def protein_clusters(
    names: Sequence[str], residues: Sequence[str], table: Mapping[str, str] | None = None
) -> list[str]:
    """Return the cluster of each protein.

    Args:
        names: of the proteins.
        residues: of the proteins.
        table: cluster by name; a protein that is not in it is its own cluster, but exact
            duplicates always share one.
    """
    first: dict[str, str] = {}
    clusters = []
    for name, sequence in zip(names, residues, strict=True):
        cluster = (table or {}).get(name)
        own = first.setdefault(sequence, cluster if cluster is not None else name)
        clusters.append(cluster if cluster is not None else own)
    return clusters


def evaluate(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: Any,
    test: Any,
    settings: EvaluationSettings | None = None,
    *,
    train: Proteins | None = None,
    clusters: Mapping[str, str] | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Measure a student beside its teacher on held-out proteins.

    Args:
        student: a causal language model in eval mode.
        teacher: one with the same vocabulary, on the same device.
        tokenizer: of both.
        test: held-out proteins: token ids by index, with ``len``; ``names`` where they have any.
        settings: what is measured and how.
        train: training proteins, residues or tokens, to fit the n-gram floors on.
        clusters: cluster of related proteins by name.
        announce: called with one line for each stage.

    Returns:
        Results with every key of ``src.evaluation.results`` but ``run``, and the table of single proteins:
        ``protein``, ``cluster``, ``residues``, ``tokens``, ``nll_student``, ``nll_teacher``, ``kl``
        (summed over the protein, in nats). Keys that concern generated proteins are null: see
        :func:`src.evaluation.sequence_quality.measure_generation`.

    Raises:
        ValueError: the teacher fails its checks, the vocabularies differ, or nothing can be scored.
    """
    found = evaluate_students(
        {"student": student},
        teacher,
        tokenizer,
        test,
        settings,
        train=train,
        clusters=clusters,
        announce=announce,
    )
    return found["student"]


def evaluate_students(
    students: Mapping[str, PreTrainedModel],
    teacher: PreTrainedModel,
    tokenizer: Any,
    test: Any,
    settings: EvaluationSettings | None = None,
    *,
    train: Proteins | None = None,
    clusters: Mapping[str, str] | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, Evaluation]:
    """Measure several students beside one teacher, which runs once: :func:`evaluate` for each.

    Args:
        students: causal language models by name.
        teacher: see :func:`evaluate`, as all that follows.
        tokenizer: see there.
        test: see there.
        settings: see there.
        train: see there.
        clusters: see there.
        announce: see there.

    Returns:
        The evaluation of each student.

    Raises:
        ValueError: see there.
    """
    settings = settings or EvaluationSettings()
    started = time.monotonic()
    limit = min(longest(student, teacher, settings) for student in students.values())
    lengths = np.array([len(test[i]) for i in range(len(test))])
    fits = np.flatnonzero(lengths <= limit)
    if not len(fits):
        raise ValueError(f"no protein to evaluate fits {limit} tokens ({len(lengths)} given)")
    proteins = [np.asarray(test[int(i)]) for i in fits]
    all_names = getattr(test, "names", None)
    names = [str(all_names[int(i)]) if all_names is not None else str(i + 1) for i in fits]
    residues = residues_of_tokens(proteins, tokenizer)
    labels = protein_clusters(names, residues, clusters)
    drawn = None
    if train is not None:
        drawn = residues_of_tokens(sample(train, FLOOR_PROTEINS, settings.seed), tokenizer)
    announce("fitting the n-gram floors")
    floors, fitted_on = floor_nll(residues, drawn, labels, settings.seed)
    gates: dict[str, Any] | None = None
    if settings.check:
        announce("checking the teacher on natural and shuffled proteins")
        gates = check_teacher(
            teacher, tokenizer, proteins, drawn, seed=settings.seed, settings=settings
        )
    all_scores = score_students(list(students.values()), teacher, proteins, settings)
    sizes = np.array([len(r) for r in residues])
    if settings.check and "unigram" in floors:
        _check_floor(all_scores[0].sums["nll_teacher"], floors["unigram"], sizes)
    announce(f"intervals over {len(set(labels)):,} clusters")
    device = output_head(teacher)[0].device
    shared = {
        "gates": gates,
        "data": {
            "proteins": len(sizes),
            "too_long": int(len(lengths) - len(fits)),
            "residues": int(sizes.sum()),
            "tokens": int(all_scores[0].tokens.sum()),
            "clusters": len(set(labels)),
            "fingerprint": getattr(test, "fingerprint", None),
        },
    }
    found = {}
    for (name, student), scores in zip(students.items(), all_scores, strict=True):
        results = _describe_student(student, teacher, scores, sizes, floors, labels, settings)
        results["floors"] = _floors(results.get("floors"), fitted_on, drawn)
        results |= shared
        results["performance"] = {
            "device": device.type,
            "seconds": round(time.monotonic() - started, 2),
            "students": len(students),
            "peak_memory_bytes": peak_memory(device),
        }
        table = {
            "protein": names,
            "cluster": labels,
            "residues": sizes,
            "tokens": scores.tokens,
            **{key: scores.sums[key] for key in ("nll_student", "nll_teacher", "kl")},
        }
        found[name] = Evaluation(results, table)
    return found


def _describe_student(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    scores: Scores,
    sizes: np.ndarray,
    floors: Mapping[str, np.ndarray],
    labels: Sequence[Any],
    settings: EvaluationSettings,
) -> dict[str, Any]:
    """Return the figures of one student with their intervals."""
    arrays = {**scores.sums, "tokens": scores.tokens, "residues": sizes}
    arrays |= {f"floor_{name}": values for name, values in floors.items()}
    calibration: dict[str, metrics.CalibrationSums] = {}
    if settings.compute_ece:
        top = int(np.bincount(scores.targets).argmax())
        arrays["most_frequent"] = np.bincount(
            scores.owners[scores.targets == top], minlength=len(sizes)
        )
        for model in MODELS:
            calibration[model] = metrics.CalibrationSums.collect(
                scores.confidence[model], scores.correct[model], scores.owners, len(sizes)
            )
            arrays |= calibration[model].arrays(f"{model}_")
    results = _results(_estimates(arrays, labels, settings), student, teacher)
    for model, sums in calibration.items():
        interval = results["intervals"][f"{model}_ece.accuracy_over_floor"]
        _describe_calibration(results[f"{model}_ece"], sums, interval)
    return results


def _check_floor(teacher: np.ndarray, unigram: np.ndarray, residues: np.ndarray) -> None:
    """Stop where the teacher is worse than the unigram floor over all proteins."""
    mine, floor = teacher.sum() / residues.sum(), unigram.sum() / residues.sum()
    if mine >= floor:
        raise ValueError(
            f"the teacher predicts proteins worse than a unigram model does ({mine:.3f} against "
            f"{floor:.3f} nats per residue): wrong layout or tokenizer, or no protein model"
        )


def figures(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return every figure of a results file that follows from sums over proteins.

    Args:
        sums: ``(R,)`` each (calibration sums have further dimensions), weighted or not.

    Returns:
        ``(R,)`` for each figure's dotted name. A quotient without a denominator is NaN.
    """
    tokens, residues = sums["tokens"], sums["residues"]
    found: dict[str, np.ndarray] = {}
    for model in MODELS:
        nll = sums[f"nll_{model}"]
        found[f"{model}_perplexity"] = np.exp(nll / tokens)
        found[f"{model}_perplexity_per_residue"] = np.exp(nll / residues)
        found[f"{model}_bits_per_residue"] = nll / residues / math.log(2)
        found[f"{model}_nats_per_residue"] = nll / residues
        found[f"{model}_accuracy"] = sums[f"correct_{model}"] / tokens
        found[f"{model}_brier"] = sums[f"brier_{model}"] / tokens
        found[f"{model}_entropy"] = sums[f"entropy_{model}"] / tokens
    gap = sums["nll_student"] - sums["nll_teacher"]
    found["perplexity_ratio"] = np.exp(gap / tokens)
    found["perplexity_ratio_per_residue"] = np.exp(gap / residues)
    for key, name in (("kl", "kl"), ("reverse_kl", "reverse_kl"), ("js", "js")):
        found[f"{name}_divergence"] = sums[key] / tokens
        found[f"{name}_per_residue"] = sums[key] / residues
    found["top1_agreement"] = sums["agree"] / tokens
    for floor in ("unigram", "bigram", "trigram"):
        if f"floor_{floor}" in sums:
            nll = sums[f"floor_{floor}"]
            found[f"floors.{floor}.nats_per_residue"] = nll / residues
            found[f"floors.{floor}.perplexity_per_residue"] = np.exp(nll / residues)
            for model in MODELS:
                found[f"floors.{floor}.{model}_gain"] = (nll - sums[f"nll_{model}"]) / residues
    if "floor_unigram" in sums:
        advantage = sums["floor_unigram"] - sums["nll_teacher"]
        kept = sums["floor_unigram"] - sums["nll_student"]
        positive = advantage > 0
        found["kept_advantage"] = np.where(
            positive, kept / np.where(positive, advantage, 1), np.nan
        )
    if "most_frequent" in sums:
        rate = sums["most_frequent"] / tokens
        for model in MODELS:
            for key, value in metrics.calibration_figures(sums, f"{model}_").items():
                found[f"{model}_ece.{key}"] = value
            found[f"{model}_ece.brier"] = sums[f"brier_{model}"] / tokens
            found[f"{model}_ece.accuracy_floor"] = rate
            found[f"{model}_ece.accuracy_over_floor"] = found[f"{model}_accuracy"] - rate
    return found


def _estimates(
    arrays: Mapping[str, np.ndarray], labels: Sequence[Any], settings: EvaluationSettings
) -> dict[str, Estimate]:
    if settings.bootstrap:
        return cluster_bootstrap(
            figures, arrays, labels, settings.bootstrap, settings.seed, settings.level
        )
    return plain_estimates(figures, arrays, settings.level)


def _results(
    estimates: Mapping[str, Estimate], student: PreTrainedModel, teacher: PreTrainedModel
) -> dict[str, Any]:
    """Lay figures out under their names, with intervals, sizes and the threshold."""
    results: dict[str, Any] = {"perplexity_ratio": None, "kl_divergence": None}
    # Empty, not null, where calibration is not measured: the owner's readers call .get on it.
    results |= {"student_ece": {}, "teacher_ece": {}}
    results["intervals"] = {}
    for name, estimate in estimates.items():
        put_figure(results, name, estimate)
    sizes = {
        model: count_parameters(m) for model, m in (("student", student), ("teacher", teacher))
    }
    share = sizes["student"] / sizes["teacher"]
    bound = threshold_for(share)
    return results | {
        "student_parameters": sizes["student"],
        "teacher_parameters": sizes["teacher"],
        "share_of_teacher": share,
        "compression_ratio": sizes["teacher"] / sizes["student"],
        "threshold": {
            "perplexity_ratio_below": bound,
            "passed": bool(results["perplexity_ratio"] < bound),
            "rule": "5 % of the teacher: 3.0, 11 %: 2.5, 27 %: 2.0; linear between, nearest beyond",
        },
        "kl_from_natural": {"student": None, "teacher": None},
        "kl_from_natural_uniprot": {"student": None, "teacher": None},
        "generation": None,
    }


def _describe_calibration(
    record: dict[str, Any], sums: metrics.CalibrationSums, interval: Sequence[float] | None
) -> None:
    """Add whether calibration means anything, and the curves of the reliability diagram.

    It does where the accuracy beats always naming the most frequent token, beyond chance where
    there is an ``interval`` of the difference: else confidence has nothing to be right about.
    """
    least = record["accuracy_over_floor"] if interval is None else interval[0]
    record["calibration_meaningful"] = bool(least > 0)
    record["bins"] = len(sums.width_edges) - 1
    record["reliability"] = metrics.reliability_curve(sums.width.sum(0), sums.width_edges)
    record["reliability_equal_mass"] = metrics.reliability_curve(sums.mass.sum(0), sums.mass_edges)


def _floors(
    measured: dict[str, Any] | None, fitted_on: str, train: Sequence[str] | None
) -> dict[str, Any]:
    """Describe the floors: their figures, and what they were fitted on."""
    return {
        "fitted_on": fitted_on,
        "fitted_proteins": len(train) if train is not None and fitted_on == "train" else None,
        "uniform": {"nats_per_residue": UNIFORM_NATS, "perplexity_per_residue": 20.0},
        **(measured or {}),
    }


def write_per_protein(path: str | Path, table: Mapping[str, Any]) -> None:
    """Write a table of single proteins as parquet, atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with atomic_write(path, "wb") as handle:
        pq.write_table(pa.table({name: pa.array(values) for name, values in table.items()}), handle)


# What a student's own record says about its teacher and its data


def run_of(folder: str | Path) -> dict[str, Any]:
    """Return the record of the run that made a model; empty where there is none."""
    path = Path(folder) / RUN_FILE
    return read_run(folder) if path.is_file() else {}


def named_teacher(record: Mapping[str, Any]) -> str | None:
    """Return the teacher that a run names."""
    name = figure(record, "teacher.name") or figure(record, "settings.teacher_model")
    return name and os.path.expanduser(name)


def named_data(record: Mapping[str, Any]) -> str | None:
    """Return the data that a run names."""
    source = figure(record, "data.source") or figure(record, "settings.data")
    return source and os.path.expanduser(source)


def choose_split(source: str, wanted: str | None) -> tuple[str | None, bool]:
    """Return the part of a source to evaluate, and whether it has a training part beside it.

    Raises:
        ValueError: the source is not there, or has neither the wanted nor a held-out part.
    """
    if Path(source).is_file():
        if wanted not in (None, "train"):
            raise ValueError(f"{source} is one file and has no part {wanted!r}: leave out --split")
        return None, False
    for part in (wanted,) if wanted else ("test", "validation"):
        if has_split(source, part):
            return part, part != "train" and has_split(source, "train")
    missing = wanted or "test or validation"
    raise ValueError(f"--data {source} has no {missing} part: pass --data with held-out proteins")


def clusters_of(source: str | Path) -> dict[str, str] | None:
    """Return the cluster by name from a directory's table of clusters, None without one.

    Raises:
        ValueError: the table is broken.
    """
    path = Path(source) / CLUSTERS_FILE
    return read_clusters(path) if path.is_file() else None


def shared_tokenizer(student: str, teacher: str) -> Any:
    """Load the teacher's tokenizer, and make sure that the student has no other.

    Raises:
        ValueError: there is none, or the two differ.
    """
    tokenizer = load_tokenizer(teacher)
    try:
        own = load_tokenizer(student)
    except NoTokenizerError:
        return tokenizer  # weights alone: vocabularies are compared later
    if tokenizer_fingerprint(own) != tokenizer_fingerprint(tokenizer):
        raise ValueError(
            f"{student} and {teacher} have different tokenizers: their likelihoods cannot be "
            "compared; is --teacher_model the one that the student was distilled from?"
        )
    return tokenizer


def longest(
    student: PreTrainedModel, teacher: PreTrainedModel, settings: EvaluationSettings
) -> int:
    """Return the longest protein, in tokens, that both models take and the settings allow."""
    limit = min(max_positions(student.config), max_positions(teacher.config))
    return min(limit, settings.max_length or limit)

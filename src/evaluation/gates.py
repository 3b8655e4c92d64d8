"""Checks that a teacher is a model of proteins: natural against shuffled, and n-gram floors."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from src.evaluation.results import finite_or_none
from src.evaluation.scoring import EvaluationSettings, Proteins, Tokens, protein_nll
from src.evaluation.statistics import Estimate, mean_interval
from src.models.forward import stated_positions
from src.proteins.encoding import decode, encode
from src.proteins.layouts import shuffled
from src.proteins.ngrams import UNIFORM_NATS, fit_ngrams
from src.proteins.relatives import relatives_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_FAMILIES = 5
"""Families that a t test of the check is made over; intervals of fewer cover too little."""
CHECKED_PROTEINS = 200
FLOOR_PROTEINS = 50_000
"""Training proteins, at most, that n-gram floors are fitted on."""
GATE_LEVEL = 0.01
KNOWS_NOTHING = 0.98
"""A model knows nothing of proteins if its NLL is above this share of a uniform guess's."""
WRONG = "wrong layout or tokenizer, or no protein model (--skip_teacher_check goes on all the same)"


def residues_of_tokens(proteins: Proteins, tokenizer: Any) -> list[str]:
    """Read proteins back from their tokens; proteins that are strings are returned as they are.

    Raises:
        ValueError: the tokens are not those of a laid-out protein, as with a foreign tokenizer.
    """
    sequences = []
    for index in range(len(proteins)):
        protein = proteins[index]
        if not isinstance(protein, str):
            try:
                protein = decode(tokenizer, [int(i) for i in protein])
            except ValueError as error:
                raise ValueError(
                    f"protein {index + 1} does not read back from its tokens ({error}): "
                    "wrong layout or tokenizer"
                ) from None
            if not protein:
                raise ValueError(f"protein {index + 1} has no residues: wrong tokenizer?")
        sequences.append(protein)
    return sequences


def draw_proteins(proteins: Proteins, count: int, seed: int) -> list[Any]:
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
    """Return each n-gram floor's NLL on each protein, and the name of the data it was fitted on.

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


def _pairs(
    model: PreTrainedModel, tokenizer: Any, proteins: Sequence[np.ndarray], seed: int
) -> tuple[list[np.ndarray], list[str], list[np.ndarray]]:
    """Return tokens and residues of the proteins that fit, and tokens of the same shuffled."""
    limit = stated_positions(model.config) or max(map(len, proteins), default=0)
    chosen = [ids for ids in proteins if len(ids) <= limit]
    residues = residues_of_tokens(chosen, tokenizer)
    mixtures = encode(tokenizer, [shuffled(r, seed) for r in residues])
    # Shuffled proteins take more tokens: those that no longer fit are left out with their pair.
    fit = [i for i, ids in enumerate(mixtures) if len(ids) <= limit]
    mixtures = [np.asarray(mixtures[i]) for i in fit]
    chosen, residues = [chosen[i] for i in fit], [residues[i] for i in fit]
    if not chosen:
        raise ValueError(f"all proteins are longer than the {limit} tokens that the teacher takes")
    return chosen, residues, mixtures


def _likelihoods(
    model: PreTrainedModel,
    tokenizer: Any,
    proteins: Tokens,
    train: Proteins | None,
    seed: int,
    settings: EvaluationSettings | None,
) -> tuple[dict[str, np.ndarray], list[str], np.ndarray]:
    """Return the NLLs ``(P,)`` of the checked proteins, their residues, and their tokens."""
    checked = draw_proteins(proteins, CHECKED_PROTEINS, seed)
    chosen, residues, mixtures = _pairs(model, tokenizer, checked, seed)
    fitted_on = residues if train is None or len(train) < 2 else train
    drawn = residues_of_tokens(draw_proteins(fitted_on, 5000, seed), tokenizer)
    unigram = fit_ngrams(drawn if len(drawn) > 1 else drawn * 2, seed=seed)["unigram"]
    vocabulary = int(model.config.vocab_size)
    nll = {
        "natural": protein_nll(model, chosen, settings, "natural proteins"),
        "shuffled": protein_nll(model, mixtures, settings, "shuffled proteins"),
        "unigram": unigram.nll(residues),
        "token_unigram": token_unigram_nll(chosen, encode(tokenizer, drawn), vocabulary),
    }
    return nll, residues, np.array([len(ids) - 1 for ids in chosen])


def check_teacher(
    model: PreTrainedModel,
    tokenizer: Any,
    proteins: Tokens,
    train: Proteins | None = None,
    *,
    cluster_of: Mapping[str, str] | None = None,
    seed: int = 0,
    settings: EvaluationSettings | None = None,
) -> dict[str, Any]:
    """Refuse a teacher that certainly does not know natural proteins from shuffled ones.

    Such a model has the wrong layout or tokenizer, or is not a model of proteins. It is refused if
    it prefers its own shuffled proteins beyond doubt, or predicts no better than a uniform guess
    among its tokens. Relatives count once in all this: a model that is wrong about one protein is
    wrong about all its variants. A model that prefers natural proteins and beats both unigram
    models passes; otherwise the check cannot tell, as with short peptides, which have little order
    to know. Two unigram models are needed: tokens of several residues carry so much structure that
    a model which ignores its input can beat the frequencies of residues, and shuffled proteins take
    more tokens. Such a model cannot beat the frequencies of tokens.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        proteins: token ids of natural proteins, as they will be used.
        train: training proteins (residues or tokens) that the unigram floor is fitted on; None:
            the checked proteins themselves, which makes the floor a little harder.
        cluster_of: family or cluster by residues. Without it, and where there are fewer than five,
            relatives are found by their words, from some 74 % identity on.
        seed: draws and shuffles the proteins.
        settings: batches.

    Returns:
        ``summary`` (one line of text); ``natural``, ``shuffled``, ``unigram`` (of residues) and
        ``token_unigram`` in nats per residue; ``shuffled_minus_natural``, nats per residue of each
        protein, averaged over each group of relatives, then over ``groups`` of them: ``mean``,
        95 % interval ``low`` to ``high`` (Student's), one-sided ``p_value`` of the paired t test
        (the last three null with one group), and the number of proteins, ``pairs``; ``passed``
        (False where the check cannot tell).

    Raises:
        ValueError: the model is refused, or there are no proteins to check with.
    """
    if not len(proteins):
        raise ValueError("there are no proteins to check the teacher with")
    nll, residues, tokens = _likelihoods(model, tokenizer, proteins, train, seed, settings)
    lengths = np.array([len(r) for r in residues])
    per_residue = {key: float(v.sum() / lengths.sum()) for key, v in nll.items()}
    values = (
        f"natural {per_residue['natural']:.3f}, shuffled {per_residue['shuffled']:.3f}, unigram "
        f"floor {per_residue['unigram']:.3f} (of tokens {per_residue['token_unigram']:.3f}) nats "
        f"per residue over {len(lengths)} proteins"
    )
    if not all(map(math.isfinite, per_residue.values())):
        raise ValueError(
            "the teacher gives likelihoods that are not finite: its weights are broken"
        )
    vocabulary = int(model.config.vocab_size)
    guess = KNOWS_NOTHING * math.log(vocabulary) * tokens
    labels = [] if cluster_of is None else [cluster_of[r] for r in residues]
    families, groups = np.unique(labels, return_inverse=True)
    if len(families) < LEAST_FAMILIES:
        groups = relatives_of(residues)
    better = _group_means((nll["shuffled"] - nll["natural"]) / lengths, groups)
    ignorant = _group_means((nll["natural"] - guess) / lengths, groups)
    p_better, p_worse, p_ignorant = map(_p_above_zero, (better, -better, ignorant))
    if p_worse < GATE_LEVEL:
        raise ValueError(
            f"the teacher finds natural proteins less likely than shuffled ones ({values}; "
            f"p = {p_worse:.2g}): {WRONG}"
        )
    if p_ignorant < GATE_LEVEL:
        raise ValueError(
            f"the teacher predicts proteins no better than guessing among its {vocabulary:,} "
            f"tokens does ({values}): {WRONG}"
        )
    prefers = p_better < GATE_LEVEL
    beaten_by_unigram = per_residue["natural"] >= min(
        per_residue["unigram"], per_residue["token_unigram"]
    )
    mean = Estimate(float(better.mean()), math.nan, math.nan)
    if len(better) > 1:
        mean = mean_interval(better)
    return {
        "summary": _summary(values, prefers, beaten_by_unigram, len(lengths)),
        "passed": prefers and not beaten_by_unigram,
        **per_residue,
        "shuffled_minus_natural": {
            "mean": mean.estimate,
            "low": finite_or_none(mean.low),
            "high": finite_or_none(mean.high),
            "p_value": finite_or_none(p_better),
            "groups": len(better),
            "pairs": len(lengths),
        },
    }


def _p_above_zero(values: np.ndarray) -> float:
    """Return the p-value of values ``(n,)`` being above 0 on average (one-sided t test).

    NaN, which is below no level, for a single value or where all are 0.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of one value, or of equal ones
        test: Any = stats.ttest_1samp(values, 0, alternative="greater")
    return float(test.pvalue)


def _group_means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the mean of the values ``(P,)`` over the proteins of each group."""
    return np.bincount(groups, values) / np.bincount(groups)


def _summary(values: str, prefers: bool, beaten_by_unigram: bool, pairs: int) -> str:
    """Return the outcome of a check in one line."""
    if not prefers:
        few = pairs < CHECKED_PROTEINS
        why = "too few or too short proteins to tell" if few else "cannot tell"
        return f"the teacher checked, {why} whether it knows proteins of this kind: {values}"
    if beaten_by_unigram:
        return (
            "the teacher checked: it prefers natural proteins, but predicts them worse than a "
            f"unigram model does: weak for these, or in another layout: {values}"
        )
    return f"the teacher checked: {values}"


def token_unigram_nll(
    proteins: Sequence[np.ndarray], train: Sequence[Sequence[int]], vocab_size: int
) -> np.ndarray:
    """Return the NLL of each protein's tokens after the first by token frequencies, ``(P,)`` nats.

    Frequencies are those of the proteins ``train``, half a count added to each.
    """
    counts = np.full(vocab_size, 0.5)
    for row in train:
        counts += np.bincount(np.asarray(row)[1:], minlength=vocab_size)
    log_probs = np.log(counts / counts.sum())
    return np.array([-log_probs[np.asarray(row)[1:]].sum() for row in proteins])


def floors_record(
    measured: dict[str, Any] | None, fitted_on: str, train: Sequence[str] | None
) -> dict[str, Any]:
    """Return the floors' metrics and the data that they were fitted on."""
    return {
        "fitted_on": fitted_on,
        "fitted_proteins": len(train) if train is not None and fitted_on == "train" else None,
        "uniform": {"nats_per_residue": UNIFORM_NATS, "perplexity_per_residue": 20.0},
        **(measured or {}),
    }

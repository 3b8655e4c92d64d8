"""The evaluator against what must come out whatever the data (docs: the experiment's sanity list).

Beside these: duplicated data leave clustered intervals unchanged, natural proteins beat shuffled
ones, a broken layout and a teacher below the unigram floor are stopped (tests/test_evaluation.py).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from src.evaluation import scoring as e

RESIDUES = 20
MARKER = 20
FAR = -1e4


def uniform_model(residues: int = RESIDUES) -> GPT2LMHeadModel:
    """Return a GPT-2 that gives each of the first tokens the same share, and others none.

    Its last norm returns the first unit vector whatever came in, and the head (tied to the
    embedding) reads off that vector: 0 for a residue, far below for the marker.
    """
    config = GPT2Config(
        vocab_size=22,
        n_positions=64,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=20,
        eos_token_id=20,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()[0] = 1
        model.transformer.wte.weight[:, 0] = FAR
        model.transformer.wte.weight[:residues, 0] = 0
    return model


@pytest.fixture
def rows() -> list[np.ndarray]:
    """Proteins of one token a residue after the marker, without an end to predict."""
    rng = np.random.default_rng(0)
    return [
        np.concatenate([[MARKER], rng.integers(0, RESIDUES, length)]).astype(np.int64)
        for length in (1, 7, 30, 63, 12)
    ]


def test_a_uniform_model_is_twenty_for_each_residue(rows):
    residues = np.array([len(row) - 1 for row in rows])
    nll = e.protein_nll(uniform_model(), rows)
    assert np.exp(nll / residues) == pytest.approx(20, rel=1e-6)
    (scores,) = e.score_students([uniform_model()], uniform_model(), rows)
    assert scores.tokens.tolist() == residues.tolist()
    for model in ("student", "teacher"):
        nll = scores.sums[f"nll_{model}"].sum()
        assert np.exp(nll / residues.sum()) == pytest.approx(20, rel=1e-6)


def test_a_model_of_fewer_residues_is_not_twenty(rows):
    """The figure above is the model's, not a constant."""
    residues = np.array([len(row) - 1 for row in rows])
    some = [np.where(row == MARKER, MARKER, row % 5) for row in rows]
    nll = e.protein_nll(uniform_model(5), some)
    assert np.exp(nll / residues) == pytest.approx(5, rel=1e-6)


def test_the_end_costs_what_the_model_gives_it(rows):
    """With the end predicted by a model that shares it in, 20 becomes 21 for each token."""
    model = uniform_model(RESIDUES + 1)  # the marker is token 20
    ended = [np.append(row, MARKER) for row in rows[:3]]
    nll = e.protein_nll(model, ended)
    assert nll == pytest.approx([(len(row) - 1) * math.log(21) for row in ended], rel=1e-6)

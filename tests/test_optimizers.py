"""Muon beside AdamW: which parameters go where, and what a step does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from src.distillation import DistillationTrainer
from src.trainer.optimizers import ADAMW_BETAS, block_matrices, muon_with_adamw

RATES = {"learning_rate": 0.02, "other_learning_rate": 0.003, "weight_decay": 0.1}


@pytest.fixture(params=["gpt2", "llama"])
def model(request, tiny_lm, tiny_llama) -> Any:
    return {"gpt2": tiny_lm, "llama": tiny_llama}[request.param]()


def test_matrices_inside_the_blocks_go_to_muon_and_the_rest_to_adamw(model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = muon_with_adamw(model, **RATES)
    matrices, others = [
        {names[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups
    ]
    assert matrices == block_matrices(model)
    assert matrices | others == set(names.values())
    assert not matrices & others
    assert all(".h." in name or ".layers." in name for name in matrices)
    assert all(model.get_parameter(name).ndim == 2 for name in matrices)
    assert not any(part in name for name in matrices for part in ("wte", "embed", "lm_head", "ln"))
    assert any("attn" in name for name in matrices)
    assert any("mlp" in name for name in matrices)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.003]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_without_a_rate_of_their_own_the_others_take_that_of_muon(tiny_lm):
    optimizer = muon_with_adamw(tiny_lm(), 0.02, None, 0.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.02]


def set_gradients(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_steps_equal_those_of_both_optimisers_alone(model):
    other = copy.deepcopy(model)
    together = muon_with_adamw(model, **RATES)
    inside = block_matrices(other)
    named = list(other.named_parameters())
    muon = torch.optim.Muon(
        [p for n, p in named if n in inside],
        lr=0.02,
        weight_decay=0.1,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [p for n, p in named if n not in inside], lr=0.003, weight_decay=0.0, betas=ADAMW_BETAS
    )
    for seed in range(3):
        for trained in (model, other):
            set_gradients(trained, seed)
        together.step()
        muon.step()
        adamw.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_unknown_optimiser_is_refused(tiny_lm):
    with pytest.raises(ValueError, match="optimizer must be one of adamw, muon"):
        DistillationTrainer(model=tiny_lm(), alpha=1.0, optimizer="lion")

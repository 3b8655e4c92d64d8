"""Students cut from larger models: exact where nothing is lost, best approximations elsewhere."""

from __future__ import annotations

import pytest
import torch

from src.models.initialisation import low_rank, picked_layers, subclone


def randomised(model):
    """Give norms and biases values that matter."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def test_a_student_of_the_same_shape_computes_the_same(tiny_lm):
    large, small = randomised(tiny_lm(n_layer=3, n_embd=24, seed=1)), tiny_lm(3, 2, 24, seed=2)
    subclone(large, small)
    ids = torch.randint(0, 60, (3, 25))
    with torch.no_grad():
        assert torch.allclose(small(ids).logits, large(ids).logits, atol=1e-4)


def test_layers_that_are_picked_are_copied(tiny_lm):
    large, small = randomised(tiny_lm(n_layer=5, n_embd=24, seed=1)), tiny_lm(3, 2, 24, seed=2)
    subclone(large, small)
    for target, source in zip(small.transformer.h, (0, 2, 4), strict=True):
        for ours, theirs in zip(
            target.mlp.parameters(), large.transformer.h[source].mlp.parameters(), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_features_and_heads_of_no_use_are_the_ones_left_out(tiny_lm):
    """A model padded with dead features, neurons and a dead head is cut back to what it was."""
    small = randomised(tiny_lm(n_layer=2, n_head=2, n_embd=16, seed=4))
    large = tiny_lm(n_layer=2, n_head=3, n_embd=24, seed=5)
    torch.nn.init.zeros_(large.transformer.wte.weight)
    with torch.no_grad():
        for parameter in large.parameters():
            parameter.zero_()
        body, source = large.transformer, small.transformer
        body.wte.weight[:, :16] = source.wte.weight
        for block, cut in zip(body.h, source.h, strict=True):
            for norm in ("ln_1", "ln_2"):
                getattr(block, norm).weight[:16] = getattr(cut, norm).weight
            for part in range(3):
                block.attn.c_attn.weight[:16, part * 24 : part * 24 + 16] = cut.attn.c_attn.weight[
                    :, part * 16 : part * 16 + 16
                ]
            block.attn.c_proj.weight[:16, :16] = cut.attn.c_proj.weight
            block.mlp.c_fc.weight[:16, :64] = cut.mlp.c_fc.weight
            block.mlp.c_proj.weight[:64, :16] = cut.mlp.c_proj.weight
    back = tiny_lm(n_layer=2, n_head=2, n_embd=16, seed=6)
    subclone(large, back)
    assert torch.equal(back.transformer.wte.weight, source.wte.weight)
    for ours, theirs in zip(back.transformer.h, source.h, strict=True):
        assert torch.equal(ours.mlp.c_fc.weight, theirs.mlp.c_fc.weight)
        for head in range(2):
            where = slice(head * 8, head * 8 + 8)
            query, key, _ = ours.attn.c_attn.weight.split(16, 1)
            q, k, _ = theirs.attn.c_attn.weight.split(16, 1)
            ours_scores = query[:, where] @ key[:, where].t()
            assert torch.allclose(ours_scores, q[:, where] @ k[:, where].t(), atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_low_rank_is_the_best_there_is(rank):
    torch.manual_seed(0)
    left, right = torch.randn(7, 4).double(), torch.randn(4, 9).double()
    a, b = low_rank(left, right, rank)
    singular = torch.linalg.svdvals(left @ right)
    error = (a @ b - left @ right).norm()
    assert error.item() == pytest.approx(singular[rank:].norm().item(), abs=1e-9)


def test_layers_span_the_model():
    assert picked_layers(12, 4) == [0, 4, 7, 11]
    assert picked_layers(4, 4) == [0, 1, 2, 3]
    assert picked_layers(3, 1) == [0]


def test_a_student_cannot_grow(tiny_lm):
    with pytest.raises(ValueError, match="n_layer is 2, the student's 3"):
        subclone(tiny_lm(2), tiny_lm(3))
    with pytest.raises(ValueError, match="same vocabulary"):
        subclone(tiny_lm(), tiny_lm(vocab_size=32))


def test_a_student_that_is_cut_starts_better_than_a_random_one(tiny_lm):
    """Of a model that has learned something: a cycle of tokens."""
    ids = (torch.arange(64) % 7 + 1).repeat(4, 1)
    large = tiny_lm(n_layer=3, n_head=2, n_embd=32, seed=0, initializer_range=0.02).train()
    optimizer = torch.optim.AdamW(large.parameters(), 3e-3)
    for _ in range(60):
        large(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    losses = []
    for cut in (True, False):
        small = tiny_lm(n_layer=2, n_head=2, n_embd=24, seed=1, initializer_range=0.02)
        if cut:
            subclone(large, small)
        with torch.no_grad():
            losses.append(small(ids, labels=ids).loss.item())
    assert losses[0] < losses[1] - 0.5

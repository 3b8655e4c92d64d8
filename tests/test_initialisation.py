"""Students cut from larger models: exact where nothing is lost, best approximations elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from src.models.initialisation import (
    CALIBRATION_TOKENS,
    calibration_batch,
    corrected,
    cut,
    low_rank,
    picked_layers,
    principal_map,
    roots,
)


def randomised(model):
    """Give norms and biases values that matter."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def proteins(count=30, length=25, vocabulary=60, seed=0):
    return list(np.random.default_rng(seed).integers(0, vocabulary, (count, length)))


def test_a_student_of_the_same_shape_computes_the_same(tiny_lm):
    large, small = randomised(tiny_lm(n_layer=3, n_embd=24, seed=1)), tiny_lm(3, 2, 24, seed=2)
    cut(large, small, proteins())
    ids = torch.randint(0, 60, (3, 25))
    with torch.no_grad():
        assert torch.allclose(small(ids).logits, large(ids).logits, atol=1e-3)


@pytest.fixture(scope="module")
def taught(tiny_lm):
    """A model of two heads and 32 features that has learned cycles of tokens of several lengths."""
    rng = np.random.default_rng(0)
    rows = [(np.arange(48) + rng.integers(9)) % rng.integers(5, 9) + 1 for _ in range(64)]
    ids = torch.as_tensor(np.array(rows))
    large = tiny_lm(n_layer=4, n_head=2, n_embd=32, seed=0, initializer_range=0.02).train()
    optimizer = torch.optim.AdamW(large.parameters(), 3e-3)
    for _ in range(80):
        large(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return large.eval(), rows  # cutting leaves it as it is


def divergence(large, small, rows):
    ids = torch.as_tensor(np.array(rows))
    with torch.no_grad():
        theirs, ours = (model(ids).logits.log_softmax(-1) for model in (large, small))
    return (theirs.exp() * (theirs - ours)).sum(-1).mean().item()


@pytest.mark.parametrize("shape", [(2, 2, 32), (4, 2, 24), (4, 1, 24), (2, 2, 16)])
def test_a_student_that_is_cut_is_close_to_its_teacher(tiny_lm, taught, shape):
    """Fewer layers, features or heads: far closer than random weights, without any training."""
    large, rows = taught
    small = tiny_lm(*shape, seed=1, initializer_range=0.02)
    before = divergence(large, small, rows)
    cut(large, small, rows)
    assert divergence(large, small, rows) < 0.25 * before


def test_a_head_may_be_wider_than_the_teachers(tiny_lm, taught):
    """Dimensions that the teacher has not are zero in keys, so that they change no score."""
    large, rows = taught
    small = tiny_lm(4, 1, 28, seed=1)
    cut(large, small, rows)
    assert all(torch.isfinite(parameter).all() for parameter in small.parameters())
    keys = small.transformer.h[0].attn.c_attn.weight.chunk(3, 1)[1]
    assert torch.equal(keys[:, 16:], torch.zeros(28, 12))


def test_principal_directions_keep_the_variance_and_the_mean_of_zero():
    generator = torch.Generator().manual_seed(0)
    inside = torch.randn(500, 5, generator=generator, dtype=torch.float64)
    stream = inside @ torch.randn(5, 12, generator=generator, dtype=torch.float64)
    stream = stream - stream.mean(-1, keepdim=True)
    mapped = stream @ principal_map(stream.t() @ stream, 6)
    assert mapped.mean(-1).abs().max() < 1e-9
    assert torch.allclose(mapped.norm(dim=-1), stream.norm(dim=-1))
    assert torch.equal(principal_map(stream.t() @ stream, 12), torch.eye(12, dtype=torch.float64))


def test_a_fit_is_least_squares_and_leaves_what_is_right():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 6, generator=generator)
    weight, bias = torch.randn(6, 3, generator=generator), torch.randn(3, generator=generator)
    targets = inputs @ weight + bias
    kept = corrected(inputs, targets, weight, bias)
    assert torch.allclose(kept[0], weight, atol=1e-5)
    found = corrected(inputs, targets, torch.zeros(6, 3), torch.zeros(3))
    assert torch.allclose(found[0], weight, atol=1e-2)
    assert torch.allclose(found[1], bias, atol=1e-2)


def test_roots_are_of_the_second_moments():
    inputs = torch.randn(300, 4, dtype=torch.float64)
    root, inverse = roots(inputs)
    features = torch.cat([inputs, torch.ones(300, 1, dtype=torch.float64)], 1)
    assert torch.allclose(root @ root, features.t() @ features / 300)
    assert torch.allclose(root @ inverse, torch.eye(5, dtype=torch.float64))


def test_calibration_takes_as_many_tokens_as_it_needs():
    ids, valid = calibration_batch(proteins(count=900, length=50), 40)
    assert ids.shape == (-(-CALIBRATION_TOKENS // 40), 40)
    ids, valid = calibration_batch([np.arange(5), np.arange(3)], 4)
    assert valid.sum(1).tolist() == [4, 3]


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
        cut(tiny_lm(2), tiny_lm(3), proteins())
    with pytest.raises(ValueError, match="n_inner is 40, the student's 64"):
        cut(tiny_lm(n_inner=40), tiny_lm(), proteins())
    with pytest.raises(ValueError, match="same vocabulary"):
        cut(tiny_lm(), tiny_lm(vocab_size=32), proteins())

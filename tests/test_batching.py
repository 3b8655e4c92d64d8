"""Batches: nothing lost, nothing mixed, the same order for the same seed and epoch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_runs import Tokens

from src.loss.reference import segments_from_positions, valid_positions
from src.proteins.batching import (
    EpochSampler,
    PackedDataset,
    PackingCollator,
    PaddingCollator,
    ProteinDataset,
    cut_batches,
    length_grouped_order,
    pack,
)


@pytest.mark.parametrize("seed", range(5))
def test_packing_keeps_every_protein_once_and_whole(seed):
    tokens = Tokens(300, seed=seed)
    rows = pack(tokens.lengths, 64, seed, window=100)
    assert sorted(np.concatenate(rows).tolist()) == list(range(300))
    assert max(tokens.lengths[row].sum() for row in rows) <= 64
    # First fit, longest first, wastes little: never half a row on average.
    assert tokens.lengths.sum() > 0.8 * 64 * len(rows)


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="--max_length"):
        pack(np.array([5, 70]), 64)


@pytest.mark.parametrize("count", [1, 7, 64, 401])
def test_grouped_order_is_a_permutation_with_little_padding(count):
    lengths = Tokens(count, 10, 500).lengths
    order = length_grouped_order(lengths, 8, seed=3, epoch=1)
    assert sorted(order.tolist()) == list(range(count))
    assert np.array_equal(order, length_grouped_order(lengths, 8, seed=3, epoch=1))
    if count > 300:
        assert not np.array_equal(order, length_grouped_order(lengths, 8, seed=3, epoch=2))
        assert padding_share(lengths, order) < 0.3 * padding_share(lengths, np.arange(count))


def padding_share(lengths, order):
    """Return the share of padding in batches of 8 taken in an order."""
    batches = [lengths[list(order[i : i + 8])] for i in range(0, len(order), 8)]
    return 1 - lengths.sum() / sum(b.max() * len(b) for b in batches)


def test_sampler_follows_the_epoch():
    epoch = 0
    sampler = EpochSampler(np.arange(1, 100), 4, seed=1, epoch=lambda: epoch)
    first = list(sampler)
    assert first == list(sampler)
    epoch = 1
    assert first != list(sampler)
    assert sorted(sampler) == list(range(99))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    dataset = ProteinDataset(Tokens(9))
    batch = PaddingCollator(pad_token_id=7, side=side)([dataset[i] for i in range(9)])
    assert batch["input_ids"].shape[1] == max(len(dataset[i]["input_ids"]) for i in range(9))
    for row in range(9):
        real = batch["attention_mask"][row].bool()
        ids = torch.as_tensor(dataset[row]["input_ids"])
        assert torch.equal(batch["input_ids"][row][real], ids)
        assert torch.equal(batch["labels"][row][real], ids)
        assert (batch["labels"][row][~real] == -100).all()
        assert real[0 if side == "right" else -1]


def test_packed_batch_predicts_what_single_proteins_predict():
    tokens = Tokens(20)
    dataset = PackedDataset(tokens, row_tokens=64)
    batch = PackingCollator(0, 64)([dataset[i] for i in range(len(dataset))])
    assert "attention_mask" not in batch
    valid = valid_positions(batch["labels"], None, segments_from_positions(batch["position_ids"]))
    assert valid.sum().item() == (tokens.lengths - 1).sum()
    pairs = {
        (int(a), int(b))
        for a, b in zip(
            batch["input_ids"][:, :-1][valid], batch["labels"][:, 1:][valid], strict=True
        )
    }
    expected = {(int(a), int(b)) for row in tokens.rows for a, b in zip(row, row[1:], strict=False)}
    assert pairs == expected


def test_padding_side_is_checked():
    with pytest.raises(ValueError, match="side"):
        PaddingCollator(0, side="top")


@pytest.mark.parametrize("seed", range(5))
def test_batches_are_cut_as_large_as_allowed(seed):
    lengths = Tokens(200, seed=seed).lengths
    for order in (np.argsort(-lengths, kind="stable"), np.argsort(lengths, kind="stable")):
        batches = cut_batches(lengths, order, rows=9, tokens=120)
        assert np.array_equal(np.concatenate(batches), order)
        for batch, after in zip(batches, [*batches[1:], None], strict=True):
            assert len(batch) <= 9
            assert len(batch) * lengths[batch].max() <= 120 or len(batch) == 1
            if after is not None and len(batch) < 9:
                longest = max(lengths[batch].max(), lengths[after[0]])
                assert (len(batch) + 1) * longest > 120

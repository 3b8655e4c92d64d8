"""Log-likelihoods of many variants of one protein, and of proteins longer than the model.

Variants share their beginning with the wild type. What the model made of that is computed once; of
a variant only the tokens from its first difference on are, so that a saturation scan costs half.

A protein that is longer than the model is cut into windows that overlap by half. A residue's
likelihood comes from the window that shows the model most of what stands before it. Windows begin
at a line of the layout, and the model takes a window's beginning for that of a protein: the first
residues of a window are worse than they would be in the whole, which is why they are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from src.common import processes
from src.common.cli import progress
from src.models.decoding import cache_argument
from src.models.forward import accepts, stated_positions
from src.models.loading import ProteinModel
from src.proteins.batching import cut_batches, padded
from src.proteins.encoding import Spelling, encode
from src.proteins.layouts import RESIDUES_PER_LINE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_ROWS = 64
BATCH_TOKENS = 2048
BATCH_LOGITS = 1 << 25
"""Tokens of a batch, at most, and logits that exist at a time (128 MB)."""
WINDOW_TOKENS = 1024
"""Window of a model that states no longest input."""


def variant_nll(loaded: ProteinModel, wild: str, variants: Sequence[str]) -> np.ndarray:
    """Return -log p of each variant's layout, ``(P,)`` in nats, as ``score_proteins`` gives it.

    All processes call this together, and each scores a share. Variants resemble the wild type, and
    are of any length.

    Returns:
        NaN where a variant does not fit the model.
    """
    rows, takes = loaded.rows([wild, *variants])
    fits = np.flatnonzero(takes)
    nll = np.full(len(rows), np.nan)
    nll[fits] = _sums(loaded.model, [rows[i] for i in fits], [np.ones(len(rows[i])) for i in fits])
    return nll[1:]


def _sums(
    model: PreTrainedModel, rows: Sequence[np.ndarray], weights: Sequence[np.ndarray]
) -> np.ndarray:
    """Return Σ_t w_t · -log p(token t | those before) of each row, ``(P,)``, in all processes.

    Args:
        model: a causal language model.
        rows: ``(T,)`` tokens of each, resembling the first row.
        weights: ``(T,)`` of each row's tokens; the first, which nothing predicts, has none.
    """
    sums = np.zeros(len(rows))
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            _fill(model, rows, weights, sums)
    finally:
        model.train(training)
    return np.sum(processes.gathered(sums), axis=0)


def _fill(
    model: PreTrainedModel,
    rows: Sequence[np.ndarray],
    weights: Sequence[np.ndarray],
    sums: np.ndarray,
) -> None:
    """Write the sums of this process's share of the rows into ``sums``."""
    cache = _cache(model) if len(rows) > 1 else None
    shared, layers, before = np.zeros(len(rows), dtype=np.int64), [], np.zeros(1)
    if cache is not None:
        shared = np.array([_shared(rows[0], row) for row in rows])  # tokens, at least one
        ids = torch.as_tensor(rows[0], device=model.device)[None]
        logits = model(input_ids=ids, use_cache=True, **{cache_argument(model): cache}).logits
        values = _losses(logits[:, :-1], ids[:, 1:])[0].cpu().numpy() * weights[0][1:]
        before = np.concatenate([[0.0], np.cumsum(values)])  # (T,): of the tokens up to each
        kept: Any = cache.layers
        layers = [(layer.keys, layer.values) for layer in kept]
    lengths = np.array([len(row) for row in rows]) - np.maximum(shared - 1, 0)
    # Those that differ late first: rows of a batch share what the earliest of them shares.
    order = np.lexsort((lengths, -shared))
    tokens = max(1, min(BATCH_TOKENS, BATCH_LOGITS // int(model.config.vocab_size)))
    batches = processes.mine(cut_batches(lengths, order, BATCH_ROWS, tokens))
    for batch in progress(batches, len(batches), "scoring", "batches"):
        start = max(0, int(shared[batch].min()) - 1)  # tokens whose keys and values are reused
        inputs, _ = padded([rows[i][start:] for i in batch])
        counted = np.zeros(inputs.shape)
        for place, i in enumerate(batch):
            counted[place, : len(rows[i]) - start] = weights[i][start:]
        inputs = inputs.to(model.device)
        values = _losses(_after(model, layers, start, inputs)[:, :-1], inputs[:, 1:])
        sums[batch] = before[start] + (values.cpu().numpy() * counted[:, 1:]).sum(1)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log p of targets ``(B, T)`` under logits ``(B, T, V)``, in float64."""
    flat = logits.reshape(-1, logits.shape[-1]).float()
    losses = F.cross_entropy(flat, targets.reshape(-1), reduction="none")
    return losses.double().view(targets.shape)


def _after(
    model: PreTrainedModel, layers: Sequence[tuple[Any, Any]], start: int, inputs: Tensor
) -> Tensor:
    """Return the logits ``(B, t, V)`` of tokens ``(B, t)`` behind the first ``start`` of others.

    Padding stands behind a row, where nothing that counts sees it.
    """
    rows, length = inputs.shape
    if start == 0:
        without = {"use_cache": False} if accepts(model, "use_cache") else {}
        return model(input_ids=inputs, **without).logits
    cache = DynamicCache(config=model.config)
    empty: Any = cache.layers
    for layer, (keys, values) in zip(empty, layers, strict=True):
        layer.update(
            keys[:, :, :start].expand(rows, -1, -1, -1),
            values[:, :, :start].expand(rows, -1, -1, -1),
        )
    return model(input_ids=inputs, use_cache=True, **{cache_argument(model): cache}).logits


def _cache(model: PreTrainedModel) -> DynamicCache | None:
    """Return an empty cache, or None where keys and values are not all that a layer remembers."""
    if not accepts(model, cache_argument(model)):
        return None
    cache = DynamicCache(config=model.config)
    return cache if all(type(layer) is DynamicLayer for layer in cache.layers) else None


def _shared(first: np.ndarray, second: np.ndarray) -> int:
    """Return how many tokens two rows begin with in common, at most all but the last."""
    length = min(len(first), len(second)) - 1
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


# Long proteins -------------------------------------------------------------------------------


def window_residues(positions: int) -> int:
    """Return the residues of a window: whole lines that fit even where a token is one residue.

    Raises:
        ValueError: not two lines fit.
    """
    lines = (positions - 4) // (RESIDUES_PER_LINE + 1)
    if lines < 2:
        raise ValueError(f"--windows: the model's {positions} positions hold no two lines")
    return lines // 2 * 2 * RESIDUES_PER_LINE


def windows_of(length: int, window: int) -> list[tuple[int, int, int]]:
    """Return start, stop and first counted residue of each window over a protein."""
    step = window // 2
    count = 1 + max(0, math.ceil((length - window) / step))
    starts = [i * step for i in range(count)]
    return [(s, min(s + window, length), s + step if s else 0) for s in starts]


def windowed_nll(loaded: ProteinModel, proteins: Sequence[str]) -> np.ndarray:
    """Return -log p of proteins of any length, window by window, ``(P,)`` in nats.

    A token's NLL is shared equally by its residues; that of a token without residues (a line break,
    the end) belongs to the residue before it, and before the first to that. Windows that proteins
    share are scored once, and those at one place as variants of each other. All processes call this
    together.

    Returns:
        NaN where the tokens do not spell a protein.

    Raises:
        ValueError: the model's positions hold no window.
    """
    model, tokenizer = loaded
    window = window_residues(stated_positions(model.config) or WINDOW_TOKENS)
    spelling = Spelling(tokenizer)
    nll = np.zeros(len(proteins))
    cut = [windows_of(len(protein), window) for protein in proteins]
    for number in range(max(map(len, cut), default=0)):
        texts: dict[tuple[str, str, bool, int], list[int]] = {}  # the proteins that have each
        for i, (protein, windows) in enumerate(zip(proteins, cut, strict=True)):
            if number < len(windows):
                start, stop, first = windows[number]
                text, ends = protein[start:stop], stop == len(protein)
                key = text, getattr(text, "tag", ""), ends, first - start
                texts.setdefault(key, []).append(i)
        rows, weights, owners = [], [], []
        ids = encode(tokenizer, [key[0] for key in texts], [key[2] for key in texts])
        for row, ((text, _, _, skipped), owned) in zip(ids, texts.items(), strict=True):
            if not spelling.spells(row, text):
                nll[owned] = np.nan
                continue
            rows.append(np.asarray(row))
            weights.append(counted_shares(spelling.sizes(row), skipped))
            owners.append(owned)
        if rows:
            for value, owned in zip(_sums(model, rows, weights), owners, strict=True):
                nll[owned] += value
    return nll


def counted_shares(sizes: np.ndarray, skipped: int) -> np.ndarray:
    """Return of each token, ``(T,)``, the share that belongs to residues behind ``skipped`` others.

    Tokens have ``sizes`` residues. One without any belongs to the residue before it, or else to the
    first.
    """
    stops = np.cumsum(sizes)
    counted = np.minimum(np.maximum(stops - skipped, 0), sizes)
    last = np.maximum(stops - 1, 0)
    return np.where(sizes > 0, counted / np.maximum(sizes, 1), last >= skipped)

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
from src.evaluation.likelihoods import score_proteins
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
    model = loaded.model
    (reference, *others), takes = loaded.rows([wild, *variants])
    limit = stated_positions(model.config) or len(reference)
    cache = _cache(model)
    if len(reference) > limit or cache is None or not others:
        return score_proteins(*loaded, variants, shared=True).nll
    shared = np.array([_shared(reference, row) for row in others])  # tokens, at least one
    fits = np.flatnonzero(takes[1:])
    sums = np.zeros(len(others))
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            _fill(model, cache, reference, others, shared, fits, sums)
    finally:
        model.train(training)
    nll = np.full(len(others), np.nan)
    nll[fits] = np.sum(processes.gathered(sums), axis=0)[fits]
    return nll


def _fill(
    model: PreTrainedModel,
    cache: DynamicCache,
    reference: np.ndarray,
    others: Sequence[np.ndarray],
    shared: np.ndarray,
    fits: np.ndarray,
    nll: np.ndarray,
) -> None:
    """Write the NLL of this process's share of the variants that fit into ``nll``."""
    ids = torch.as_tensor(reference, device=model.device)[None]
    logits = model(input_ids=ids, use_cache=True, **{cache_argument(model): cache}).logits[0, :-1]
    values = F.cross_entropy(logits.float(), ids[0, 1:], reduction="none").double().cpu().numpy()
    before = np.concatenate([[0.0], np.cumsum(values)])  # (T,): NLL of the tokens up to each
    kept: Any = cache.layers
    layers = [(layer.keys, layer.values) for layer in kept]
    # Those that differ late first: rows of a batch share what the earliest of them shares.
    order = fits[np.argsort(-shared[fits], kind="stable")]
    rest = np.array([len(row) for row in others]) - shared + 1
    tokens = max(1, min(BATCH_TOKENS, BATCH_LOGITS // int(model.config.vocab_size)))
    batches = processes.mine(cut_batches(rest, order, BATCH_ROWS, tokens))
    for batch in progress(batches, len(batches), "scoring", "batches"):
        start = int(shared[batch].min()) - 1  # tokens whose keys and values are reused
        inputs, mask = padded([others[i][start:] for i in batch])
        inputs, mask = inputs.to(model.device), mask.to(model.device)
        logits = _after(model, layers, start, inputs)[:, :-1]
        values = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(), inputs[:, 1:].reshape(-1),
            reduction="none",
        ).view(len(batch), -1)  # fmt: skip
        sums = (values.double() * mask[:, 1:]).sum(1).cpu().numpy()
        nll[batch] = before[start] + sums


def _after(
    model: PreTrainedModel, layers: Sequence[tuple[Any, Any]], start: int, inputs: Tensor
) -> Tensor:
    """Return the logits ``(B, t, V)`` of tokens ``(B, t)`` behind the first ``start`` of others.

    Padding stands behind a row, where nothing that counts sees it.
    """
    rows, length = inputs.shape
    if start == 0:
        return model(input_ids=inputs, use_cache=False).logits
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


def windowed_nll(loaded: ProteinModel, residues: str) -> np.ndarray:
    """Return the NLL of each residue of a protein of any length, ``(L,)`` in nats.

    A token's NLL is shared equally by its residues; that of a token without residues (a line break,
    the end) belongs to the residue before it, and before the first to that.

    Raises:
        ValueError: the model's positions hold no window, or the tokens do not spell the protein.
    """
    model, tokenizer = loaded
    window = window_residues(stated_positions(model.config) or WINDOW_TOKENS)
    nll = np.zeros(len(residues))
    spelling = Spelling(tokenizer)
    for start, stop, first in windows_of(len(residues), window):
        text = residues[start:stop]
        (ids,) = encode(tokenizer, [text], [stop == len(residues)])
        if not spelling.spells(ids, text):
            raise ValueError("the tokenizer does not know all residues of a protein")
        row = torch.tensor([ids], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
        values = F.cross_entropy(logits, row[0, 1:], reduction="none").double().cpu().numpy()
        nll[first:stop] = by_residue(values, spelling.sizes(ids)[1:])[first - start :]
    return nll


def by_residue(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Share the values ``(T,)`` of tokens among their residues, ``sizes`` of each: ``(L,)``.

    The value of a token without residues goes to the residue before it, or else to the first.
    """
    shared = np.repeat(values / np.maximum(sizes, 1), sizes)
    before = np.maximum(np.cumsum(sizes) - 1, 0)
    np.add.at(shared, before[sizes == 0], values[sizes == 0])
    return shared

"""Turns tokenised proteins into batches: padded, grouped by length, or packed into full rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

IGNORED_LABEL = -100
"""Label of positions without a loss: the loss and PyTorch's cross entropy read it."""
POOL_BATCHES = 50
"""Batches whose proteins are sorted together: little padding, and still a random order."""


class TokenSequences(Protocol):
    """Tokenised proteins, by index."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each protein."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...


class HiddenStates(Protocol):
    """A teacher's hidden states ``(T, E)`` and statistics ``(T, 3)`` of each protein, by index."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]: ...


class ProteinDataset(Dataset):
    """Tokenised proteins for the Trainer, one dictionary each.

    With a teacher's ``cache`` the entry ``teacher`` is the list of the row's cached states.
    """

    def __init__(
        self,
        proteins: TokenSequences,
        by_length: bool = True,
        cache: HiddenStates | None = None,
    ) -> None:
        self.proteins = proteins
        self.lengths = np.asarray(proteins.lengths)
        self.by_length = by_length
        self.cache = cache

    def __len__(self) -> int:
        return len(self.proteins)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {"input_ids": self.proteins[int(index)]}
        return row | _cached_states(self.cache, [int(index)])


def _cached_states(cache: HiddenStates | None, proteins: Iterable[int]) -> dict[str, Any]:
    return {} if cache is None else {"teacher": [cache[int(index)] for index in proteins]}


class PackedDataset(Dataset):
    """Rows of several whole proteins, together at most ``row_tokens`` long."""

    def __init__(
        self,
        proteins: TokenSequences,
        row_tokens: int,
        seed: int = 0,
        cache: HiddenStates | None = None,
    ) -> None:
        self.proteins = proteins
        self.cache = cache
        self.by_length = False
        self.rows = pack(np.asarray(proteins.lengths), row_tokens, seed)
        lengths = np.asarray(proteins.lengths)
        self.lengths = np.array([int(lengths[row].sum()) for row in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[int(index)]
        return {"proteins": [self.proteins[int(i)] for i in row]} | _cached_states(self.cache, row)


def pack(
    lengths: np.ndarray, row_tokens: int, seed: int = 0, window: int = 4096
) -> list[np.ndarray]:
    """Fill rows with whole proteins: first fit, longest first, within shuffled windows.

    Args:
        lengths: ``(proteins,)`` tokens of each protein.
        row_tokens: room in a row.
        seed: of the shuffle.
        window: proteins that are packed together; bounds time and memory on large data.

    Returns:
        Indices of the proteins of each row; every protein is in exactly one.

    Raises:
        ValueError: a protein is longer than a row.
    """
    if len(lengths) and int(lengths.max()) > row_tokens:
        raise ValueError(
            f"a protein of {int(lengths.max())} tokens does not fit a packed row of {row_tokens}: "
            "raise --max_length"
        )
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows: list[np.ndarray] = []
    for start in range(0, len(order), window):
        chunk = order[start : start + window]
        chunk = chunk[np.argsort(-lengths[chunk], kind="stable")]
        open_rows: list[list[int]] = []
        room = np.zeros(0, dtype=np.int64)
        for index in chunk:
            fits = np.flatnonzero(room >= lengths[index])
            if len(fits):
                open_rows[fits[0]].append(int(index))
                room[fits[0]] -= lengths[index]
            else:
                open_rows.append([int(index)])
                room = np.append(room, row_tokens - lengths[index])
        rows.extend(np.array(row) for row in open_rows)
    return rows


def cut_batches(
    lengths: np.ndarray, order: np.ndarray, rows: int | None = None, tokens: int | None = None
) -> list[np.ndarray]:
    """Cut an order of sequences into consecutive batches that are as large as allowed.

    Args:
        lengths: ``(sequences,)``.
        order: indices into ``lengths``; sorted by length, batches hold little padding.
        rows: most sequences of a batch.
        tokens: most padded tokens of a batch, rows × longest; a longer sequence is a batch alone.

    Returns:
        The indices of each batch.
    """
    most = len(order) if rows is None else rows
    if tokens is None:
        return [order[i : i + most] for i in range(0, len(order), max(1, most))]
    batches, start = [], 0
    while start < len(order):
        stop, longest = start + 1, int(lengths[order[start]])
        while stop < len(order) and stop - start < most:
            longest = max(longest, int(lengths[order[stop]]))
            if (stop - start + 1) * longest > tokens:
                break
            stop += 1
        batches.append(order[start:stop])
        start = stop
    return batches


def length_grouped_order(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Return a random order in which every ``batch_size`` neighbours have similar lengths.

    Args:
        lengths: ``(rows,)``.
        batch_size: rows of a batch.
        seed: with ``epoch`` decides the order.
        epoch: counted from 0.

    Returns:
        ``(rows,)`` a permutation. Proteins are shuffled, sorted within pools of 50 batches, cut
        into batches, and the batches shuffled; the last, smaller batch stays last so that all
        others stay whole.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    pool = POOL_BATCHES * batch_size
    batches: list[np.ndarray] = []
    for start in range(0, len(order), pool):
        chunk = order[start : start + pool]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches += cut_batches(lengths, chunk, rows=batch_size)
    ragged = [batch for batch in batches if len(batch) < batch_size]
    whole = [batch for batch in batches if len(batch) == batch_size]
    shuffled = [whole[i] for i in rng.permutation(len(whole))]
    return np.concatenate(shuffled + ragged) if batches else order


class EpochSampler(Sampler[int]):
    """Goes through rows in an order that depends on seed and epoch alone, so that it resumes."""

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        seed: int,
        epoch: Callable[[], int],
        by_length: bool = True,
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch
        self.by_length = by_length

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch()
        if self.by_length:
            order = length_grouped_order(self.lengths, self.batch_size, self.seed, epoch)
        else:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))
        yield from order.tolist()


def padded(
    sequences: Sequence[np.ndarray | Sequence[int]],
    pad_token_id: int = 0,
    side: str = "right",
) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask ``(B, T)`` of sequences padded to the longest.

    Padding is on the ``side`` ``right`` or ``left``.
    """
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        first = 0 if side == "right" else width - len(sequence)
        place = slice(first, first + len(sequence))
        ids[row, place] = torch.as_tensor(np.asarray(sequence, dtype=np.int64))
        mask[row, place] = 1
    return ids, mask


class PaddingCollator:
    """Pads the proteins of a batch to its longest one.

    The result holds ``input_ids``, ``attention_mask`` and ``labels``, each ``(B, T)``; labels are
    -100 at padding. Padding is masked by position, not by token id: GPT-2 pads with end-of-text.
    """

    def __init__(self, pad_token_id: int, side: str = "right") -> None:
        if side not in ("left", "right"):
            raise ValueError(f"padding side must be left or right, got {side!r}")
        self.pad_token_id = pad_token_id
        self.side = side

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch of some rows of :class:`ProteinDataset`."""
        ids, mask = padded([row["input_ids"] for row in rows], self.pad_token_id, self.side)
        labels = ids.masked_fill(mask == 0, IGNORED_LABEL)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class PackingCollator:
    """Concatenates the proteins of each packed row.

    The result holds ``input_ids``, ``labels`` and ``position_ids``, each ``(B, T)``, and no
    attention mask: positions begin again at each protein, so transformers keeps attention inside
    it. The first label of each protein is -100, because nothing in it predicts that token. The
    unused end of a row counts as a protein whose labels are all -100.
    """

    def __init__(self, pad_token_id: int, row_tokens: int) -> None:
        self.pad_token_id = pad_token_id
        self.row_tokens = row_tokens

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch of some rows of :class:`PackedDataset`."""
        shape = (len(rows), self.row_tokens)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, IGNORED_LABEL),
            "position_ids": torch.zeros(shape, dtype=torch.long),
        }
        for number, row in enumerate(rows):
            start = 0
            for protein in row["proteins"]:
                ids = torch.as_tensor(np.asarray(protein, dtype=np.int64))
                end = start + len(ids)
                batch["input_ids"][number, start:end] = ids
                batch["labels"][number, start + 1 : end] = ids[1:]
                batch["position_ids"][number, start:end] = torch.arange(len(ids))
                start = end
            batch["position_ids"][number, start:] = torch.arange(self.row_tokens - start)
        return batch

"""Output heads in the dtype of their products, and how a batch is cut into chunks of positions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from src.loss.reference import check_vocabularies

CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}
"""Logits of a chunk: enough positions for fast matrix products, little beside the batch's."""
LONG_SEQUENCE = 4
"""A chunk grows to at most this many times its usual size to hold one sequence whole."""


@dataclass
class Head:
    """Hidden states and their output head, the head in the dtype of the matrix product."""

    hidden: Tensor  # (B·T, E)
    shape: torch.Size  # (B, T, E)
    weight: Tensor  # (V, E)
    bias: Tensor | None  # (V,)

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
        """Return the head, detached. Raises ``ValueError`` where it does not fit ``hidden``."""
        if hidden.shape[-1] != weight.shape[-1]:
            raise ValueError(
                f"hidden states have {hidden.shape[-1]} features, their head {weight.shape[-1]}"
            )
        dtype = _product_dtype(hidden, weight)
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        weight = weight.detach().to(dtype)
        bias = None if bias is None else bias.detach().to(dtype)
        return cls(flat, hidden.shape, weight, bias)

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return self.weight.dtype

    @property
    def vocabulary(self) -> int:
        """V."""
        return len(self.weight)

    def buffer(self, positions: int) -> Tensor:
        """Return an uninitialised buffer for the logits ``(positions, V)``.

        On a GPU rows begin at multiples of 64 elements: matrix products with rows of an odd
        length, such as 50,257, are slow.
        """
        width = self.vocabulary
        if self.weight.device.type == "cuda":
            width = math.ceil(width / 64) * 64
        buffer = torch.empty(positions, width, dtype=self.dtype, device=self.weight.device)
        return buffer[:, : self.vocabulary]

    def project(self, rows: Tensor, buffer: Tensor) -> Tensor:
        """Return the logits ``(n, V)`` of ``rows`` ``(n, E)``, held in ``buffer``."""
        out = buffer[: len(rows)]
        if self.bias is None:
            return torch.mm(rows.to(self.dtype), self.weight.t(), out=out)
        return torch.addmm(self.bias, rows.to(self.dtype), self.weight.t(), out=out)


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer would multiply these, also under autocast."""
    if torch.float64 in (hidden.dtype, weight.dtype):
        return torch.float64
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    for dtype in (hidden.dtype, weight.dtype):
        if dtype in (torch.bfloat16, torch.float16):
            return dtype
    return torch.float32


def check_inputs(heads: Sequence[Head], labels: Tensor) -> None:
    """Raise ``ValueError`` unless heads agree in vocabulary, and hidden states fit the labels."""
    for head in heads:
        check_vocabularies(heads[0].vocabulary, head.vocabulary)
        if head.shape[:-1] != labels.shape:
            raise ValueError(
                f"hidden states of shape {tuple(head.shape)} do not fit labels of shape "
                f"{tuple(labels.shape)}"
            )


@dataclass
class Plan:
    """The valid positions of a batch, sequence by sequence, and how they are cut into chunks."""

    index: Tensor  # (N,) position in the flattened (B, T)
    targets: Tensor  # (N,) token to predict
    sequence: Tensor  # (N,) number of the sequence, ascending
    chunks: list[tuple[int, int]]
    whole: bool  # whether each sequence lies in one chunk

    @classmethod
    def make(
        cls,
        valid: Tensor,
        labels: Tensor,
        segments: Tensor | None,
        vocabulary: int,
        chunk_tokens: int | None,
    ) -> Plan:
        """Plan a batch. The plan depends on the batch alone, not on the settings of students."""
        row, column = valid.nonzero(as_tuple=True)
        sequence = row
        if segments is not None:
            within = segments[row, column].clamp(min=0).long()
            widest = int(within.max()) + 1 if len(within) else 1
            sequence, order = (row * widest + within).sort(stable=True)
            row, column = row[order], column[order]
        _, sequence, counts = sequence.unique_consecutive(return_inverse=True, return_counts=True)
        targets = labels[row, column + 1]
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
            raise ValueError(
                f"a label is outside the vocabulary of {vocabulary:,} tokens (-100 marks what is "
                "not to be predicted)"
            )
        lengths: list[int] = counts.tolist()
        longest = max(lengths, default=0)
        capacity = limit = chunk_tokens or usual_chunk(vocabulary, labels.device)
        if chunk_tokens is None and longest <= LONG_SEQUENCE * capacity:
            limit = max(capacity, longest)
        whole = longest <= limit
        chunks = _whole_chunks(lengths, limit) if whole else even_chunks(len(row), capacity)
        return cls(row * labels.shape[1] + column, targets, sequence, chunks, whole)

    @property
    def largest(self) -> int:
        """Positions of the largest chunk."""
        return max((stop - start for start, stop in self.chunks), default=0)


def _whole_chunks(lengths: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Return bounds of chunks of consecutive whole sequences, at most ``limit`` positions each."""
    chunks = []
    start = stop = 0
    for length in lengths:
        if stop > start and stop + length - start > limit:
            chunks.append((start, stop))
            start = stop
        stop += length
    return [*chunks, (start, stop)] if stop > start else chunks


def even_chunks(count: int, capacity: int) -> list[tuple[int, int]]:
    """Return bounds of the fewest chunks of at most ``capacity``, as even as possible."""
    number = math.ceil(count / capacity)
    bounds = [count * i // number for i in range(number + 1)] if number else []
    return list(itertools.pairwise(bounds))


def usual_chunk(vocabulary: int, device: torch.device) -> int:
    """Return for how many positions logits are held at a time."""
    elements = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"])
    return max(16, elements // vocabulary)

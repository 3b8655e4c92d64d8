"""Output heads in the dtype of their products, and how a batch is cut into chunks of positions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from src.loss.reference import at_least_float32, check_vocabularies

CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}
"""Logits of a chunk: enough positions for fast matrix products, little beside the batch's."""
LONG_SEQUENCE = 4
"""A chunk grows to at most this many times its usual size to hold one sequence whole."""


class OutputHead(NamedTuple):
    """What makes a model's logits: z = c tanh(s (W h + b) / c), or s (W h + b) without a cap.

    Attributes:
        weight: W ``(V, E)``; None: the hidden states are the logits themselves ``(..., V)``.
        bias: b ``(V,)`` or None.
        scale: s, as in Cohere and Granite.
        cap: c, the largest logit, as in Gemma 2.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def to(self, dtype: torch.dtype) -> OutputHead:
        """Return the head with weight and bias in a dtype."""
        weight, bias = (None if t is None else t.to(dtype) for t in self[:2])
        return self._replace(weight=weight, bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits ``(..., V)`` of hidden states ``(..., E)``, in their dtype."""
        if self.weight is None:
            return hidden
        return self.shaped(F.linear(hidden, self.weight, self.bias))

    def shaped(self, products: Tensor) -> Tensor:
        """Return W h + b ``(..., V)`` scaled and capped."""
        scaled = products if self.scale == 1.0 else products * self.scale
        return scaled if self.cap is None else (scaled / self.cap).tanh() * self.cap


@dataclass
class Head:
    """Hidden states and their output head, the head in the dtype of the matrix product."""

    hidden: Tensor  # (B·T, E)
    shape: torch.Size  # (B, T, E)
    form: OutputHead  # detached

    @classmethod
    def of(cls, hidden: Tensor, head: OutputHead) -> Head:
        """Return the head, detached. Raises ``ValueError`` where it does not fit ``hidden``."""
        weight = hidden[:0] if head.weight is None else head.weight
        if hidden.shape[-1] != weight.shape[-1]:
            raise ValueError(
                f"hidden states have {hidden.shape[-1]} features, their head {weight.shape[-1]}"
            )
        weight, bias = (None if t is None else t.detach() for t in head[:2])
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        form = head._replace(weight=weight, bias=bias)
        return cls(flat, hidden.shape, form.to(_product_dtype(hidden, weight)))

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return self.hidden.dtype if self.form.weight is None else self.form.weight.dtype

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.shape[-1] if self.form.weight is None else len(self.form.weight)

    def buffer(self, positions: int) -> Tensor:
        """Return an uninitialised buffer for the logits ``(positions, V)``.

        On a GPU rows begin at multiples of 64 elements: matrix products with rows of an odd
        length, such as 50,257, are slow.
        """
        width = self.vocabulary
        if self.hidden.device.type == "cuda":
            width = math.ceil(width / 64) * 64
        buffer = torch.empty(positions, width, dtype=self.dtype, device=self.hidden.device)
        return buffer[:, : self.vocabulary]

    def project(self, rows: Tensor, buffer: Tensor) -> Tensor:
        """Return the logits ``(n, V)`` of ``rows`` ``(n, E)``, held in ``buffer``."""
        out = buffer[: len(rows)]
        weight, bias, scale, cap = self.form
        rows = rows.to(self.dtype)
        if weight is None:
            return out.copy_(rows)
        if bias is None:
            torch.mm(rows, weight.t(), out=out)
        else:
            torch.addmm(bias, rows, weight.t(), out=out)
        if scale != 1.0:
            out.mul_(scale)
        return out if cap is None else out.div_(cap).tanh_().mul_(cap)

    def slope(self, logits: Tensor) -> Tensor | float | None:
        """Return dz / d(W h + b) = s (1 - (z / c)²) at the logits z ``(n, V)``; None where it is 1.

        Without a cap it is the number s.
        """
        scale, cap = self.form.scale, self.form.cap
        if cap is None:
            return None if scale == 1.0 else scale
        return (at_least_float32(logits) / cap).square_().neg_().add_(1.0).mul_(scale)


def _product_dtype(hidden: Tensor, weight: Tensor | None) -> torch.dtype:
    """Return the dtype in which a linear layer would multiply these, also under autocast."""
    if weight is None:
        return hidden.dtype
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

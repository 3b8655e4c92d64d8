"""One token at a time from a causal language model, for rows that come and go.

A :class:`Decoder` owns the key-value cache of its rows. Rows are aligned at their newest token, so
that all of them grow at the same column; a mask hides what is left of a shorter row. The rows in
use are always the first ones, long rows before short ones, so that groups of neighbours attend to
few columns that are hidden.

GPT-2 is computed here, from its own weights and without copies of them: transformers spends more
time around a small model's operations than in them. Other models run in transformers, behind the
same cache.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GPT2LMHeadModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from src.models.forward import accepts
from src.models.loading import max_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD_ROWS = 1024
"""A CPU multiplies with so many rows of a large vocabulary's head at a time: they stay in its
caches while they are brought into the order that the product needs."""
FEW_STATES = 3
"""Up to so many states a CPU multiplies fastest with the head on the left, and with two states
faster than with one."""
SPARE_COLUMNS = 64
"""Least room that the cache gets ahead, so that it is not copied for every token."""
CPU_GROUPS, OTHER_GROUPS = (8, 1 << 18), (64, 1 << 26)
"""For GPT-2 on a CPU and elsewhere. Rows of a block: all are as long as those of later blocks or
longer. Bytes of keys and values that are read while one more call of the attention begins: 20 µs at
10 GB/s, 30 µs at 2 TB/s. A GPU's blocks are larger, because each row that moves costs launches."""


def cache_argument(model: PreTrainedModel) -> str:
    """Return the name by which a model's forward takes its cache; newer transformers renamed it."""
    return "cache" if accepts(model, "cache") else "past_key_values"


def sampling_room(model: PreTrainedModel, wanted: int | None = None) -> int:
    """Return how many tokens a sampled row may have: positions, and windows that never slide.

    Args:
        model: a causal language model.
        wanted: tokens that are asked for; None: as many as the model takes.

    Raises:
        ValueError: the model keeps something else than keys and values of all that came before, or
            neither it nor the caller says how long a row may be.
    """
    room = max_positions(model.config, wanted)
    layers = []
    if accepts(model, cache_argument(model)):
        layers = DynamicCache(config=model.config).layers
    windows = [x.sliding_window for x in layers if type(x) is DynamicSlidingWindowLayer]
    full = sum(type(layer) is DynamicLayer for layer in layers)
    if not layers or full + len(windows) < len(layers):
        raise ValueError(
            f"{type(model).__name__}: proteins cannot be sampled from it, because that needs keys "
            "and values of all tokens before, which not all of its layers keep; training, "
            "evaluation without samples and scoring work"
        )
    return min([room, *windows])


def zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return zeros of the type and on the device of a tensor; on a CPU no page is touched yet."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    count = math.prod(shape) * like.element_size()
    return torch.from_numpy(np.zeros(count, np.uint8)).view(like.dtype).view(shape)


@dataclass(frozen=True)
class Group:
    """Neighbouring rows that attend together: the first, how many, their newest columns, a mask."""

    first: int
    rows: int
    columns: int
    mask: Tensor | None


class Decoder:
    """The cache of a batch of rows, and the logits after each row's newest token.

    Shapes: B rows in use, W tokens of the longest, H heads of keys, d their width, V vocabulary.

    Attributes:
        lengths: tokens of each row in use, the newest included.
    """

    def __init__(self, model: PreTrainedModel, prompt: Tensor, room: int | None = None) -> None:
        """Compute the prompt's keys and values once for all rows.

        Args:
            model: a causal language model in eval mode.
            prompt: ``(p,)`` tokens that every row begins with; the last is each row's first input.
            room: most tokens of a row; None: as many as the model takes.

        Raises:
            ValueError: a layer of the model does not attend to all that came before.
        """
        self.room = sampling_room(model, room)
        cache = DynamicCache()  # in no row anything falls out of a sliding window
        self.name = cache_argument(model)
        self.model, self.device = model, model.device
        model(input_ids=prompt[None], use_cache=True, **{self.name: cache})
        # (2, H, p - 1, d) of each layer
        self.opening = [
            torch.cat([layer.keys, layer.values])[:, :, :-1]  # type: ignore[list-item]
            for layer in cache.layers
        ]
        self.buffers = [o.new_zeros((2, 0, o.shape[1], 0, o.shape[3])) for o in self.opening]
        self.lengths: list[int] = []
        self.stop = self.width = 0
        self.logits: Callable[[Tensor, Tensor | None], Tensor]
        if is_plain_gpt2(model):
            self.weights = gpt2_weights(model)
            self.logits = self._gpt2
            self.block, self.call_bytes = CPU_GROUPS if self.device.type == "cpu" else OTHER_GROUPS
            # keys and values of a row's column in a layer
            self.cell_bytes = 2 * model.config.n_embd * self.opening[0].element_size()
        else:
            self.block = sys.maxsize  # all rows attend together, so their order does not matter
            self.cache = DynamicCache()
            self.cache.layers = [_Window(self, i) for i in range(len(self.buffers))]  # type: ignore[assignment]
            self.logits = self._library

    def bytes_of_a_row(self) -> int:
        """Return the size of the keys and values of a row that fills the model's positions."""
        columns = self.room
        heads = sum(o.shape[0] * o.shape[1] * o.shape[3] for o in self.opening)
        return heads * columns * self.opening[0].element_size()

    def begin(self, count: int) -> None:
        """Add rows that hold the prompt behind those in use."""
        first, rows = len(self.lengths), len(self.lengths) + count
        columns = self.opening[0].shape[2]
        if rows > self.buffers[0].shape[1]:
            self._grow(max(rows, first * 2))
        for buffer, opening in zip(self.buffers, self.opening, strict=True):
            buffer[:, first:rows, :, self.stop - columns : self.stop] = opening[:, None]
        self.lengths += [columns + 1] * count

    def drop(self, row: int) -> list[tuple[int, int]]:
        """Take a row out and let others come in its place, so that long rows stay before short.

        Returns:
            Places and the rows that came there, in order; the last row is gone.
        """
        moves, lengths = [], self.lengths
        last, size = len(lengths) - 1, self.block
        while (block := (row // size + 1) * size) <= last:
            longest = max(lengths[block : block + size])
            origin = last - lengths[::-1].index(longest)
            moves.append((row, origin))
            row = origin
        if row < last:
            moves.append((row, last))
        for place, origin in moves:
            lengths[place] = lengths[origin]
            # its newest token has no keys yet
            held = slice(self.stop - lengths[origin] + 1, self.stop)
            for buffer in self.buffers:
                buffer[:, place, :, held] = buffer[:, origin, :, held]
        lengths.pop()
        return moves

    def step(self, newest: Tensor) -> Tensor:
        """Return the logits ``(B, V)`` after the newest token ``(B,)`` of each row in use.

        Each row is one token longer afterwards.
        """
        lengths = self.lengths
        if self.stop == self.buffers[0].shape[3]:
            self._make_room()
        self.stop += 1
        self.width = width = max(lengths)
        hidden = None  # (B, W): columns that are left of a row
        if min(lengths) < width:
            columns = torch.arange(width, device=self.device)
            starts = torch.tensor([width - n for n in lengths], device=self.device)
            hidden = columns < starts[:, None]
        logits = self.logits(newest, hidden)
        self.lengths = [n + 1 for n in lengths]
        return logits

    def positions(self) -> Tensor:
        """Return the position of each row's newest token, ``(B,)``; ``(1,)`` where all agree."""
        lengths = self.lengths
        alike = min(lengths) == max(lengths)
        return torch.tensor([n - 1 for n in (lengths[:1] if alike else lengths)]).to(self.device)

    def _make_room(self) -> None:
        """Make room for more columns: where those before the ones in use are, if they are many."""
        buffers, kept = self.buffers, self.width
        by = self.stop - kept
        if by < buffers[0].shape[3] // 4:
            self._grow(buffers[0].shape[1])
            return
        for buffer in buffers:
            rows = buffer[:, : len(self.lengths)]
            for first in range(0, kept, by):  # no copy onto itself
                end = min(first + by, kept)
                rows[:, :, :, first:end] = rows[:, :, :, first + by : end + by]
        self.stop = kept

    def _grow(self, rows: int) -> None:
        """Get buffers of so many rows, with the columns in use and as many behind them."""
        used, old_stop = len(self.lengths), self.stop
        kept = max(self.width, self.opening[0].shape[2])
        held = min(kept, old_stop)
        columns = max(kept + SPARE_COLUMNS, min(2 * kept, self.room + self.room // 2))
        for i, old in enumerate(self.buffers):
            new = zeros((2, rows, old.shape[2], columns, old.shape[4]), old)
            new[:, :used, :, kept - held : kept] = old[:, :used, :, old_stop - held : old_stop]
            self.buffers[i] = new
        self.stop = kept

    def _window(self, layer: int, first: int, rows: int, width: int) -> Tensor:
        """Return the newest keys and values ``(2, B, H, W, d)`` of some rows in use."""
        window = self.buffers[layer].narrow(3, self.stop - width, width)
        return window if rows == window.shape[1] else window.narrow(1, first, rows)

    def _groups(self, mask: Tensor | None) -> list[Group]:
        """Return the groups of rows that attend together; ``mask`` is ``(B, 1, 1, W)``.

        Attention reads what is hidden too. k groups of equal size save about (1 - 1/k) of that, and
        cost k calls, so the best number is about the root of what is hidden by what a call costs.
        """
        lengths, rows = self.lengths, len(self.lengths)
        if mask is None:
            return [Group(0, rows, self.width, None)]
        hidden = (self.width * rows - sum(lengths)) * self.cell_bytes
        count = math.isqrt(hidden // self.call_bytes)
        size = -(-rows // max(1, count) // self.block) * self.block
        groups = []
        for first in range(0, rows, size):
            some = lengths[first : first + size]
            width = max(some)
            part = mask[first : first + size, ..., self.width - width :]
            groups.append(Group(first, len(some), width, part if min(some) < width else None))
        return groups

    def _library(self, newest: Tensor, hidden: Tensor | None) -> Tensor:
        inputs: dict[str, Any] = {self.name: self.cache, "use_cache": True}
        if hidden is not None:
            inputs["attention_mask"] = (~hidden).long()
        if accepts(self.model, "position_ids"):
            inputs["position_ids"] = self.positions().expand(len(newest))[:, None]
        return self.model(input_ids=newest[:, None], logits_to_keep=1, **inputs).logits[:, -1]

    def _gpt2(self, newest: Tensor, hidden: Tensor | None) -> Tensor:
        weights = self.weights
        states = weights.tokens[newest] + weights.positions[self.positions()]  # (B, E)
        rows, size = states.shape
        mask = None
        if hidden is not None:
            mask = torch.zeros_like(hidden, dtype=states.dtype)
            mask = mask.masked_fill_(hidden, -torch.inf)[:, None, None]  # (B, 1, 1, W)
        groups = self._groups(mask)
        for layer, block in enumerate(weights.blocks):
            normed = F.layer_norm(states, (size,), block.norm_1, block.shift_1, block.eps)
            mixed = torch.addmm(block.qkv_bias, normed, block.qkv)
            mixed = mixed.view(rows, 3, block.heads, -1).transpose(0, 1)  # (3, B, H, d)
            self._window(layer, 0, rows, 1).squeeze(3).copy_(mixed[1:])
            parts = [
                F.scaled_dot_product_attention(
                    mixed[0, group.first : group.first + group.rows].unsqueeze(2),
                    *self._window(layer, group.first, group.rows, group.columns),
                    attn_mask=group.mask, scale=block.scale,
                )
                for group in groups
            ]  # fmt: skip
            attended = parts[0] if len(parts) == 1 else torch.cat(parts)
            states += torch.addmm(block.out_bias, attended.reshape(rows, size), block.out)
            normed = F.layer_norm(states, (size,), block.norm_2, block.shift_2, block.eps)
            inner = block.activation(torch.addmm(block.up_bias, normed, block.up))
            states += torch.addmm(block.down_bias, inner, block.down)
        states = F.layer_norm(states, (size,), weights.norm, weights.shift, weights.eps)
        return self._head(states)

    def _head(self, states: Tensor) -> Tensor:
        """Return the logits ``(B, V)`` of the last states ``(B, E)``."""
        head, bias = self.weights.head, self.weights.head_bias
        on_cpu = states.device.type == "cpu" and states.dtype.itemsize >= 4
        if not on_cpu or len(head) < 4 * HEAD_ROWS:
            return F.linear(states, head, bias)
        count = len(states)
        if count <= FEW_STATES:
            several = states if count > 1 else states.repeat(2, 1)
            logits = (head @ several.T).T[:count].contiguous()
        else:
            logits = torch.cat([F.linear(states, part) for part in head.split(HEAD_ROWS)], dim=1)
        return logits if bias is None else logits.add_(bias)


class _Window(DynamicLayer):
    """A layer of a decoder's cache, as transformers sees it."""

    def __init__(self, decoder: Decoder, layer: int) -> None:
        super().__init__()
        self.decoder, self.layer, self.is_initialized = decoder, layer, True

    def get_seq_length(self) -> int:
        """Return how many tokens came before those of this step."""
        return self.decoder.width - 1

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Return how many columns are attended to, and where they begin."""
        return self.decoder.width, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the newest column ``(B, H, 1, d)`` and return all keys and values."""
        decoder = self.decoder
        keys, values = decoder._window(self.layer, 0, len(decoder.lengths), decoder.width)
        keys[:, :, -1:], values[:, :, -1:] = key_states, value_states
        return keys, values


@dataclass(frozen=True)
class Block:
    """Weights of a GPT-2 block, as they are in the model: matrices are ``(inputs, outputs)``."""

    heads: int
    scale: float
    eps: float
    norm_1: Tensor
    shift_1: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    out_bias: Tensor
    norm_2: Tensor
    shift_2: Tensor
    up: Tensor
    up_bias: Tensor
    activation: Callable[[Tensor], Tensor]
    down: Tensor
    down_bias: Tensor


@dataclass(frozen=True)
class Gpt2Weights:
    """Weights of a GPT-2 outside and inside its blocks."""

    tokens: Tensor
    positions: Tensor
    blocks: Sequence[Block]
    eps: float
    norm: Tensor
    shift: Tensor
    head: Tensor
    head_bias: Tensor | None


def is_plain_gpt2(model: PreTrainedModel) -> bool:
    """Return whether a model computes what :class:`Decoder` computes for GPT-2."""
    if type(model) is not GPT2LMHeadModel or model.config.add_cross_attention:
        return False
    # Adapters and quantisation put modules of their own in place of these.
    usual = {"Conv1D", "LayerNorm", "Dropout"}
    parts = [block for block in model.transformer.h]
    names = {
        type(module).__name__
        for block in parts
        for module in block.modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    return names <= usual and type(model.lm_head) is torch.nn.Linear


def gpt2_weights(model: Any) -> Gpt2Weights:
    """Return the weights of a GPT-2: the model's own tensors, not copies."""
    config, base = model.config, model.transformer
    blocks = []
    for index, block in enumerate(base.h):
        heads = config.n_head
        scale = (config.n_embd // heads) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= index + 1
        attention, inner = block.attn, block.mlp
        blocks.append(
            Block(
                heads, scale, block.ln_1.eps, block.ln_1.weight, block.ln_1.bias,
                attention.c_attn.weight, attention.c_attn.bias,
                attention.c_proj.weight, attention.c_proj.bias,
                block.ln_2.weight, block.ln_2.bias, inner.c_fc.weight, inner.c_fc.bias, inner.act,
                inner.c_proj.weight, inner.c_proj.bias,
            )
        )  # fmt: skip
    return Gpt2Weights(
        base.wte.weight, base.wpe.weight, blocks, base.ln_f.eps, base.ln_f.weight, base.ln_f.bias,
        model.lm_head.weight, model.lm_head.bias,
    )  # fmt: skip

"""Initialises a small GPT-2 from a larger one: picks layers and reduces widths.

This is weight subcloning (Samragh et al. 2023, arXiv:2312.09299): the weights of the most important
features and neurons are copied. Attention depends only on the products W_q W_kᵀ and W_v W_o of each
head, so these are replaced by their best approximations of lower rank (Eckart and Young 1936,
Psychometrika 1:211), biases included. A student of the same shape computes the same function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


def check_can_shrink(large: Any, small: Any) -> None:
    """Raise ``ValueError`` unless ``small`` is nowhere larger and has the same vocabulary."""
    for name in ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions"):
        have, want = getattr(large, name), getattr(small, name)
        if want > have or (name == "vocab_size" and want != have):
            raise ValueError(
                f"--init_from: its {name} is {have}, the student's {want}: a student can be cut "
                "from a model that is nowhere smaller and has the same vocabulary"
            )


@torch.no_grad()
def subclone(large: GPT2LMHeadModel, small: GPT2LMHeadModel) -> None:
    """Overwrite the weights of the student ``small`` with a part of those of ``large``.

    Raises:
        ValueError: the student is larger in some dimension, or has another vocabulary.
    """
    check_can_shrink(large.config, small.config)
    body: Any = large.transformer
    own: Any = small.transformer
    layers = picked_layers(large.config.n_layer, small.config.n_layer)
    blocks = [body.h[number] for number in layers]
    keep = largest(feature_importance(body.wte.weight, blocks), small.config.n_embd)
    own.wte.weight.copy_(body.wte.weight[:, keep])
    own.wpe.weight.copy_(body.wpe.weight[: small.config.n_positions, keep])
    for source, target in zip(blocks, own.h, strict=True):
        _cut_block(source, target, keep, large.config.n_head, small.config.n_head)
    _cut_norm(body.ln_f, own.ln_f, keep)


def picked_layers(have: int, want: int) -> list[int]:
    """Return the layers to keep: the first, the last, and evenly spaced ones between."""
    if want == 1:
        return [0]
    return [round(number * (have - 1) / (want - 1)) for number in range(want)]


def largest(importance: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` largest values, ascending."""
    return importance.topk(count).indices.sort().values


def feature_importance(embedding: Tensor, blocks: list[Any]) -> Tensor:
    """Return the importance of each feature of the residual stream, ``(E,)``.

    It is the sum of the squared weights that read or write the feature, each matrix normalised to
    a sum of 1, so that all matrices count equally.
    """
    importance = torch.zeros(embedding.shape[1])
    squares = [embedding.pow(2).sum(0)]
    for block in blocks:
        squares.append((block.attn.c_attn.weight * block.ln_1.weight[:, None]).pow(2).sum(1))
        squares.append((block.mlp.c_fc.weight * block.ln_2.weight[:, None]).pow(2).sum(1))
        squares.append(block.attn.c_proj.weight.pow(2).sum(0))
        squares.append(block.mlp.c_proj.weight.pow(2).sum(0))
    for square in squares:
        importance += square / square.sum().clamp(min=torch.finfo(square.dtype).tiny)
    return importance


def _cut_norm(source: Any, target: Any, keep: Tensor) -> None:
    target.weight.copy_(source.weight[keep])
    target.bias.copy_(source.bias[keep])


def _cut_block(source: Any, target: Any, keep: Tensor, have: int, want: int) -> None:
    _cut_norm(source.ln_1, target.ln_1, keep)
    _cut_norm(source.ln_2, target.ln_2, keep)
    _cut_attention(source.attn, target.attn, keep, have, want)
    # A neuron's importance is the norm of its input weights times that of its output weights.
    reads = source.mlp.c_fc.weight[keep]
    writes = source.mlp.c_proj.weight[:, keep]
    neurons = largest(reads.norm(dim=0) * writes.norm(dim=1), target.mlp.c_fc.weight.shape[1])
    target.mlp.c_fc.weight.copy_(reads[:, neurons])
    target.mlp.c_fc.bias.copy_(source.mlp.c_fc.bias[neurons])
    target.mlp.c_proj.weight.copy_(writes[neurons])
    target.mlp.c_proj.bias.copy_(source.mlp.c_proj.bias[keep])


def _cut_attention(source: Any, target: Any, keep: Tensor, have: int, want: int) -> None:
    """Copy the heads with the largest output, each reduced to the student's width of a head."""
    wide, narrow = source.c_proj.weight.shape[0] // have, target.c_proj.weight.shape[0] // want
    # Each (E+1, heads, d); the last row is the bias, the weights of a constant feature 1.
    query, key, value = (
        torch.cat([weight[keep], bias[None]]).unflatten(1, (have, wide))
        for weight, bias in zip(
            source.c_attn.weight.chunk(3, dim=1), source.c_attn.bias.chunk(3), strict=True
        )
    )
    output = source.c_proj.weight[:, keep].unflatten(0, (have, wide))  # (heads, d, E)
    strength = torch.stack([(value[:, h] @ output[h]).norm() for h in range(have)])
    queries, keys, values, outputs = [], [], [], []
    # Attention scores are divided by the root of the head's width, which differs.
    scale = (narrow / wide) ** 0.25
    for head in largest(strength, want).tolist():
        left, right = low_rank(query[:, head], key[:, head].t(), narrow)
        queries.append(left * scale)
        keys.append(right.t() * scale)
        left, right = low_rank(value[:, head], output[head], narrow)
        values.append(left)
        outputs.append(right)
    joined = torch.cat([*queries, *keys, *values], dim=1)  # (E+1, 3 · heads · d)
    target.c_attn.weight.copy_(joined[:-1])
    target.c_attn.bias.copy_(joined[-1])
    target.c_proj.weight.copy_(torch.cat(outputs))
    target.c_proj.bias.copy_(source.c_proj.bias[keep])


def low_rank(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors of the best approximation to ``left`` ``(m, d)`` @ ``right`` ``(d, n)``.

    Returns:
        ``(m, rank)`` and ``(rank, n)``; each carries the root of the singular values. With
        ``rank`` d their product equals that of the inputs.
    """
    # The product has at most rank d, so QR makes the decomposition small.
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().t())
    u, s, v = torch.linalg.svd(r_left @ r_right.t())
    root = s[:rank].sqrt()
    rank = len(root)
    return (
        (q_left @ u[:, :rank] * root).to(left.dtype),
        (root[:, None] * (v[:rank] @ q_right.t())).to(right.dtype),
    )

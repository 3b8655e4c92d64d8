"""Initialises a small GPT-2 from a larger one, by the activations of a few calibration proteins.

The stream of the large model is rotated to its principal directions and cut there (SliceGPT:
Ashkboos et al. 2024, arXiv:2401.15024). Attention heads are replaced by their best approximations
of lower rank on the stream that they read, and the most active neurons are kept (Muralidharan et
al. 2024, arXiv:2407.14679). Then the output matrix of each attention and each MLP is fitted, first
block first, so that the student's stream is as close as possible to the teacher's: by this a block
also takes over from the layers that are left out after it. Nothing is trained by gradients.

A student of the same shape computes the same function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from src.proteins.batching import padded

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

CALIBRATION_TOKENS = 16_384
"""Tokens that are run: some 30 for each feature of the largest fit of the bundled students."""
CALIBRATION_PROTEINS = 512
"""Most proteins that are run."""
RIDGE = 1e-3
"""Pull of a fit towards the weights before it, in units of the features' mean square."""


def check_can_shrink(large: Any, small: Any) -> None:
    """Raise ``ValueError`` unless ``small`` is nowhere larger, with the vocabulary of ``large``."""
    for name in ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions", "n_inner"):
        have, want = (
            (getattr(c, name) or 4 * c.n_embd) if name == "n_inner" else getattr(c, name)
            for c in (large, small)
        )
        if want > have or (name == "vocab_size" and want != have):
            raise ValueError(
                f"--init_from: its {name} is {have}, the student's {want}: a student can be cut "
                "from a model that is nowhere smaller and has the same vocabulary"
            )


def calibration_batch(rows: Sequence[Any], longest: int) -> tuple[Tensor, Tensor]:
    """Return the first rows that make up :data:`CALIBRATION_TOKENS`, padded at their ends.

    At most ``longest`` tokens of each are kept.

    Returns:
        Ids ``(B, T)`` and which are no padding ``(B, T)``.
    """
    kept, tokens = [], 0
    for row in rows:
        kept.append(row[:longest])
        tokens += len(kept[-1])
        if tokens >= CALIBRATION_TOKENS:
            break
    ids, mask = padded(kept)
    return ids, mask.bool()


@torch.no_grad()
def cut(large: GPT2LMHeadModel, small: GPT2LMHeadModel, rows: Sequence[Any]) -> None:
    """Overwrite the weights of the student ``small`` with an approximation of ``large``.

    Args:
        large: the teacher, in eval mode and float32; it is not changed.
        small: the student, on the same device.
        rows: token ids of calibration proteins, such as :data:`CALIBRATION_TOKENS` asks for.

    Raises:
        ValueError: the student is larger in some dimension, or has another vocabulary.
    """
    check_can_shrink(large.config, small.config)
    _Cut(large, small, *calibration_batch(rows, small.config.n_positions)).run()


def picked_layers(have: int, want: int) -> list[int]:
    """Return the layers to keep: the first, the last, and evenly spaced ones between."""
    if want == 1:
        return [0]
    return [round(number * (have - 1) / (want - 1)) for number in range(want)]


def largest(importance: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` largest values, ascending."""
    return importance.topk(count).indices.sort().values


def principal_map(covariance: Tensor, width: int) -> Tensor:
    """Return the map ``(E, width)`` of a stream to its principal directions, means at zero.

    A LayerNorm subtracts the mean over features. So the directions are laid into the space
    orthogonal to the student's mean, which takes one of its ``width`` dimensions.

    Args:
        covariance: ``(E, E)`` of centred streams, float64.
        width: of the student; with E the identity is returned.
    """
    features = covariance.shape[0]
    identity = torch.eye(width, dtype=covariance.dtype, device=covariance.device)
    if width == features:
        return identity
    directions = torch.linalg.eigh(covariance).eigenvectors[:, features - width + 1 :]
    # Columns 1 … of a Householder basis whose first vector is the mean direction.
    away = torch.full_like(identity[0], 1.0 / math.sqrt(width)) - identity[0]
    basis = identity - 2.0 * torch.outer(away, away) / away.dot(away).clamp(min=1e-300)
    return directions @ basis[:, 1:].t()


def corrected(
    inputs: Tensor, targets: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a linear map fitted by least squares, drawn towards the one before.

    It minimises ‖X W + b − Y‖² + λ ‖(W, b) − (W₀, b₀)‖², λ = :data:`RIDGE` times the mean square
    of a feature times the number of rows.

    Args:
        inputs: X ``(N, d)``.
        targets: Y ``(N, k)``.
        weight: W₀ ``(d, k)``.
        bias: b₀ ``(k,)``.

    Returns:
        W and b.
    """
    ones = torch.ones_like(inputs[:, :1])
    features = torch.cat([inputs, ones], dim=1).double()
    missing = (targets - inputs @ weight - bias).double()
    gram = features.t() @ features
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    change = torch.linalg.solve(gram, features.t() @ missing).to(weight.dtype)
    return weight + change[:-1], bias + change[-1]


def low_rank(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors of the best approximation to ``left`` ``(m, d)`` @ ``right`` ``(d, n)``.

    The approximation is that of Eckart and Young (1936, Psychometrika 1:211).

    Returns:
        ``(m, rank)`` and ``(rank, n)``; each carries the root of the singular values. With
        ``rank`` d their product equals that of the inputs. Dimensions beyond d are zero in the
        second factor and 0.02 of a normal distribution in the first, so that they can be learned.
    """
    # The product has at most rank d, so QR makes the decomposition small.
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().t())
    u, s, v = torch.linalg.svd(r_left @ r_right.t())
    root = s[:rank].sqrt()
    full_rank = len(root)
    first = (q_left @ u[:, :full_rank] * root).to(left.dtype)
    second = (root[:, None] * (v[:full_rank] @ q_right.t())).to(right.dtype)
    if rank > full_rank:
        generator = torch.Generator().manual_seed(rank)
        spare = 0.02 * torch.randn(len(first), rank - full_rank, generator=generator)
        first = torch.cat([first, spare.to(first)], dim=1)
        second = functional.pad(second, (0, 0, 0, rank - full_rank))
    return first, second


class _Cut:
    """The state of one cut: what was recorded of the teacher, and the student's stream so far."""

    def __init__(
        self, large: GPT2LMHeadModel, small: GPT2LMHeadModel, ids: Tensor, valid: Tensor
    ) -> None:
        self.large: Any = large.transformer
        self.small: Any = small.transformer
        self.heads = (large.config.n_head, small.config.n_head)
        device = self.large.wte.weight.device
        self.ids, self.valid = ids.to(device), valid.to(device)
        self.layers = picked_layers(large.config.n_layer, small.config.n_layer)
        ends = [*self.layers[1:], large.config.n_layer]
        norms = [*(block.ln_1 for block in self.large.h), self.large.ln_f]
        # What a kept block reads and leaves: before it, after its attention, where the next begins.
        self.before = [norms[layer] for layer in self.layers]
        self.between = [self.large.h[layer].ln_2 for layer in self.layers]
        self.after = [norms[end] for end in ends]
        self.activity: dict[int, Tensor] = {}
        self.last = torch.empty(0)
        self.map = self._principal_map(small.config.n_embd)
        self.streams: dict[Any, Tensor] = {}
        self.shares: dict[Any, float] = {}
        self._record_streams()

    def run(self) -> None:
        """Fill the student, first block first."""
        small, positions = self.small, self.small.wpe.weight.shape[0]
        small.wte.weight.copy_(self.large.wte.weight @ self.map)
        small.wpe.weight.copy_(self.large.wpe.weight[:positions] @ self.map)
        stream = small.wte(self.ids) + small.wpe.weight[: self.ids.shape[1]]
        for number, layer in enumerate(self.layers):
            stream = self._attention(number, layer, stream)
            stream = self._mlp(number, layer, stream)
        self._head(stream)

    # What is recorded of the teacher ------------------------------------------------------------

    def _run_teacher(self, hooks: dict[Any, Any]) -> None:
        """Run the calibration proteins with a hook on the input of some modules."""
        handles = [
            module.register_forward_pre_hook(lambda m, inputs, hook=hook: hook(inputs[0]))
            for module, hook in hooks.items()
        ]
        try:
            self.large(self.ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def _principal_map(self, width: int) -> Tensor:
        """Return the map of the teacher's stream to the student's, ``(E, k)``.

        All places that a kept block reads count equally, and so do all tokens. The stream at the
        teacher's last norm is kept in its own directions.
        """
        features = self.large.wte.weight.shape[1]
        total = torch.zeros(features, features, dtype=torch.float64, device=self.ids.device)

        def add(stream: Tensor) -> None:
            self.last = stream[self.valid]
            centred = functional.layer_norm(self.last.double(), (features,))
            total.add_(centred.t() @ centred)

        def measure(layer: int) -> Any:
            def keep(active: Tensor) -> None:
                self.activity[layer] = active[self.valid].std(0)

            return keep

        hooks: dict[Any, Any] = dict.fromkeys([*self.before, *self.between, self.large.ln_f], add)
        hooks |= {self.large.h[layer].mlp.c_proj: measure(layer) for layer in self.layers}
        self._run_teacher(hooks)
        return principal_map(total, width).to(self.large.wte.weight.dtype)

    def _record_streams(self) -> None:
        """Keep the teacher's streams in the student's directions, ``(B, T, k)``, by norm.

        Beside them the root of the share of the variance that lies in these directions.
        """

        def measure(norm: Any) -> Any:
            def keep(stream: Tensor) -> None:
                self.streams[norm] = stream @ self.map
                whole = stream[self.valid] - stream[self.valid].mean(-1, keepdim=True)
                part = self.streams[norm][self.valid]
                part = part - part.mean(-1, keepdim=True)
                ratio = part.square().sum(-1) / whole.square().sum(-1)
                self.shares[norm] = ratio.mean().sqrt().item()

            return keep

        wanted = dict.fromkeys([*self.before, *self.between, *self.after])
        self._run_teacher({norm: measure(norm) for norm in wanted})

    # The blocks -----------------------------------------------------------------------------------

    def _read(self, norm: Any, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return what reads the student's normalised stream as the teacher's matrix reads its own.

        The teacher's norm is n = γ √E x/‖x‖ + β and the student's, with γ = 1 and β = 0,
        √k r/‖r‖, where r = xP and ‖r‖ ≈ ρ ‖x‖. So n ≈ (ρ √(E/k) r̂ Pᵀ) γ + β.

        Args:
            norm: of the teacher.
            weight: ``(E, out)``.
            bias: ``(out,)``.
        """
        scale = self.shares[norm] * math.sqrt(self.map.shape[0] / self.map.shape[1])
        return scale * self.map.t() @ (norm.weight[:, None] * weight), norm.bias @ weight + bias

    def _attention(self, number: int, layer: int, stream: Tensor) -> Tensor:
        """Fill an attention, and return the stream after it."""
        source, target = self.large.h[layer], self.small.h[number]
        reset_norm(target.ln_1)
        have, want = self.heads
        wide, narrow = (
            m.attn.c_proj.weight.shape[0] // n for m, n in ((source, have), (target, want))
        )
        inputs = target.ln_1(stream)
        weight, bias = self._read(source.ln_1, source.attn.c_attn.weight, source.attn.c_attn.bias)
        # Each (k+1, heads, d); the last row is the bias, the weights of a constant feature 1.
        whole = torch.cat([weight, bias[None]])
        query, key, value = (part.unflatten(1, (have, wide)) for part in whole.chunk(3, dim=1))
        output = (source.attn.c_proj.weight @ self.map).unflatten(0, (have, wide))
        root, inverse = roots(inputs[self.valid])
        strength = torch.stack([(root @ value[:, h] @ output[h]).norm() for h in range(have)])
        queries, keys, values, outputs = [], [], [], []
        # Attention scores are divided by the root of the head's width, which differs.
        scale = (narrow / wide) ** 0.25
        for head in largest(strength, want).tolist():
            left, right = low_rank(root @ query[:, head], (root @ key[:, head]).t(), narrow)
            queries.append(inverse @ left * scale)
            keys.append(inverse @ right.t() * scale)
            left, right = low_rank(root @ value[:, head], output[head], narrow)
            values.append(inverse @ left)
            outputs.append(right)
        joined = torch.cat([*queries, *keys, *values], dim=1)  # (k+1, 3 · heads · d)
        target.attn.c_attn.weight.copy_(joined[:-1])
        target.attn.c_attn.bias.copy_(joined[-1])
        queried, keyed, valued = (
            part.unflatten(-1, (want, narrow)).transpose(1, 2)
            for part in target.attn.c_attn(inputs).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(queried, keyed, valued, is_causal=True)
        mixed = mixed.transpose(1, 2).flatten(2)
        wanted = self.streams[self.between[number]] - stream
        start = torch.cat(outputs), source.attn.c_proj.bias @ self.map
        return stream + self._write(target.attn.c_proj, mixed, wanted, *start)

    def _mlp(self, number: int, layer: int, stream: Tensor) -> Tensor:
        """Fill an MLP, and return the stream after it."""
        source, target = self.large.h[layer], self.small.h[number]
        reset_norm(target.ln_2)
        output = source.mlp.c_proj.weight @ self.map
        importance = self.activity[layer] * output.norm(dim=1)
        neurons = largest(importance, target.mlp.c_fc.weight.shape[1])
        weight, bias = self._read(source.ln_2, source.mlp.c_fc.weight, source.mlp.c_fc.bias)
        target.mlp.c_fc.weight.copy_(weight[:, neurons])
        target.mlp.c_fc.bias.copy_(bias[neurons])
        active = target.mlp.act(target.mlp.c_fc(target.ln_2(stream)))
        wanted = self.streams[self.after[number]] - stream
        start = output[neurons], source.mlp.c_proj.bias @ self.map
        return stream + self._write(target.mlp.c_proj, active, wanted, *start)

    def _write(
        self, layer: Any, inputs: Tensor, wanted: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        """Fit what writes to the stream, and return what it writes."""
        fitted = corrected(inputs[self.valid], wanted[self.valid], weight, bias)
        for parameter, value in zip((layer.weight, layer.bias), fitted, strict=True):
            parameter.copy_(value)
        return layer(inputs)

    def _head(self, stream: Tensor) -> None:
        """Fit the last norm, so that the tied head gives the teacher's logits.

        Logits z_v = Σ_k (n_k γ_k + β_k) w_vk are linear in γ and β. The normal equations hold
        products over the vocabulary alone, WᵀW, and over tokens alone, NᵀN, so no logit is made.
        Logits count up to a constant of each token; tokens of the vocabulary by their frequency.
        """
        norm, teacher = self.small.ln_f, self.large.ln_f
        reset_norm(norm)
        width = self.map.shape[1]
        if width == self.map.shape[0]:
            norm.weight.copy_(teacher.weight)
            norm.bias.copy_(teacher.bias)
            return
        ours, theirs = (body.wte.weight.double() for body in (self.small, self.large))
        counts = torch.bincount(self.ids[self.valid], minlength=len(ours)).double()
        share = (counts / counts.sum())[:, None]
        ours, theirs = ours - (share * ours).sum(0), theirs - (share * theirs).sum(0)
        states = norm(stream[self.valid]).double()
        within, across = ours.t() @ (share * ours), theirs.t() @ (share * ours)
        sums, gram = states.sum(0), states.t() @ states
        upper = torch.cat([within * gram, within * sums[:, None]], dim=1)
        lower = torch.cat([within * sums[None], within * len(states)], dim=1)
        matrix = torch.cat([upper, lower])
        wanted = teacher(self.last).double() @ across
        right = torch.cat([(states * wanted).sum(0), wanted.sum(0)])
        matrix.diagonal().add_(RIDGE * matrix.diagonal().mean())
        solution = torch.linalg.solve(matrix, right)
        norm.weight.copy_(solution[:width])
        norm.bias.copy_(solution[width:])


def reset_norm(norm: Any) -> None:
    """Make a LayerNorm do nothing but normalise."""
    norm.weight.fill_(1.0)
    norm.bias.zero_()


def roots(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the root of the second moments of features and a constant 1, and its inverse.

    Args:
        inputs: ``(N, k)``.

    Returns:
        Two symmetric matrices ``(k+1, k+1)``. Directions without variance count as if they had
        1e-6 of the largest.
    """
    features = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1).double()
    values, vectors = torch.linalg.eigh(features.t() @ features / len(features))
    values = values.clamp(min=1e-6 * values.max().item()).sqrt()
    root, inverse = (vectors * values) @ vectors.t(), (vectors / values) @ vectors.t()
    return root.to(inputs.dtype), inverse.to(inputs.dtype)

"""Runs causal language models, and proves for each model that it is run rightly.

The loss, the teacher's cache and the evaluation need the input of a model's output head, not the
logits of a whole batch. What the model then makes of it is measured once for each model
(:func:`head_form`): logits may be scaled (Cohere, Granite) or capped (Gemma 2). The same proof
finds out whether the model is causal, and whether padding changes what it computes.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.common import processes
from src.loss.chunks import OutputHead
from src.loss.reference import at_least_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBED_TOKENS = 7
TOLERANCE = 2e-4
"""Largest difference of two logits that are equal but for rounding in float32, as a share of the
largest logit (or of 0.05). In half precision it is 100 times that."""
_FORM = "_distill_head_form"


class NotCausalError(ValueError):
    """A model whose predictions depend on later tokens."""


@dataclass(frozen=True)
class HeadForm:
    """What a model does after its last hidden states.

    Attributes:
        linear: whether its logits follow from the head's input as :class:`OutputHead` says; else
            it is run for its logits.
        direct: whether the head's input is the base model's output.
        scale: of the logits.
        cap: of the logits, or None.
    """

    linear: bool
    direct: bool = False
    scale: float = 1.0
    cap: float | None = None


class _Reached(Exception):  # noqa: N818 - no error: the run ends where it was to end
    """Carries the input of a model's output head out of its forward pass."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


POSITIONS = ("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len", "context_length")
"""Names of the longest input in configurations."""


def stated_positions(config: Any) -> int | None:
    """Return the longest input of a model in tokens; None where its configuration does not say."""
    stated = (getattr(config, name, None) for name in POSITIONS)
    return next((int(value) for value in stated if value), None)


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """Return position ids ``(B, T)`` that count attended tokens from 0, for padding on any side."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def accepts(model: nn.Module, argument: str) -> bool:
    """Return whether a model's forward takes an argument of that name."""
    return argument in inspect.signature(model.forward).parameters


def block_lists(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """Return the lists of blocks of a base model, by name."""
    children = model.base_model.named_children()
    return {name: module for name, module in children if isinstance(module, nn.ModuleList)}


def keep_head_alone(model: PreTrainedModel) -> None:
    """Free a model's blocks if only its output head is still needed."""
    head_form(model)
    for name in block_lists(model):
        setattr(model.base_model, name, nn.ModuleList())


def model_inputs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the keyword arguments for a forward pass over a possibly padded or packed batch.

    A packed batch has no attention mask, and ``position_ids`` that begin again at each protein:
    transformers then keeps attention inside each protein. A row without attended tokens gets one,
    because attention over nothing gives NaN.
    """
    inputs = {"input_ids": input_ids}
    if attention_mask is not None:
        empty = ~attention_mask.bool().any(-1)
        if empty.any():
            attention_mask = attention_mask.clone()
            attention_mask[empty, 0] = 1
        inputs["attention_mask"] = attention_mask
        if position_ids is None:
            position_ids = positions_from_mask(attention_mask)
    if position_ids is not None and accepts(model, "position_ids"):
        inputs["position_ids"] = position_ids
    return inputs


def output_head(model: PreTrainedModel) -> OutputHead:
    """Return a model's output head, which makes its logits of :func:`final_hidden_states`.

    Raises:
        NotCausalError: the model is not causal.
        ValueError: padding changes what it computes.
    """
    form = head_form(model)
    if not form.linear:
        return OutputHead(None)
    head: Any = model.get_output_embeddings()
    return OutputHead(head.weight, getattr(head, "bias", None), form.scale, form.cap)


def states_shape(model: PreTrainedModel) -> tuple[int, torch.dtype, torch.device]:
    """Return width, dtype and device of :func:`final_hidden_states`."""
    head = output_head(model)
    if head.weight is None:
        return int(model.config.vocab_size), model.dtype, model.device
    return head.weight.shape[1], head.weight.dtype, head.weight.device


def final_hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Return the input of a model's output head: hidden states after the last norm.

    Args:
        model: a causal language model.
        input_ids: ``(B, T)``.
        attention_mask: ``(B, T)``, 0 at padding.
        position_ids: ``(B, T)``; None: count attended tokens.

    Returns:
        ``(B, T, E)`` in the model's compute dtype; logits ``(B, T, V)`` where the head has no
        weight (:func:`output_head`).
    """
    inputs = model_inputs(model, input_ids, attention_mask, position_ids) | {"use_cache": False}
    form = head_form(model)
    if form.direct:
        return model.base_model(**inputs)[0]
    if not form.linear:
        return model(**inputs).logits

    def leave(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        raise _Reached(arguments[0])

    hook = model.get_output_embeddings().register_forward_pre_hook(leave)  # type: ignore[union-attr]
    try:
        model(**inputs)
    except _Reached as reached:
        return reached.hidden
    finally:
        hook.remove()
    raise AssertionError("the head was not reached")


# The proof -----------------------------------------------------------------------------------


def head_form(model: PreTrainedModel) -> HeadForm:
    """Return what a model does after its last hidden states; proved at the first call.

    Raises:
        NotCausalError: the model is not causal.
        ValueError: padding changes what it computes.
    """
    form = model.__dict__.get(_FORM)
    if form is None:
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
                form = _compare_logits(model)
        finally:
            model.train(training)
        model.__dict__[_FORM] = form
        if not form.linear:
            processes.say(
                f"{type(model).__name__}: its logits do not follow from its last hidden states by "
                "an output head with scale and cap: it is run for full logits, which takes more "
                "memory and, in a teacher cache, more disk"
            )
    return form


def _compare_logits(model: PreTrainedModel) -> HeadForm:
    """Run a model on three short rows and on one of them alone, and compare."""
    width = PROBED_TOKENS
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.vocab_size)
    row = torch.randint(vocabulary, (width + 2,), generator=generator)
    other = row.clone()
    other[width - 1] = (other[width - 1] + 1) % vocabulary
    mask = torch.ones(3, width + 2, dtype=torch.long)
    mask[2, width:] = 0
    batch = torch.stack([row, other, row.where(mask[2] > 0, row[0])]).to(model.device)
    inputs = model_inputs(model, batch, mask.to(model.device)) | {"use_cache": False}
    logits, products, hidden, base = _watched(model, inputs)
    alone = model(input_ids=batch[:1, :width], use_cache=False).logits[0]
    name = type(model).__name__
    if not (torch.isfinite(alone).all() and torch.isfinite(logits).all()):
        raise ValueError("its outputs are not finite: the weights are damaged")
    # A model that looks ahead knows the changed token before it comes.
    if not same(logits[0, : width - 1], logits[1, : width - 1]):
        raise NotCausalError(
            f"{name} is not causal: its prediction of a token changes with the tokens after it, so "
            "it gives proteins no probability; a causal model is needed"
        )
    if not same(logits[0, :width], alone) or not same(logits[2, :width], alone):
        raise ValueError(
            f"{name} gives other probabilities in a batch than alone: it cannot be run in batches"
        )
    head: Any = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if products is None or not isinstance(weight, Tensor) or hidden.shape[:2] != batch.shape:
        return HeadForm(linear=False)
    bias = getattr(head, "bias", None)
    if not same(F.linear(hidden, weight, bias), products):
        return HeadForm(linear=False)
    scale, cap = _scale_and_cap(model, inputs, products)
    form = OutputHead(weight, bias, scale, cap)
    if not same(form.logits(hidden), logits):
        return HeadForm(linear=False)
    return HeadForm(True, base is not None and torch.equal(base, hidden), scale, cap)


def _scale_and_cap(
    model: PreTrainedModel, inputs: dict[str, Any], products: Tensor
) -> tuple[float, float | None]:
    """Measure what a model does with its head's output, by replacing it with chosen numbers.

    f(r) = c tanh(s r / c) has slope s at 0 and the limit c; what else f may be is found out when
    :func:`_compare_logits` compares logits.
    """

    def at(value: float) -> float:
        chosen = torch.full_like(products, value, dtype=torch.float32)
        return float(_watched(model, inputs, replacement=chosen)[0].flatten()[0])

    far, small = at(2.0**20), 2.0**-6
    cap = None if abs(far) >= 2.0**14 * abs(at(1.0)) else abs(far)
    if cap is None:
        return at(1.0), None
    slope = math.atanh(at(small) / cap) * cap / small
    return (1.0 if math.isclose(slope, 1.0, rel_tol=1e-5) else slope), cap


def _watched(
    model: PreTrainedModel, inputs: dict[str, Any], replacement: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Any, Tensor | None]:
    """Return the logits, the output head's output and input, and the base model's output.

    The last three are None where there was no such call. With a replacement the head gives that
    instead of its output.
    """
    head: Any = model.get_output_embeddings()
    heads: list[tuple[Tensor, Tensor]] = []
    bases: list[Tensor] = []

    def watch(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        heads.append((output, arguments[0]))
        return replacement

    hooks = [] if head is None else [head.register_forward_hook(watch)]
    if model.base_model is not model:
        hooks.append(
            model.base_model.register_forward_hook(
                lambda module, arguments, output: bases.append(output[0])
            )
        )
    try:
        logits = model(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()
    products, hidden = heads[0] if len(heads) == 1 else (None, None)
    base = bases[0] if len(bases) == 1 and isinstance(bases[0], Tensor) else None
    return logits, products, hidden, base


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether logits are equal but for rounding, as far as their dtype tells."""
    half = torch.finfo(one.dtype).bits < 32
    one, other = at_least_float32(one), at_least_float32(other)
    finite = torch.where(torch.isfinite(other), other, 0.0)  # a model may exclude tokens: -inf
    limit = (100 if half else 1) * TOLERANCE * max(0.05, float(finite.abs().max()))
    return torch.allclose(one, other, rtol=0, atol=limit)


def keeps_packed_apart(model: PreTrainedModel) -> bool:
    """Return whether proteins that share a row ignore each other, told apart by their positions."""
    head_form(model)  # refuses what is not causal
    if not accepts(model, "position_ids"):
        return False
    width = PROBED_TOKENS
    generator = torch.Generator().manual_seed(1)
    row = torch.randint(int(model.config.vocab_size), (1, 2 * width), generator=generator)
    ids = row.to(model.device)
    positions = torch.arange(width, device=model.device).repeat(1, 2)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            head = output_head(model)
            packed = head.logits(final_hidden_states(model, ids, None, positions))
            alone = head.logits(final_hidden_states(model, ids[:, width:]))
    finally:
        model.train(training)
    return same(packed[:, width:], alone)


def require_packing(model: PreTrainedModel) -> None:
    """Raise ``ValueError`` if packed proteins would see each other."""
    if not keeps_packed_apart(model):
        raise ValueError(
            f"--batching packed: in {type(model).__name__} proteins that share a row see each "
            "other, which would change their probabilities: leave --batching out, or pass "
            "--teacher_cache"
        )

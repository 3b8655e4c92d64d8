"""Low-rank adaptation: a large model is adapted by training small additions to its linear maps.

To each linear map W of the blocks B A is added, of a small rank r; W is frozen (Hu et al. 2021,
arXiv:2106.09685). The optimiser then keeps states of A and B alone. At the end W + B A takes the
place of W, so that what is saved is a plain model. The layers are those of ``peft``.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_peft() -> Any:
    """Return the package. Raises ``ValueError`` if it is missing."""
    try:
        return import_module("peft")
    except ImportError:
        raise ValueError("--lora needs peft: pip install -r requirements-family.txt") from None


def add_lora(model: PreTrainedModel, rank: int, seed: int) -> None:
    """Freeze a model and add trainable maps of a rank to all its linear maps but the output head.

    The model is changed in place. A is random by ``seed``, which leaves the caller's random
    generator as it is, and B is 0: the model computes what it computed. B A is not scaled.

    Raises:
        ValueError: peft is missing, or the model has no linear map that it knows.
    """
    peft = require_peft()
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GPT-2's linear maps are stored the other way round
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(config, model)
        except ValueError as error:
            raise ValueError(f"--lora: {type(model).__name__}: {error}") from error


def merge_lora(model: PreTrainedModel) -> None:
    """Add the trained maps to the weights, and make a model plain again, in place."""
    layer_class = import_module("peft.tuners.tuners_utils").BaseTunerLayer
    layers: list[tuple[str, Any]] = [*model.named_modules()]
    for name, module in layers:
        if isinstance(module, layer_class):
            module.merge(safe_merge=True)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, module.get_base_layer())
    model.requires_grad_(True)

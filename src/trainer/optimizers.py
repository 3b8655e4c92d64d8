"""Optimisers beside those of the Trainer: Muon for the matrices inside the blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ADAMW_BETAS = (0.9, 0.95)
"""AdamW's betas beside Muon: the second moment forgets faster, as in modded-nanogpt's recipes."""


def block_matrices(model: nn.Module) -> set[str]:
    """Return the names of the matrices inside a model's blocks: not those of embeddings and head.

    A block is an element of a ``ModuleList``; a matrix is a parameter with two dimensions.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and any(name.startswith(f"{stem}.") for stem in lists)
    }


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for some groups of parameters and AdamW for the others, as one optimiser.

    Muon replaces the momentum of a matrix's gradient by its nearest orthogonal matrix (Jordan et
    al. 2024, https://kellerjordan.github.io/posts/muon; ``torch.optim.Muon``). Its update is scaled
    to the root mean square of AdamW's (Liu et al. 2025, arXiv:2502.16982, eq. 4), so that learning
    rates of both are of one size.

    Args:
        matrices: groups for Muon, each with ``params``, ``lr`` and ``weight_decay``.
        others: groups for AdamW, likewise.

    This object holds the states of all parameters, and the groups in the order matrices, others, so
    its state dictionary is like that of any optimiser.
    """

    def __init__(
        self, matrices: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]
    ) -> None:
        self._muon = torch.optim.Muon(list(matrices), adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(list(others), betas=ADAMW_BETAS)
        self._first_other = len(self._muon.param_groups)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one step of both optimisers; ``closure`` is called once before."""
        loss = closure() if closure is not None else None
        parts = (slice(self._first_other), slice(self._first_other, None))
        for part, optimizer in zip(parts, (self._muon, self._adamw), strict=True):
            # Loading a state replaces groups and states, so both are passed on at each step.
            optimizer.param_groups = self.param_groups[part]
            optimizer.state = self.state
            optimizer.step()
        return loss


def muon_with_adamw(
    model: nn.Module,
    learning_rate: float,
    other_learning_rate: float | None,
    weight_decay: float,
) -> MuonWithAdamW:
    """Return the optimiser of a model: Muon for matrices inside blocks, AdamW for the rest.

    Args:
        model: whose parameters with a gradient are optimised.
        learning_rate: of Muon.
        other_learning_rate: of AdamW; None: that of Muon.
        weight_decay: of Muon; embeddings, norms and biases have none.
    """
    inside = block_matrices(model)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]

    def chosen(within: bool) -> list[Tensor]:
        return [p for n, p in named if (n in inside) == within]

    rate = learning_rate if other_learning_rate is None else other_learning_rate
    return MuonWithAdamW(
        [{"params": chosen(True), "lr": learning_rate, "weight_decay": weight_decay}],
        [{"params": chosen(False), "lr": rate, "weight_decay": 0.0}],
    )
